"""Reads a job from YAML and ``section.key=value`` overrides; refuses unknown keys with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlsys.config import yaml_text
from rlsys.config.job import JobConfig
from rlsys.config.overrides import apply, refuse_contradictions
from rlsys.config.replaced_keys import replacement
from rlsys.config.yaml_text import Annotation
from rlsys.errors import ConfigError
from rlsys.utils.text_files import read_text

REQUIRED = {
    "run": "; give every run a name, such as run: {name: first}",
    "run.name": "; such as run.name=first",
    "model": "; such as model: {path: Qwen/Qwen3-0.6B}, or model: {make: {}} for a model trained from scratch",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a YAML file and ``section.key=value`` overrides describe.

    Raises:
        ConfigError: no such file, not UTF-8, no YAML, an unknown key (with the nearest right one), or a value out of
            range.
    """
    text = read_text(Path(path), str(path))
    return parse_config(text, overrides, source=str(path))


def load_command(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """``load_config`` of a command line, which also refuses a key given twice with different values."""
    refuse_contradictions(overrides, JobConfig)
    return load_config(path, overrides)


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "config") -> JobConfig:
    """``load_config`` from text; `source` is what messages call it."""
    tree = yaml_text.read(text, JobConfig, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: found {type(tree).__name__} at the top; wanted sections such as 'run:'")
    apply(tree, overrides, JobConfig)
    return validated(tree, source)


def validated(tree: Mapping[str, object], source: str) -> JobConfig:
    """
    Raises:
        ConfigError: the tree is no job; one line per wrong key.
    """
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(detail)}" for detail in error.errors())) from None


def dump_config(config: JobConfig) -> str:
    """The job as YAML with all defaults, as a run directory keeps it."""
    return yaml_text.dump(config.model_dump(mode="json"))


def keys(section: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a job may set."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from keys(inner, f"{prefix}{name}.")


def _explain(detail: ErrorDetails) -> str:
    """One line: which key, what was found, what would be right."""
    where = [str(part) for part in detail["loc"]]
    dotted = ".".join(where)
    if detail["type"] == "extra_forbidden":
        return f"{dotted} is no key of {'.'.join(where[:-1]) or 'a job'!r}; {replacement(dotted) or _nearest(where)}"
    if detail["type"] == "missing":
        return f"{dotted} is required{REQUIRED.get(dotted, '')}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" or isinstance(detail["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    found = "nothing" if detail["input"] is None else repr(detail["input"])
    return f"{dotted}: found {found}; {message[0].lower()}{message[1:]}"


def _nearest(where: Sequence[str]) -> str:
    section: type[BaseModel] = JobConfig
    for part in where[:-1]:
        if part in section.model_fields:  # what is no key is a place in a list
            section = _section_of(section.model_fields[part].annotation) or section
    siblings = list(section.model_fields)
    close = difflib.get_close_matches(where[-1], siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}? It takes {', '.join(siblings)}"
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == where[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}? {'.'.join(where[:-1]) or 'A job'} takes {', '.join(siblings)}"
    return f"it takes {', '.join(siblings)}"


def _section_of(annotation: Annotation) -> type[BaseModel] | None:
    """The section that a key holds, alone or in a list."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
