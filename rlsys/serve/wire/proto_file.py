"""Reads a ``.proto`` file into a `FileDescriptorProto`, so that no generated code is needed.

Covers what ``messages.proto`` uses of proto3: top-level messages and enums; fields that are plain, ``repeated``,
``optional``, in a ``oneof`` or a ``map``; ``//`` comments. Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

_SCALARS = {
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
}
_TOKEN = re.compile(r'"[^"]*"|[A-Za-z_][\w.]*|\d+|[{}=;<>,]')


def read_proto(text: str, name: str) -> FileDescriptorProto:
    """The file's descriptor; `name` is its name in the descriptor pool.

    Raises:
        ValueError: the file uses something that this reader does not know.
    """
    found = FileDescriptorProto(name=name, syntax="proto3")
    tokens = iter(_TOKEN.findall(re.sub(r"//[^\n]*", "", text)))
    for token in tokens:
        match token:
            case "syntax":
                _expect(tokens, "=", '"proto3"', ";")
            case "package":
                found.package = next(tokens)
                _expect(tokens, ";")
            case "enum":
                _read_enum(tokens, found)
            case "message":
                _read_message(tokens, found)
            case _:
                raise ValueError(f"{name}: found {token!r}; wanted syntax, package, enum or message")
    _set_kinds(found)
    return found


def _read_enum(tokens: Iterator[str], found: FileDescriptorProto) -> None:
    enum = found.enum_type.add(name=next(tokens))
    _expect(tokens, "{")
    for token in tokens:
        if token == "}":
            return
        _expect(tokens, "=")
        # Names of enum values share one namespace per file.
        enum.value.add(name=f"{enum.name}_{token}", number=int(next(tokens)))
        _expect(tokens, ";")


def _read_message(tokens: Iterator[str], found: FileDescriptorProto) -> None:
    message = found.message_type.add(name=next(tokens))
    prefix = f".{found.package}.{message.name}"
    _expect(tokens, "{")
    oneof: int | None = None
    for token in tokens:
        if token == "}" and oneof is None:
            return
        if token == "}":
            oneof = None
        elif token == "oneof":
            oneof = len(message.oneof_decl)
            message.oneof_decl.add(name=next(tokens))
            _expect(tokens, "{")
        elif token == "map":
            _read_map(tokens, message, prefix)
        elif token in ("repeated", "optional"):
            field = _read_field(tokens, message, next(tokens))
            if token == "repeated":
                field.label = FieldDescriptorProto.LABEL_REPEATED
            else:  # proto3 keeps presence of an optional field in a oneof that holds it alone
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field.name}")
        else:
            field = _read_field(tokens, message, token)
            if oneof is not None:
                field.oneof_index = oneof


def _read_field(tokens: Iterator[str], message: DescriptorProto, kind: str) -> FieldDescriptorProto:
    field = message.field.add(name=next(tokens), label=FieldDescriptorProto.LABEL_OPTIONAL)
    _expect(tokens, "=")
    field.number = int(next(tokens))
    _expect(tokens, ";")
    _set_type(field, kind)
    return field


def _read_map(tokens: Iterator[str], message: DescriptorProto, prefix: str) -> None:
    """A map is a repeated message of key and value."""
    _expect(tokens, "<")
    key = next(tokens)
    _expect(tokens, ",")
    value = next(tokens)
    _expect(tokens, ">")
    field = _read_field(tokens, message, key)
    entry = message.nested_type.add(name="".join(part.capitalize() for part in field.name.split("_")) + "Entry")
    entry.options.map_entry = True
    for number, (name, kind) in enumerate((("key", key), ("value", value)), start=1):
        _set_type(entry.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL), kind)
    field.label = FieldDescriptorProto.LABEL_REPEATED
    field.type = FieldDescriptorProto.TYPE_MESSAGE
    field.type_name = f"{prefix}.{entry.name}"


def _set_type(field: FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind


def _set_kinds(found: FileDescriptorProto) -> None:
    """Complete the names of messages and enums, which may stand after their use."""
    enums = {enum.name for enum in found.enum_type}
    messages = {message.name for message in found.message_type}
    fields = [field for message in found.message_type for field in message.field]
    fields += [field for message in found.message_type for entry in message.nested_type for field in entry.field]
    for field in fields:
        if not field.type_name or field.type_name.startswith("."):
            continue
        if field.type_name not in enums | messages:
            raise ValueError(
                f"{found.name}: found the type {field.type_name!r}; wanted a scalar or a type of this file"
            )
        is_enum = field.type_name in enums
        field.type = FieldDescriptorProto.TYPE_ENUM if is_enum else FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{found.package}.{field.type_name}"


def _expect(tokens: Iterator[str], *wanted: str) -> None:
    for each in wanted:
        token = next(tokens, "the end of the file")
        if token != each:
            raise ValueError(f"found {token!r}; wanted {each!r}")
