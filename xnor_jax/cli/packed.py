"""The commands on packed files: predict and bench."""

import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from xnor_jax.cli import UsageError, note
from xnor_jax.cli.parsing import check_backend, check_file, command


@command
def predict(
    file: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    /,
    invert: bool = False,
) -> None:
    """Print the class of images, and its probability.

    Args:
      file: A file that pack wrote.
      images: PNG, JPEG, BMP, GIF, TIFF, WEBP or PPM; turned to grey or colour and
        resized as the network wants.
      invert: Swap dark and light first: MNIST's digits are white on black.
    """
    if not images:
        raise UsageError("no image; expected predict FILE IMAGE…")
    for path in (file, *images):
        check_file(path)
    from xnor_jax.deploy import images as pictures
    from xnor_jax.deploy import predict as prediction

    packed = load(file)
    fit = prediction.fit(packed)
    pixels, notes = pictures.read(images, packed.image_shape, fit=fit, invert=invert)
    for words in notes:
        note(words)
    found = prediction.classify(packed, pixels)
    for path, (name, probability) in zip(images, found, strict=True):
        print(f"{path}: {name} {probability:.2%}")


@command
def bench(
    file: tyro.conf.Positional[Path],
    /,
    batch_sizes: tuple[int, ...] = (1, 128),
    rounds: int = 10,
    backend: Literal["auto", "float", "xla", "gpu", "pallas", "cpu"] = "auto",
) -> None:
    """Time a packed network on the CPU, beside the same network in floats.

    Args:
      file: A file that pack wrote.
      batch_sizes: Images a call.
      rounds: How often each of the two has its turn.
      backend: What multiplies signs; auto takes cpu where it was built, else xla.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError("--batch-sizes: expected numbers of at least 1")
    if rounds < 1:
        raise UsageError(f"--rounds: expected a number of at least 1, got {rounds}")
    check_file(file)
    packed = load(file, backend)
    import jax

    from xnor_jax.deploy import bench as timing
    from xnor_jax.deploy import tables

    console = table_console()
    console.print(
        f"{packed.info.name or file}: packed ({timing.describe_backend(backend)}) "
        "beside the same network in float32 by XLA\n"
        f"{timing.describe_cpu()}; jax {jax.__version__}; {rounds} rounds in turn, "
        "median (least–most)"
    )
    results = [
        result
        for threads in timing.thread_numbers()
        for result in timing.measure(
            file, threads, batch_sizes=batch_sizes, rounds=rounds, backend=backend
        )
    ]
    console.print(tables.bench_table(results))


def load(file: Path, backend: str = "auto") -> Any:
    """The packed network of a file, on a backend that is checked first."""
    check_backend(backend)
    from xnor_jax import deploy

    return deploy.load(file, backend=backend)


def table_console() -> Any:
    """A console that does not cut tables in a file or a pipe."""
    from rich.console import Console

    # A file or a pipe has no width of its own.
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, highlight=False, soft_wrap=True)
