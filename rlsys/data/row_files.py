"""Reads the rows of one file without type inference: values are exactly those in the file.

    JSON      strings unchanged; numbers digit for digit
    CSV       every cell is a string; an empty cell is a missing value
    Parquet   the types that the file declares

A row is a mapping of column names to values; numbers are int or Decimal, missing values None.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from rlsys.errors import ConfigError
from rlsys.utils.shell_paths import command
from rlsys.utils.text_files import LFS_POINTER, decode, first_line

if TYPE_CHECKING:
    import pyarrow

Row = Mapping[str, object]
Convert = Callable[[object], object]

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".ndjson": "json",
    ".tsv": "tsv",
}
_UNPACK: dict[str, Callable[[Path, Literal["rb"]], io.BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_MAX_INT_DIGITS = 30  # integers with an exponent and up to this many digits become int
_MAX_DIGITS = 4000  # longer integers stay Decimal: Python refuses to convert an int of more than 4300 digits to text


def format_of(name: str) -> str | None:
    """Return the format of a file by its name; None if this module cannot read it."""
    path = Path(name)
    return FORMATS.get((Path(path.stem) if path.suffix in _UNPACK else path).suffix.lower())


def read_file(path: Path, roots: Sequence[str], where: str, name: str = "") -> Iterator[Row]:
    """Yield the rows of a file.

    `roots`: top-level columns to read; other columns may be None. `where`: prefix of error messages. `name`: original
    file name if `path` is a cached copy under another name.

    Raises:
        ConfigError: the file cannot be read or decoded; the message names the line or row.
    """
    kind = format_of(name or path.name)
    assert kind is not None
    try:
        with _opened(path, name) as stream:
            start = stream.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise ConfigError(
                    f"{where}: is a Git LFS pointer, not the data itself; run "
                    f"`{command('git', '-C', path.parent, 'lfs', 'pull')}`"
                )
            stream.seek(0)
            yield from _READERS[kind](stream, roots, where)
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}; copy or download the file again") from error
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}") from error


def number(written: str) -> int | Decimal | str:
    """Parse a number exactly: int if it is an integer, such as 7.0, else Decimal.

    Returns the text itself if Decimal cannot represent its exponent.
    """
    try:
        value = Decimal(written)
    except InvalidOperation:
        return written
    if not value.is_finite() or value.adjusted() >= _MAX_DIGITS:
        return value
    if value == value.to_integral_value() and (value.adjusted() < _MAX_INT_DIGITS or written.lstrip("-").isdigit()):
        return int(value)
    return value


def _opened(path: Path, name: str) -> io.BufferedIOBase:
    unpack = _UNPACK.get(Path(name or path.name).suffix)
    stream: io.BufferedIOBase = path.open("rb") if unpack is None else unpack(path, "rb")
    return stream


def _json(stream: io.BufferedIOBase, roots: Sequence[str], where: str) -> Iterator[Row]:
    """Read JSON: one object per line, or a list of objects."""
    start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    stream.seek(0)
    if start.startswith(b"["):
        return _json_list(stream, where)
    return _json_lines(stream, where)


def _json_lines(stream: io.BufferedIOBase, where: str) -> Iterator[Row]:
    for line_number, line in enumerate(stream, 1):
        text = decode(line, where, line_number).rstrip("\r\n")
        if not text.strip():
            continue
        try:
            row = _parsed(text, where, line_number)
        except ConfigError:
            _refuse_one_object(stream, where)
            raise
        if not isinstance(row, dict):
            raise ConfigError(f"{where}, line {line_number}: found {_kind(row)}; wanted an object, such as {_EXAMPLE}")
        yield row


def _refuse_one_object(stream: io.BufferedIOBase, where: str) -> None:
    """Raise ConfigError if the file is a single object over several lines, so that no line by itself is JSON."""
    stream.seek(0)
    try:
        content = json.loads(stream.read(), object_pairs_hook=_object)
    except (ValueError, RecursionError, _DuplicateKeyError):
        return
    names = ", ".join(list(content)[:8]) if isinstance(content, dict) else ""
    raise ConfigError(
        f"{where}: is a single JSON object{f' with the keys {names}' if names else ''}; wanted a list of objects, or "
        "one object per line"
    )


def _json_list(stream: io.BufferedIOBase, where: str) -> Iterator[Row]:
    rows = _parsed(decode(stream.read(), where), where)
    assert isinstance(rows, list), "the text begins with ["
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{where}, element {i}: found {_kind(row)}; wanted an object, such as {_EXAMPLE}")
        yield row


_EXAMPLE = '{"question": "1 + 1?", "answer": "2"}'


def _parsed(text: str, where: str, first_line: int = 1) -> object:
    try:
        return json.loads(text, parse_int=number, parse_float=number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ConfigError(f"{where}, line {line}: is not valid JSON: {error.msg} (column {error.colno})") from None
    except _DuplicateKeyError as error:
        raise ConfigError(f"{where}, line {first_line}: the key {error.args[0]!r} occurs twice in one object") from None
    except RecursionError:
        raise ConfigError(f"{where}, line {first_line}: is nested too deeply to be read") from None


class _DuplicateKeyError(Exception):
    """An object has a key twice; Python's parser would silently drop the first value."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return fields


def _csv(stream: io.BufferedIOBase, roots: Sequence[str], where: str, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # 128 KiB by default
    text = io.StringIO(decode(stream.read(), where), newline="")
    reader = csv.reader(
        text, delimiter=delimiter, strict=True
    )  # without strict, an open quote swallows the rows after it
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = cells
                _refuse_duplicate_columns(header, roots, where)
                continue
            if len(cells) > len(header):
                raise ConfigError(
                    f"{where}, line {reader.line_num}: found {len(cells)} cells, but the header has {len(header)} "
                    'columns; wanted quotes around each cell that contains a comma, such as "1,500"'
                )
            cells += [""] * (len(header) - len(cells))
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ConfigError(f"{where}, line {reader.line_num}: is not valid CSV: {error}") from None


def _parquet(stream: io.BufferedIOBase, roots: Sequence[str], where: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        schema = file.schema_arrow
        _refuse_duplicate_columns(schema.names, roots, where)
        wanted = [name for name in schema.names if name in roots]
        others = dict.fromkeys(name for name in schema.names if name not in roots)
        convert = {name: _exact(schema.field(name).type) for name in wanted}
        first = 0
        for batch in file.iter_batches(columns=wanted) if wanted else iter(()):
            columns = {name: _values(batch.column(name), convert[name], name, first, where) for name in wanted}
            first += batch.num_rows
            yield from (
                dict(zip(columns, cells, strict=True)) | others for cells in zip(*columns.values(), strict=True)
            )
        if not wanted and file.metadata.num_rows:
            yield dict.fromkeys(schema.names)  # the caller's error message lists the names
    except pyarrow.ArrowException as error:
        raise ConfigError(
            f"{where} cannot be read: the file is not Parquet or is damaged: {first_line(error)}"
        ) from error


def _values(column: pyarrow.Array, convert: Convert, name: str, first: int, where: str) -> list[object]:
    """Return the column's values as Python objects; `first` is the row number of the first value."""
    try:
        return [convert(value) for value in column.to_pylist()]
    except (ValueError, OverflowError):
        pass  # some value cannot be converted; the loop below identifies it
    for i, value in enumerate(column):
        try:
            value.as_py()
        except (ValueError, OverflowError) as error:
            raise ConfigError(
                f"{where}, row {first + i}: column {name} cannot be decoded: {first_line(error)}"
            ) from None
    raise AssertionError("to_pylist fails only if as_py of one value fails")


def _exact(kind: pyarrow.DataType) -> Convert:
    """Return the function that converts pyarrow's Python value of this type to the value in the file.

    A float becomes the shortest decimal that rounds to it in its own width: float32 0.1 is 0.1, not 0.10000000149.
    """
    from pyarrow import types

    if types.is_floating(kind):
        width = {16: np.float16, 32: np.float32, 64: np.float64}[kind.bit_width]
        return lambda value: None if value is None else number(str(width(cast(float, value))))
    if types.is_dictionary(kind):
        return _exact(kind.value_type)
    if types.is_struct(kind):
        inner = {kind.field(i).name: _exact(kind.field(i).type) for i in range(kind.num_fields)}
        return partial(_of_struct, inner)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return partial(_of_list, _exact(kind.value_type))
    return lambda value: value


def _of_struct(inner: Mapping[str, Convert], value: object) -> object:
    if value is None:
        return None
    assert isinstance(value, Mapping)
    return {name: inner[name](part) for name, part in value.items()}


def _of_list(inner: Convert, value: object) -> object:
    if value is None:
        return None
    assert isinstance(value, list)
    return [inner(part) for part in value]


def _refuse_duplicate_columns(names: Sequence[str], roots: Sequence[str], where: str) -> None:
    for name in roots:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: has {names.count(name)} columns named {name!r}; wanted distinct column names")


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"


_READERS: dict[str, Callable[[io.BufferedIOBase, Sequence[str], str], Iterator[Row]]] = {
    "json": _json,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "parquet": _parquet,
}
