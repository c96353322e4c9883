"""The commands on packed files: predict and bench."""

import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from xnor_jax.cli import UsageError, hear_interrupts, note, say
from xnor_jax.cli.parsing import check_backend, check_file, command
from xnor_jax.registry import BACKENDS

_BACKENDS = f"{{auto,{','.join(BACKENDS)}}}"


@command
def predict(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...")
    ],
    /,
    invert: bool = False,
) -> None:
    """Print the class of images, and its probability.

    An image that cannot be read is told on standard error; the others are classified,
    and the exit status is 1.

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
    import numpy as np

    from xnor_jax.data import DataError
    from xnor_jax.data import images as pictures
    from xnor_jax.train import predict as prediction

    packed = load(file)
    fit = prediction.fit(packed)
    pixels, errors = [], {}
    for path in images:
        try:
            image, notes = pictures.read(
                [path], packed.image_shape, fit=fit, invert=invert
            )
        except (DataError, OSError) as error:
            errors[path] = error
            continue
        pixels.append(image)
        for words in notes:
            note(words)
    found = iter(prediction.classify(packed, np.concatenate(pixels)) if pixels else ())
    for path in images:
        if path in errors:
            say(errors[path])
        else:
            name, probability = next(found)
            print(f"{path}: {name} {probability:.2%}")
    if errors:
        sys.exit(1)


@command
def bench(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    /,
    batch_sizes: tuple[int, ...] = (1, 128),
    rounds: int = 10,
    backend: Annotated[str, tyro.conf.arg(metavar=_BACKENDS)] = "auto",
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

    from xnor_jax.packing import bench as timing
    from xnor_jax.packing import tables

    hear_interrupts()
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
    from xnor_jax import packing

    return packing.load(file, backend=backend)


def table_console() -> Any:
    """A console that does not cut tables in a file or a pipe."""
    from rich.console import Console

    # A file or a pipe has no width of its own.
    width = None if sys.stdout and sys.stdout.isatty() else 120
    return Console(width=width, highlight=False, soft_wrap=True)
