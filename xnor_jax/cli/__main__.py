"""`python -m xnor_jax.cli` is `xnor-jax`."""

from xnor_jax.cli import main

main()
