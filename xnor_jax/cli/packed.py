"""The commands for packed files: predict and bench."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from xnor_jax._words import counted
from xnor_jax.cli import UsageError, enable_interrupts, note, say
from xnor_jax.cli.output import make_console
from xnor_jax.cli.parsing import check_backend, check_file, command, find_packed
from xnor_jax.registry import BACKENDS

_BACKENDS = f"{{auto,{','.join(BACKENDS)}}}"


@command
def predict(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="(at least one)"),
    ],
    /,
    invert: bool = False,
    top: int = 1,
    json: bool = False,
) -> None:
    """Print the class of each image and its probability.

    An image that is missing or cannot be read is reported on standard error; the
    others are classified, and the exit status is 1.

    Args:
      file: A file written by pack, or the name of a network in the zoo.
      images: PNG, JPEG, BMP, GIF, TIFF, WEBP, PPM or another format that Pillow
        decodes, converted to grey or colour and resized for the network; a folder, for
        all pictures below it; or - for one image on standard input.
      invert: Swap dark and light first: MNIST's digits are white on black.
      top: The number of classes to print, the most probable first.
      json: Print one JSON object per image.
    """
    if not images:
        raise UsageError("no image; expected predict FILE IMAGE…")
    if top < 1:
        raise UsageError(f"--top: expected a number of at least 1, got {top}")
    file = find_packed(file)
    paths, missing = _find_pictures(images)
    import numpy as np

    from xnor_jax.data import DataError
    from xnor_jax.data import images as pictures
    from xnor_jax.train import predict as prediction

    packed = load(file)
    fit = prediction.fit(packed)
    for error in missing:
        say(error)
    broken, resized, converted = bool(missing), [], 0
    # One batch at a time, so that a folder of any size fits in memory.
    for first in range(0, len(paths), prediction.BATCH_SIZE):
        pixels, read = [], []
        for path in paths[first : first + prediction.BATCH_SIZE]:
            try:
                picture = _standard_input() if path == _STDIN else path
                image, notes = pictures.read(
                    [picture],
                    packed.image_shape,
                    fit=fit,
                    invert=invert,
                    names=[str(path)],
                )
                converted += pictures.is_converted(picture, image[0], name=str(path))
            except (DataError, OSError) as error:
                say(error)
                broken = True
                continue
            read.append(path)
            pixels.append(image)
            resized += notes
        if read:
            found = prediction.classify(packed, np.concatenate(pixels), top=top)
            for path, classes in zip(read, found, strict=True):
                print(_json(path, classes) if json else _line(path, classes))
    if resized:
        note(resized[0] + _and_more(len(resized) - 1))
    if converted:
        kinds = (
            ("colour", "grey") if packed.image_shape[-1] == 1 else ("grey", "colour")
        )
        note(
            f"{counted(converted, f'{kinds[0]} image')} converted to {kinds[1]}, which "
            "the network takes"
        )
    if broken:
        sys.exit(1)


_STDIN = Path("-")


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise OSError("-: standard input is closed")
    return sys.stdin.buffer.read()


def _find_pictures(paths: Sequence[Path]) -> tuple[list[Path], list[UsageError]]:
    """The pictures of all paths, and an error for each path without one.

    Raises:
      UsageError: If no path has a picture.
    """
    found, missing = [], []
    for path in paths:
        try:
            found += _pictures(path)
        except UsageError as error:
            missing.append(error)
    if not found:
        raise UsageError(f"{missing[0]}{_and_more(len(missing) - 1)}")
    return found, missing


def _and_more(number: int) -> str:
    return f" (and {number:,} more)" if number else ""


def _pictures(path: Path) -> list[Path]:
    """A file, or all pictures below a folder, in the order of their paths."""
    if not path.is_dir():
        if path != _STDIN:
            check_file(path)
        return [path]
    from xnor_jax.data import pictures

    suffixes = pictures.suffixes()
    found = sorted(
        below
        for below in path.rglob("*")
        if below.suffix.lower() in suffixes and below.is_file()
    )
    if not found:
        raise UsageError(f"no pictures in {path}")
    return found


# Control characters, which would break the line or change the terminal.
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), 127)}


def _line(path: Path, classes: Sequence[Any]) -> str:
    found = ", ".join(f"{one.name} {one.probability:.2%}" for one in classes)
    return f"{str(path).translate(_ESCAPES)}: {found}"


def _json(path: Path, classes: Sequence[Any]) -> str:
    import json

    found = [{"class": one.name, "probability": one.probability} for one in classes]
    return json.dumps({"image": str(path), "classes": found}, ensure_ascii=False)


@command
def bench(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    /,
    batch_sizes: tuple[int, ...] = (1, 128),
    rounds: int = 10,
    backend: Annotated[str, tyro.conf.arg(metavar=_BACKENDS)] = "auto",
) -> None:
    """Time a packed network on the CPU against the same network in float32.

    Args:
      file: A file written by pack, or the name of a network in the zoo.
      batch_sizes: Images per call.
      rounds: The number of rounds; each times both networks in turn.
      backend: The backend of the sign products; auto is cpu if it was built, else xla.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError("--batch-sizes: expected numbers of at least 1")
    if rounds < 1:
        raise UsageError(f"--rounds: expected a number of at least 1, got {rounds}")
    file = find_packed(file)
    packed = load(file, backend)
    import jax

    from xnor_jax.packing import bench as timing
    from xnor_jax.packing import tables

    enable_interrupts()
    console = make_console()
    console.print(
        f"{packed.info.name or file}: packed ({timing.describe_backend(backend)}) "
        "against float32 by XLA\n"
        f"{timing.describe_cpu()}; jax {jax.__version__}; "
        f"{counted(rounds, 'round')} in turn, median (least–most)"
    )
    results = []
    for threads, size in itertools.product(timing.thread_numbers(), batch_sizes):
        console.print(
            f"timing calls of {counted(size, 'image')} on {counted(threads, 'thread')}…"
        )
        results += timing.measure(
            file, threads, batch_sizes=(size,), rounds=rounds, backend=backend
        )
    console.print(tables.bench_table(results))


def load(file: Path, backend: str = "auto") -> Any:
    """Load the packed network of a file, after checking the backend."""
    check_backend(backend)
    from xnor_jax import packing

    return packing.load(file, backend=backend)
