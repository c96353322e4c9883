"""Locate and load the `cpu` backend's compiled library, without JAX."""

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path

import xnor_jax

LIBRARY = "libxnor_jax_cpu.so"


@cache
def load() -> ctypes.CDLL | None:
    """Load the library; None if it was not built or cannot be loaded.

    Raises:
      RuntimeError: If an environment variable names a library that cannot be loaded, or
        an instruction set that this processor does not support.
    """
    given = os.environ.get("XNOR_JAX_CPU_LIBRARY")
    installed = (Path(folder, "ops", "cpu", LIBRARY) for folder in xnor_jax.__path__)
    path = given or next((str(p) for p in installed if p.is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        if given:
            raise RuntimeError(f"XNOR_JAX_CPU_LIBRARY: {error}") from error
        warnings.warn(
            f"xnor_jax: {error}; the cpu backend is unavailable, rebuild it on this "
            "machine",
            stacklevel=2,
        )
        return None
    library.xnor_jax_instruction_set.restype = ctypes.c_char_p
    library.xnor_jax_instruction_set.argtypes = [ctypes.c_int]
    library.xnor_jax_chosen.restype = ctypes.c_char_p
    library.xnor_jax_choose.argtypes = [ctypes.c_char_p]
    name = os.environ.get("XNOR_JAX_INSTRUCTION_SET")
    if name and not library.xnor_jax_choose(name.encode()):
        names = ", ".join(_instruction_sets(library))
        raise RuntimeError(
            f"XNOR_JAX_INSTRUCTION_SET: {name!r} is not supported by this processor or "
            f"library; expected one of {names}"
        )
    return library


def instruction_sets() -> tuple[str, ...]:
    """The supported instruction sets, the best first; () without the library."""
    library = load()
    return _instruction_sets(library) if library else ()


def _instruction_sets(library: ctypes.CDLL) -> tuple[str, ...]:
    names: list[str] = []
    while name := library.xnor_jax_instruction_set(len(names)):
        names.append(name.decode())
    return tuple(names)


def instruction_set() -> str | None:
    """The instruction set in use; None without the library."""
    library = load()
    return library.xnor_jax_chosen().decode() if library else None
