"""Run `xnor-jax` as `python -m xnor_jax.cli`."""

from xnor_jax.cli import main

main()
