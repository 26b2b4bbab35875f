"""Arrays from bytes and JSON lists, with every length checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlsys.serve.errors import bad_request
from rlsys.serve.wire import messages
from rlsys.types import Array

MAX_COLUMNS = 1024  # K of an (N, K) input
_DTYPES: dict[int, np.dtype[Any]] = {
    messages.FLOAT32: np.dtype("<f4"),
    messages.INT64: np.dtype("<i8"),
    messages.INT32: np.dtype("<i4"),
    messages.BFLOAT16: np.dtype("<u2"),
}
_NAMES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}


def tokens_of(data: bytes, where: str) -> Array:
    """(N,) int32 token ids of a chunk."""
    if len(data) % 4:
        raise bad_request(f"{where}: found {len(data)} bytes of token ids; wanted a multiple of 4 (int32)")
    return np.frombuffer(data, "<i4")


def from_message(tensor: Any, rows: int, where: str) -> Array:  # Any: a protobuf class made at run time
    """The tensor as (rows,), (rows, K), or as it is where it has one value."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise bad_request(
            f"{where}: found dtype {tensor.dtype}; wanted 1 (float32), 2 (int64), 3 (int32) or 4 (bfloat16)"
        )
    shape = list(tensor.shape)
    encoding = tensor.WhichOneof("encoding")
    if encoding == "sparse_csr":
        csr = tensor.sparse_csr
        values = _values(csr.values, dtype, where)
        crow = _values(csr.crow_indices, np.dtype("<i8"), f"{where}: crow_indices")
        columns = _values(csr.col_indices, np.dtype("<i8"), f"{where}: col_indices")
        return dense_of(values, crow, columns, shape, rows, where)
    return _shaped(_values(tensor.dense, dtype, where), shape, where)


def from_json(data: Any, dtype: str, shape: Sequence[int] | None, where: str) -> Array:  # Any: a list of JSON
    """The flat JSON list as an array; `shape` None: one dimension."""
    if dtype not in _NAMES:
        raise bad_request(f"{where}: found dtype {dtype[:40]!r}; wanted 'float32' or 'int64'")
    array = flat_numbers(data, where)
    if dtype == "int64" and array.dtype.kind == "f":
        raise bad_request(f"{where}: found numbers with a fraction; wanted whole numbers for dtype 'int64'")
    return _shaped(array, list(shape) if shape is not None else [len(array)], where)


def flat_numbers(data: Any, where: str) -> Array:  # Any: as above
    """A JSON list of numbers as int64 or float64."""
    if not isinstance(data, list):
        raise bad_request(f"{where}: found a {type(data).__name__}; wanted a flat list of numbers")
    try:
        array = np.array(data) if data else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        array = np.zeros(0, object)
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise bad_request(
            f"{where}: found values that are no numbers, or lists in lists; wanted a flat list of numbers"
        )
    return array


def dense_of(values: Array, crow: Array, columns: Array, shape: Sequence[int], rows: int, where: str) -> Array:
    """(rows, K) from compressed sparse rows; cells that are not listed are 0."""
    if len(shape) != 2 or shape[0] != rows or not 0 < shape[1] <= MAX_COLUMNS:
        raise bad_request(f"{where}: found shape {list(shape)[:4]}; wanted [{rows}, K] with K from 1 to {MAX_COLUMNS}")
    right = len(crow) == rows + 1 and len(values) == len(columns) and crow[0] == 0 and crow[-1] == len(values)
    if not right or (np.diff(crow) < 0).any():
        raise bad_request(f"{where}: found CSR indices that do not fit {len(values)} values in {rows} rows")
    if len(columns) and not (columns.min() >= 0 and columns.max() < shape[1]):
        raise bad_request(f"{where}: found CSR columns outside of 0 to {shape[1] - 1}")
    dense = np.zeros((rows, shape[1]), values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), columns] = values
    return dense


def _values(data: bytes, dtype: np.dtype[Any], where: str) -> Array:
    if len(data) % dtype.itemsize:
        raise bad_request(f"{where}: found {len(data)} bytes; wanted a multiple of {dtype.itemsize}")
    array = np.frombuffer(data, dtype)
    if dtype.kind == "u":  # bfloat16 is the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _shaped(array: Array, shape: Sequence[int], where: str) -> Array:
    size = 1
    for each in shape:
        size *= each
    if len(shape) > 2 or min(shape, default=0) < 0 or size != len(array):
        raise bad_request(
            f"{where}: found {len(array)} values for shape {list(shape)[:4]}; wanted them to fit, (N,) or (N, K)"
        )
    return array.reshape(tuple(shape))
