"""Trained, packed networks that ship with the package, and sharing through the hub.

A network in the zoo is two files in this folder: `NAME.safetensors`, written by
`xnor-jax pack`, and `NAME.json`, its card.
"""

from xnor_jax.zoo.cards import Card
from xnor_jax.zoo.hub import HubError, pull, push
from xnor_jax.zoo.networks import card, find, load, names

__all__ = ["Card", "HubError", "card", "find", "load", "names", "pull", "push"]
