"""Every registered name has a value, and errors for a wrong name list valid ones."""

import subprocess
import sys

import pytest

from xnor_jax import registry
from xnor_jax.registry import Registry, expected

REGISTRIES = {n: r for n, r in vars(registry).items() if isinstance(r, Registry)}


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_name_has_a_value(kind):
    table = REGISTRIES[kind]
    assert len(table) == len(set(table)) > 0
    for name, value in table.items():
        assert value is not None and name in table and table[name] is value
    assert "nothing of the kind" not in table
    with pytest.raises(KeyError):
        table["nothing of the kind"]


def test_names_are_listed_without_importing_jax():
    program = (
        "import sys; from xnor_jax import registry; "
        "assert 'corrected' in registry.RULES and list(registry.MODELS); "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_closest_name_is_suggested():
    assert expected("lenet", ["lenet5", "nin"]).endswith("did you mean 'lenet5'?")
    assert expected("qqq", ["lenet5", "nin"]) == "expected one of lenet5, nin"
