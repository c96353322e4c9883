"""Networks that have no name in the library."""

from typing import Any

from xnor_jax.models import NIN


class PlainNIN(NIN):
    """NIN without dropout."""

    def __init__(self, **options: Any):
        super().__init__(dropout=0.0, **options)
