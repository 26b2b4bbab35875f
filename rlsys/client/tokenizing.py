"""Loads a deployment's tokenizer in the client's process from the files in `About`, without shared files or network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.client.backend import About
from rlsys.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_loaded: dict[str, PreTrainedTokenizerBase] = {}


def tokenizer_of(about: About) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, loaded with transformers.

    Raises:
        ConfigError: the base has no tokenizer files.
    """
    if about.folder not in _loaded:
        _loaded[about.folder] = _load(about)
    return _loaded[about.folder]


def has_tokenizer(about: About) -> bool:
    return any(name.startswith(("tokenizer", "vocab")) for name in about.tokenizer)


def _load(about: About) -> PreTrainedTokenizerBase:
    from rlsys.tokenization.stop_conditions import load_tokenizer

    if not has_tokenizer(about):
        raise ConfigError(f"{about.base_model} has no tokenizer files; found {sorted(about.tokenizer)}")
    with tempfile.TemporaryDirectory(prefix="rlsys-tokenizer-") as scratch:
        for name, content in about.tokenizer.items():
            (Path(scratch) / name).write_bytes(content)
        return load_tokenizer(Path(scratch))
