"""A base model on the node of the actor that needs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rlsys.errors import ConfigError
from rlsys.modeling.base_model import unpack_folder

Base = (
    str | Mapping[str, bytes]
)  # a folder or hub name that every node can read, or a packed folder that came through Ray
WANTED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
]  # no pickles, no other formats' copies of the weights


@contextmanager
def local_folder(base: Base) -> Iterator[Path]:
    """The folder to load the base from; a packed one is unpacked until the block ends, since it is in memory by then.

    Raises:
        ConfigError: model.path is neither a folder of this node nor a model that the hub gives, or holds no model that
            can be trained.
    """
    if isinstance(base, str):
        folder = Path(base) if Path(base).is_dir() else _download(base)
        from rlsys.planning.model_folder import check_files  # brings transformers, which clients do without until here

        check_files(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rlsys-base-") as scratch:
        unpack_folder(base, Path(scratch) / "base")
        yield Path(scratch) / "base"


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path: {name!r} is no folder on this node, and the Hugging Face hub does not give it: "
            f"{str(error).splitlines()[0]}"
        ) from None
