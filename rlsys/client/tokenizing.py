"""A deployment's tokenizer at the caller, from the files that came with it: no shared file system, no network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rlsys.client.backend import About
from rlsys.errors import ConfigError

_loaded: dict[str, Any] = {}


def tokenizer_of(about: About) -> Any:
    """The base model's tokenizer as transformers loads it.

    Raises:
        ConfigError: the base has none.
    """
    if about.folder not in _loaded:
        _loaded[about.folder] = _load(about)
    return _loaded[about.folder]


def _load(about: About) -> Any:
    from rlsys.tokenization.stop_conditions import load_tokenizer

    if not any(name.startswith(("tokenizer", "vocab")) for name in about.tokenizer):
        raise ConfigError(f"{about.base_model} has no tokenizer files; found {sorted(about.tokenizer)}")
    with tempfile.TemporaryDirectory(prefix="rlsys-tokenizer-") as scratch:
        for name, content in about.tokenizer.items():
            (Path(scratch) / name).write_bytes(content)
        return load_tokenizer(Path(scratch))
