import jax.numpy as jnp
import pytest

import xnor_jax as xnor


def test_missing_layers_method_is_refused_by_name():
    class Net(xnor.nn.Layered):
        pass

    with pytest.raises(TypeError, match="^Net: expected a method layers"):
        Net()(jnp.ones((1, 4)))
