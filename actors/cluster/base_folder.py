"""Makes the base model available as a local folder on an actor's node."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rlsys.errors import ConfigError
from rlsys.utils.packed_folder import unpack_folder

Base = (
    str | Mapping[str, bytes]
)  # a folder or hub name that every node can read, or a packed folder sent through Ray's object store
WANTED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
]  # excludes pickles and copies of the weights in other formats


@contextmanager
def local_folder(base: Base) -> Iterator[Path]:
    """Yield the folder to load the base from. A packed base is unpacked into a temporary folder, which is deleted when
    the block ends: by then the weights are loaded.

    Raises:
        ConfigError: model.path is neither a folder on this node nor a model that the hub provides, or its model cannot
            be trained.
    """
    if isinstance(base, str):
        folder = Path(base) if Path(base).is_dir() else _download(base)
        from rlsys.planning.model_folder import check_files  # imports transformers, which clients do not need before

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
            f"model.path: {name!r} is not a folder on this node, and the Hugging Face hub does not provide it: "
            f"{str(error).splitlines()[0]}"
        ) from None
