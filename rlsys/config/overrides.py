"""Applies ``section.key=value`` of a command line over a file. Nothing given there is dropped silently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlsys.config.yaml_text import NULLS, Annotation, annotation_at, is_optional_section, read_value, section_of
from rlsys.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Setting:
    path: tuple[str, ...]
    value: object
    given: str  # as on the command line


def apply(tree: dict[str, object], overrides: Sequence[str], schema: Annotation) -> None:
    """Change `tree`, which `schema` validates later. ``section={...}`` changes the keys it names, and no others.

    A later override wins: a program appends its overrides to those of the user.

    Raises:
        ConfigError: an override has another form than ``section.key=value``.
    """
    for override in overrides:
        for setting in _settings(override, schema):
            _set(tree, setting, schema)


def refuse_contradictions(overrides: Sequence[str], schema: Annotation) -> None:
    """Refuse a command line that sets a key twice: its author may have forgotten the first override.

    Raises:
        ConfigError: two overrides set a key to different values, or one has another form than ``section.key=value``.
    """
    settings: dict[tuple[str, ...], _Setting] = {}
    for override in overrides:
        for new in _settings(override, schema):
            old = settings.setdefault(new.path, new)
            if repr(old.value) != repr(new.value):
                raise ConfigError(
                    f"{'.'.join(new.path)} is given twice with different values: {old.given} and {new.given}; keep one"
                )
    for setting in settings.values():
        for length in range(1, len(setting.path)):
            outer = settings.get(setting.path[:length])
            if outer is not None and outer.value != {}:
                raise ConfigError(
                    f"{outer.given} and {setting.given} both set {'.'.join(outer.path)}; put them into one"
                )


def _settings(override: str, schema: Annotation) -> Iterator[_Setting]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: wanted section.key=value, such as rl.steps=10")
    path = tuple(key.strip().split("."))
    annotation = annotation_at(schema, path)
    # the schema reports unknown keys later, together with all other errors
    value = text if annotation is None else read_value(text, annotation, key.strip(), f"override {override!r}")
    if text.strip() in NULLS and section_of(annotation) is not None and not is_optional_section(annotation):
        raise ConfigError(f"override {override!r}: {key} is a section; wanted its keys, such as {key}={{...}}")
    yield from _pairs(path, value, annotation, override)


def _pairs(path: tuple[str, ...], value: object, annotation: Annotation, given: str) -> Iterator[_Setting]:
    """One of each key that ``section={...}`` names."""
    if section_of(annotation) is None or not isinstance(value, dict) or not value:
        yield _Setting(path, value, given)
        return
    for key, inner in value.items():
        yield from _pairs((*path, str(key)), inner, annotation_at(annotation, [str(key)]), given)


def _set(tree: dict[str, object], setting: _Setting, schema: Annotation) -> None:
    *sections, name = setting.path
    for section in sections:
        inner = tree.get(section)
        if inner is None:
            inner = tree[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {setting.given!r}: {section} is a value, not a section")
        tree = inner
    if setting.value == {} and section_of(annotation_at(schema, setting.path)) is not None:
        if tree.get(name) is None:
            tree[name] = {}
        return
    tree[name] = setting.value
