"""The commands for shared networks: zoo, push and pull."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from xnor_jax import zoo as networks
from xnor_jax.cli import UsageError, enable_interrupts
from xnor_jax.cli.output import make_console
from xnor_jax.cli.parsing import check_backend, check_output, command, find_packed
from xnor_jax.zoo.hub import check_repository
from xnor_jax.zoo.networks import locate


@command
def zoo(
    name: Annotated[
        tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")
    ] = None,
    /,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """List the trained networks that ship with the package, or show or copy one.

    Args:
      name: The network whose card to show.
      output: Write the network's packed file here instead, such as for the engine's
        command xnor. An existing file is replaced, as by pack.
    """
    console = make_console()
    if name is None:
        if output is not None:
            raise UsageError("--output: expected a network's name first")
        console.print(_table())
        return
    try:
        card = networks.card(name)
    except ValueError as error:
        raise UsageError(error) from None
    if output is None:
        console.print(str(card), markup=False)
        return
    check_output(output)
    from xnor_jax.packing.file import replaceable

    try:
        # In the output's folder: a file is replaced atomically only within one file
        # system.
        end = replaceable(output)
        with tempfile.TemporaryDirectory(prefix=".zoo-", dir=end.parent) as folder:
            copy = Path(folder, "copy")
            shutil.copyfile(locate(name, ".safetensors"), copy)
            copy.replace(end)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    print(
        f"{output}: {name}, {card.bytes:,} bytes, test accuracy "
        f"{card.test_accuracy:.2%}"
    )


@command
def push(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")],
    repository: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")
    ],
    /,
    private: bool = False,
) -> None:
    """Upload a packed file and its card to a repository on the Hugging Face hub.

    The card is FILE.md if it exists, and is otherwise generated from the file's
    metadata. The token is that of `hf auth login`, or HF_TOKEN.

    Args:
      file: A file written by pack, or the name of a network in the zoo.
      repository: The repository; created if it does not exist.
      private: Make a new repository private.
    """
    find_packed(file)
    _check_hub(repository)
    print(f"pushed to {networks.push(file, repository, private=private)}")


@command
def pull(
    repository: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")
    ],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
) -> None:
    """Download a packed file and its card from a repository on the Hugging Face hub.

    The file is checked before it replaces anything.

    Args:
      repository: A repository written by push.
      output: The file to write; an existing file is replaced. Its card is OUTPUT.md.
    """
    check_output(output)
    _check_hub(repository)
    packed = networks.pull(repository, output)
    info = packed.info
    accuracy = info.test_accuracy
    print(
        f"{output}: {info.name or 'packed network'}, {output.stat().st_size:,} bytes"
        + ("" if accuracy is None else f", test accuracy {accuracy:.2%}")
    )


def _table() -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for column in ("name", "data set"):
        table.add_column(column)
    for column in ("classes", "test accuracy", "seed", "bytes"):
        table.add_column(column, justify="right")
    for card in map(networks.card, networks.names()):
        table.add_row(
            card.name,
            card.dataset,
            str(len(card.classes)),
            f"{card.test_accuracy:.2%}",
            str(card.seed),
            f"{card.bytes:,}",
        )
    return table


def _check_hub(repository: str) -> None:
    try:
        check_repository(repository)
    except ValueError as error:
        raise UsageError(error) from None
    check_backend()
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
    enable_interrupts()
