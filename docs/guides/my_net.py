"""A custom recipe: `xnor-jax train my_net:RECIPE`."""

import jax.numpy as jnp
import optax
from flax import nnx

import xnor_jax as xnor


class Net(xnor.nn.Layered):  # or any nnx.Module
    """A real convolution, a binary block, a dense layer."""

    def __init__(self, *, image_shape, classes, rngs, rule):
        self.image_shape = image_shape
        self.conv1 = nnx.Conv(image_shape[-1], 32, (3, 3), strides=2, rngs=rngs)
        self.block2 = xnor.nn.XnorBlock(32, 64, (3, 3), rule=rule, rngs=rngs)
        self.dense3 = nnx.Linear(64, classes, rngs=rngs)

    def layers(self):
        """The layers in order."""
        pool = xnor.nn.MaxPool(2, 2), xnor.nn.GlobalAveragePool()
        return self.conv1, nnx.relu, self.block2, *pool, self.dense3


def soft(kernel, grad):
    """A rule: the slope of a tanh in place of straight-through."""
    return grad * (1 - jnp.tanh(kernel) ** 2)


def cycle(learning_rate, steps_per_epoch, epochs):
    """A schedule."""
    return optax.cosine_onecycle_schedule(steps_per_epoch * epochs, learning_rate)


RECIPE = xnor.train.Recipe(
    dataset="digits",  # or a function that returns four arrays
    model=Net,
    rule=soft,
    schedule=cycle,
    optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=1e-4),
    epochs=3,
)
