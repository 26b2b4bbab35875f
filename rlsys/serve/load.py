"""Reads a server's YAML and ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rlsys.config import yaml_text
from rlsys.config.overrides import apply, refuse_contradictions
from rlsys.errors import ConfigError
from rlsys.serve.config import ServeConfig
from rlsys.utils.text_files import read_text


def load_serve_config(path: Path | None, overrides: Sequence[str], base: Mapping[str, Any]) -> ServeConfig:
    """The configuration of a file (None: none), over which `base` and then `overrides` are laid.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value out of range.
    """
    source = "rlsys serve" if path is None else str(path)
    refuse_contradictions(overrides, ServeConfig)
    tree: Any = {} if path is None else yaml_text.read(read_text(path, source), ServeConfig, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: found {type(tree).__name__} at the top; wanted sections such as 'models:'")
    for key, value in base.items():
        tree[key] = {**(tree.get(key) or {}), **value} if isinstance(value, dict) else value
    apply(tree, overrides, ServeConfig)
    if not tree.get("models"):
        raise ConfigError(
            f"{source}: models: found none; give --model FOLDER_OR_NAME, or a YAML with models: {{name: folder}}"
        )
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(detail)}" for detail in error.errors())) from None


def _explain(detail: Mapping[str, Any]) -> str:
    where = [str(part) for part in detail["loc"]]
    dotted = ".".join(where) or "top"
    if detail["type"] == "extra_forbidden":
        keys = _keys(where[:-1])
        close = difflib.get_close_matches(where[-1], keys, n=1, cutoff=0.6)
        nearest = f"did you mean {close[0]!r}? It" if close else "it"
        return f"{dotted} is no key of {'.'.join(where[:-1]) or 'a server'!r}; {nearest} takes {', '.join(keys)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" or isinstance(detail["input"], dict):
        return f"{dotted}: {message}"
    return f"{dotted}: found {detail['input']!r}; {message[0].lower()}{message[1:]}"


def _keys(where: Sequence[str]) -> list[str]:
    section: type[BaseModel] = ServeConfig
    for part in where:
        if part not in section.model_fields:  # a name in a table, such as a model's
            continue
        annotation = section.model_fields[part].annotation
        kinds = getattr(annotation, "__args__", (annotation,))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)
