"""Sharing packed networks in repositories on the Hugging Face hub."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xnor_jax.zoo import networks
from xnor_jax.zoo.cards import Card

if TYPE_CHECKING:
    from xnor_jax.packing import PackedModel

# Names that the hub recognises.
_MODEL, _CARD, _TASK = "model.safetensors", "README.md", "image-classification"


class HubError(OSError):
    """A request to the hub that was refused, found nothing, or got no answer."""


def push(
    file: str | os.PathLike[str], repository: str, *, private: bool = False
) -> str:
    """Upload a packed file and its card, in one commit.

    The repository is created if it does not exist. The file becomes
    `model.safetensors` and the card `README.md`. The card is the zoo's for a name in
    the zoo, `FILE.md` if it is beside the file, or else made from the file's metadata.

    Args:
      file: A packed file, or the name of a network in the zoo.
      repository: `OWNER/NAME`.
      private: Whether a new repository is private.

    Returns:
      The repository's address.

    Raises:
      ValueError: If there is no such file, or `repository` is not `OWNER/NAME`.
      FormatError: If the file is not a packed network, or is damaged.
      HubError: If there is no token, or the hub refuses or cannot be reached.
      ModuleNotFoundError: If `huggingface_hub` is missing.
    """
    hub = _import_hub()
    check_repository(repository)
    path = networks.find(file)
    from xnor_jax import packing

    info = packing.load(path).info
    beside = _card_path(path)
    if not Path(file).exists():
        card = _model_card(networks.card(str(file)), repository)
    elif beside.is_file():
        card = beside.read_bytes()
    else:
        card = _model_card(Card.of(info, path.stat().st_size), repository)
    if hub.get_token() is None:
        raise HubError(
            "no token for the hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    api = hub.HfApi()
    with _hub_errors(repository):
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(
            repository,
            [
                hub.CommitOperationAdd(_MODEL, path.read_bytes()),
                hub.CommitOperationAdd(_CARD, card),
            ],
            commit_message=f"{info.name or 'A network'}, packed by xnor_jax",
        )
    return str(address)


def pull(repository: str, output: str | os.PathLike[str]) -> "PackedModel":
    """Download a packed file, and its card as `OUTPUT.md`.

    The file is checked as by `xnor_jax.load` before anything is replaced. If the
    repository has no card, one is generated from the file's metadata.

    Args:
      repository: `OWNER/NAME`, with the files that `push` uploads.
      output: The file to write; an existing file is replaced atomically.

    Returns:
      The network.

    Raises:
      ValueError: If `repository` is not `OWNER/NAME`.
      FormatError: If the repository's file is not a packed network, or is damaged.
      HubError: If there is no such repository or file, or it cannot be reached.
      OSError: If the output cannot be written.
      ModuleNotFoundError: If `huggingface_hub` is missing.
    """
    hub = _import_hub()
    check_repository(repository)
    from xnor_jax import packing
    from xnor_jax.packing.checks import LARGEST_FILE
    from xnor_jax.packing.file import replaceable

    api, path = hub.HfApi(), replaceable(output)
    with _hub_errors(repository):
        info = api.model_info(repository, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if _MODEL not in sizes:
        raise HubError(
            f"{repository} has no {_MODEL}; expected the files that push uploads"
        )
    if sizes[_MODEL] > LARGEST_FILE:
        raise packing.FormatError(
            f"{repository}: {_MODEL}: expected at most {LARGEST_FILE} bytes, got "
            f"{sizes[_MODEL]}"
        )
    # In the output's folder: a file is replaced atomically only within one file system.
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as folder:

        def download(name: str) -> Path:
            with _hub_errors(repository):
                found = api.hf_hub_download(
                    repository, name, revision=info.sha, local_dir=folder
                )
            return Path(found)

        model = download(_MODEL)
        try:
            packed = packing.load(model)
        except packing.FormatError as error:
            reason = str(error).removeprefix(f"{model}: ")
            raise packing.FormatError(f"{repository}: {_MODEL}: {reason}") from error
        if _CARD in sizes:
            card = download(_CARD)
        else:
            card = Path(folder, _CARD)
            made = Card.of(packed.info, model.stat().st_size)
            card.write_bytes(_model_card(made, repository))
        model.replace(path)
        card.replace(_card_path(path))
    return packed


def check_repository(repository: str) -> None:
    """Check that a repository's name is valid.

    Raises:
      ValueError: If it is not `OWNER/NAME`.
      ModuleNotFoundError: If `huggingface_hub` is missing.
    """
    valid = isinstance(repository, str) and repository.count("/") == 1
    if valid:
        hub = _import_hub()
        try:
            hub.utils.validate_repo_id(repository)
        except hub.errors.HFValidationError:
            valid = False
    if not valid:
        raise ValueError(f"repository: expected OWNER/NAME, got {repository!r}")


def _card_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.md")


def _model_card(card: Card, repository: str) -> bytes:
    """Format a card for the hub: Markdown below YAML metadata for the hub's search."""
    hub = _import_hub()
    from xnor_jax.data import SOURCES

    source = SOURCES.get(card.dataset or "")
    results = []
    if card.dataset is not None and card.test_accuracy is not None:
        results = [
            hub.EvalResult(
                task_type=_TASK,
                dataset_type=(source and source.hub) or card.dataset,
                dataset_name=card.dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=card.test_accuracy,
            )
        ]
    data = hub.ModelCardData(
        license=card.license,
        library_name="xnor_jax",
        pipeline_tag=_TASK,
        tags=["binary-neural-network", "xnor-net"],
        datasets=[source.hub] if source and source.hub else None,
        model_name=card.name,
        eval_results=results or None,
    )
    name = repository.partition("/")[2]
    commands = (
        "pip install 'xnor-jax[train]'",
        f"xnor-jax pull {repository} -o {name}.safetensors",
        f"xnor-jax predict {name}.safetensors IMAGE",
    )
    use = "\n".join(["```bash", *commands, "```"])
    return f"---\n{data.to_yaml()}\n---\n\n{card}\n\n{use}\n".encode()


def _import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {error.name} is missing; install it with pip install "
            "'xnor-jax[train]'",
            name=error.name,
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Convert the exceptions of the hub's client to a HubError of one line."""
    errors = _import_hub().errors
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"no repository {repository}, or your token has no access to it"
        ) from error
    except errors.HfHubHTTPError as error:
        reason = error.server_message or error
        raise HubError(
            f"{repository}: the hub refused with status "
            f"{error.response.status_code}: {_one_line(reason)}"
        ) from error
    except ValueError as error:  # the card's metadata
        raise HubError(f"{repository}: the hub refused: {_one_line(error)}") from error
    except Exception as error:  # the client raises exceptions of any type
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from a local file
        raise HubError(
            f"{repository}: the hub cannot be reached: "
            f"{_one_line(error.__cause__ or error)}"
        ) from error


def _one_line(words: object) -> str:
    return " ".join(str(words).split())[:200]
