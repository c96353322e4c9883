"""Check an installed wheel: the compiled backend is present and exact."""

import jax
import jax.numpy as jnp
from flax import nnx

import xnor_jax as xnor

assert "cpu" in xnor.ops.available_backends(), xnor.ops.available_backends()
a, b = (
    xnor.sign(jax.random.normal(key, shape))
    for key, shape in zip(
        jax.random.split(jax.random.key(0)), ((9, 77), (77, 13)), strict=True
    )
)
assert (xnor.ops.binary_matmul(a, b, backend="cpu") == a @ b).all()
model = xnor.models.LeNet5(rngs=nnx.Rngs(0))
model.eval()
x = jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
logits, expected = xnor.pack(model)(x), model(x)
assert jnp.allclose(logits, expected, rtol=1e-3, atol=1e-3)
assert xnor.zoo.load("digits-lenet5")(x).shape == (4, 10)
print("the wheel works:", ", ".join(xnor.ops.available_backends()))
