"""Reads YAML as its author meant it: no key is dropped and no text is converted silently.

A pydantic schema decides the type of a scalar without quotes: where a text is wanted, ``yes``, ``null``, ``1e-4`` and
``2026-02-03`` are that text; where a number is wanted, ``1e-4`` is a number and ``yes`` is an error. Plain PyYAML
keeps the last of two equal keys and guesses types by YAML 1.1: ``010`` is 8, ``1:30`` is 90, and ``1e-4`` is a text.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from rlsys.errors import ConfigError

Annotation: TypeAlias = object  # a type as typing writes it: a class, a union, Annotated, Literal
TAG = "tag:yaml.org,2002:"
NULLS = ("", "~", "null", "Null", "NULL")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """Numbers are those of YAML 1.2, and a date is a text."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes round a text that `_Loader` or a reader of YAML 1.1 would take for something else."""


def _set_resolvers() -> None:
    guessed = {TAG + name for name in ("int", "float", "timestamp")}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in guessed]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for resolver in (_Loader, _Dumper):
        resolver.add_implicit_resolver(TAG + "int", _whole(_INT), list("-+0123456789"))
        resolver.add_implicit_resolver(TAG + "float", _whole(_FLOAT), list("-+.0123456789"))


def _whole(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """PyYAML asks with match()."""
    return re.compile(rf"(?:{pattern.pattern})\Z")


_set_resolvers()


def read(text: str, schema: Annotation, source: str) -> object:
    """The tree of a YAML text, to be validated by `schema`.

    Raises:
        ConfigError: no YAML, a key given twice, or one that a merge (``<<``) would drop; with its line.
    """
    return _parsed(text, schema, source)


def read_value(text: str, annotation: Annotation, key: str, source: str) -> object:
    """The value of ``key=value`` on a command line. A text stays unchanged, unless all of it is in quotes.

    Raises:
        ConfigError: no YAML, or a part of it would be dropped as a comment.
    """
    if wants_text(annotation):
        return _text_value(text, optional=_optional(annotation))
    return _parsed(text, annotation, source, key)


def dump(tree: Mapping[str, object]) -> str:
    """YAML that `read` turns back into the same values, with or without a schema."""
    return str(yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False))


def read_json(text: str | bytes, source: str) -> Any:
    """Any: as json.loads.

    Raises:
        ConfigError: a name stands twice in one object, with different values.
        ValueError: no JSON.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in pairs:
            if repr(found.setdefault(name, value)) != repr(value):
                raise ConfigError(f"{source}: {name!r} is given twice in one object: {found[name]!r} and {value!r}")
        return found

    return json.loads(text, object_pairs_hook=unique)


def section_of(annotation: Annotation) -> type[BaseModel] | None:
    """The section that a key holds."""
    return next(
        (kind for kind in _alternatives(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)), None
    )


def annotation_at(schema: Annotation, path: Sequence[str]) -> Annotation:
    """Of the key or place that `path` leads to; None: there is none."""
    for part in path:
        schema = _inside(schema, part)
    return schema


def wants_text(annotation: Annotation) -> bool:
    kinds = _alternatives(annotation)
    return bool(kinds) and all(
        kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))
        for kind in kinds
    )


def is_optional_section(annotation: Annotation) -> bool:
    return section_of(annotation) is not None and _optional(annotation)


def _optional(annotation: Annotation) -> bool:
    return type(None) in _union(annotation)


def _union(annotation: Annotation) -> tuple[Annotation, ...]:
    """The members of a union, or the annotation alone."""
    if get_origin(annotation) is Annotated:
        return _union(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _union(member))
    return (annotation,)


def _alternatives(annotation: Annotation) -> list[Annotation]:
    return [kind for kind in _union(annotation) if kind is not type(None)]


def _wants_number(annotation: Annotation) -> bool:
    kinds = _alternatives(annotation)
    return bool(kinds) and all(kind in (int, float) for kind in kinds)


def _inside(annotation: Annotation, key: str) -> Annotation:
    """The annotation of a section's key, or of what a dict or a list holds; Any of a dict of anything."""
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(key)
            return None if field is None else field.annotation
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if get_origin(kind) is list:
            return get_args(kind)[0]
        if kind is Any:
            return Any
    return None


def _text_value(text: str, *, optional: bool) -> str | None:
    if optional and text.strip() in NULLS:
        return None
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError:
        return text
    if not isinstance(node, yaml.ScalarNode) or node.style is None or node.tag != TAG + "str":
        return text
    before, after = text[: node.start_mark.index], text[node.end_mark.index :]
    return text if (before + after).strip() else str(node.value)


def _parsed(text: str, schema: Annotation, source: str, override: str = "") -> object:
    """`override`: the key, where the text is the value of one on a command line."""
    hint = _quoted(text, schema, override) if override else ""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if override and (text if node is None else text[node.end_mark.index :]).strip():
            raise ConfigError(f"{source}: everything after '#' would be dropped as a comment{hint}")
        return None if node is None else _Reader(loader, source, override).value(node, schema, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        why = ", ".join(said for said in (error.context, error.problem) if said)
        raise ConfigError(f"{source}: {place}is not valid YAML: {why}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply") from None


def _quoted(text: str, annotation: Annotation, key: str) -> str:
    """How a text is given to a key that takes texts among other things."""
    quoted = json.dumps(text, ensure_ascii=False)
    if wants_text(_inside(annotation, "")):
        return f"; a list of texts is written as {shlex.quote(f'{key}=[{quoted}]')}"
    return f"; a text is written as {shlex.quote(f'{key}={quoted}')}" if Any in _alternatives(annotation) else ""


class _Reader:
    """Builds values from the nodes of one text."""

    def __init__(self, loader: _Loader, source: str, override: str) -> None:
        self._loader, self._source, self._override = loader, source, override
        self._open: list[yaml.Node] = []  # from the top to where the reader is

    def value(self, node: yaml.Node, annotation: Annotation, where: tuple[str, ...]) -> object:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, annotation, where)
        if node in self._open:
            raise self._refused(node, where, "holds itself")
        if wants_text(annotation):
            raise self._refused(
                node, where, "found a list or a mapping; wanted a text: one that begins with [ or { needs quotes"
            )
        if node.tag not in (TAG + "map", TAG + "seq"):
            raise self._refused(node, where, f"found the tag {node.tag}; wanted a plain list or mapping")
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [
                    self.value(item, _inside(annotation, ""), (*where, str(i))) for i, item in enumerate(node.value)
                ]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, annotation, where)
        finally:
            self._open.pop()

    def _scalar(self, node: yaml.ScalarNode, annotation: Annotation, where: tuple[str, ...]) -> object:
        plain = node.style is None
        if plain and node.value in NULLS and (node.value == "" or _optional(annotation) or not wants_text(annotation)):
            empty = section_of(annotation) is not None and not _optional(annotation)
            return {} if empty else None  # a section without keys, such as a section whose keys are commented out
        if plain and (wants_text(annotation) or (_wants_number(annotation) and node.tag == TAG + "bool")):
            return node.value
        try:
            value = self._loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise self._refused(node, where, f"found {node.value!r}: {error}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise self._refused(node, where, f"found {node.value}; wanted a finite number")
        return value

    def _mapping(
        self, node: yaml.MappingNode, annotation: Annotation, where: tuple[str, ...]
    ) -> dict[Hashable, object]:
        """Its own keys, and below them those that it merges."""
        own: dict[Hashable, object] = {}
        lines: dict[Hashable, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            key = "<<" if key_node.tag == TAG + "merge" else self._key(key_node, annotation, where)
            at = (*where, str(key))
            if key in lines:
                raise self._refused(
                    key_node, at, f"given twice, first in line {lines[key]}; keep one, or put both into one"
                )
            lines[key] = _line(key_node)
            if key_node.tag == TAG + "merge":
                merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                own[key] = self.value(value_node, _inside(annotation, str(key)), at)
        for brought in merged:
            if not isinstance(brought, yaml.MappingNode) or brought in self._open:
                raise self._refused(brought, (*where, "<<"), "wanted a mapping, or a list of mappings, to merge")
            inherited = self.value(brought, annotation, where)
            assert isinstance(inherited, dict), "the value of a mapping"
            for key, value in inherited.items():
                at = (*where, str(key))
                if key not in own:
                    own[key] = value
                elif section_of(_inside(annotation, str(key))) and (lost := sorted(_leaves(value) - _leaves(own[key]))):
                    raise self._refused(
                        brought, at, f"<< does not merge inside a section, so {', '.join(lost)} would be lost; write "
                        f"<< inside {'.'.join(at)} too"
                    )  # fmt: skip
        return own

    def _key(self, node: yaml.Node, annotation: Annotation, where: tuple[str, ...]) -> object:
        if not isinstance(node, yaml.ScalarNode):
            raise self._refused(node, where, "found a list or a mapping as a key; wanted a text")
        if any(kind is Any for kind in _alternatives(annotation)) and node.style is None:
            return self._scalar(node, Any, where)
        return node.value

    def _refused(self, node: yaml.Node, where: tuple[str, ...], why: str) -> ConfigError:
        key = ".".join((self._override, *where) if self._override else where)
        place = "" if self._override else f"line {_line(node)}: "
        return ConfigError(f"{self._source}: {place}{key}{': ' if key else ''}{why}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _leaves(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return {leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key))}
