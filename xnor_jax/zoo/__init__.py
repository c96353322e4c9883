"""Trained networks that ship with the package, packed, and networks to share.

A network of the zoo is two files in this folder: `NAME.safetensors`, which
`xnor-jax pack` wrote, and `NAME.json`, its card.
"""

from xnor_jax.zoo.cards import Card
from xnor_jax.zoo.hub import HubError, pull, push
from xnor_jax.zoo.networks import card, find, load, names

__all__ = ["Card", "HubError", "card", "find", "load", "names", "pull", "push"]
