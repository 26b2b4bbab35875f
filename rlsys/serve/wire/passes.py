"""Bodies of forward and forward_backward, protobuf or JSON, into one batch of columns."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError
from pydantic import BeforeValidator, Field

from rlsys.errors import DatumError, LossError
from rlsys.serve.errors import NumberedRefusal, Refusal, bad_request
from rlsys.serve.wire import messages
from rlsys.serve.wire.json_body import OF_PASS, Items, WireModel, as_model, at_most, load
from rlsys.serve.wire.requests import Number, Text
from rlsys.serve.wire.tensors import dense_of, flat_numbers, from_json, from_message, tokens_of
from rlsys.types import Array, Datum, ModelInput

if TYPE_CHECKING:
    from rlsys.datums import DatumBatch
    from rlsys.losses import Loss

TARGETS = "target_tokens"
MAX_KEYS = 64  # of a datum's inputs and of a loss's configuration
_ALIASES = {"behavior_logprobs"}  # see rlsys.datums
_ONLY_TEXT = "wanted chunks of token ids: this server has no image or audio input"
_UNPUBLISHED = (
    "loss_fn: 'stable_reinforce': its formula is not public; pass loss_fn=importance_sampling "
    "(cookbook: loss_fn=..., async_config.loss_fn=...)"
)


@dataclass(frozen=True, slots=True)
class WireDatum:
    """Arrays of one datum as they arrived."""

    tokens: Array  # (N,)
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class PassRequest:
    """A forward or forward_backward request, decoded and not yet checked against loss and model."""

    model_id: str
    seq_id: int
    data: Sequence[WireDatum]
    loss_fn: str
    loss_fn_config: Mapping[str, Any]  # Any: numbers, and texts that the loss refuses
    forward_only: bool


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """Shape of each datum's output: (N,), or (N, K) where its targets were."""

    lengths: Array  # (D,) N of each datum
    columns: Array  # (D,) K, or 0 for one dimension


@dataclass(frozen=True, slots=True)
class PreparedPass:
    """What the learner gets, and how its answer is laid out."""

    batch: DatumBatch
    loss: Loss
    layout: OutputLayout


class _TensorBody(WireModel):
    data: list[Any]  # Any: numbers, checked by numpy
    dtype: Text
    shape: Items[int] | None = None
    sparse_crow_indices: list[Any] | None = None
    sparse_col_indices: list[Any] | None = None


class _ChunkBody(WireModel):
    tokens: list[Any] | None = None
    type: Text = "encoded_text"


class _InputBody(WireModel):
    chunks: Items[_ChunkBody]


class _DatumBody(WireModel):
    model_input: _InputBody
    loss_fn_inputs: Annotated[dict[str, _TensorBody], BeforeValidator(at_most(MAX_KEYS))]


class _DataBody(WireModel):
    data: Items[_DatumBody]
    loss_fn: Text
    loss_fn_config: Annotated[dict[str, float | str], BeforeValidator(at_most(MAX_KEYS))] = Field(default_factory=dict)


class _PassBody(WireModel):
    model_id: Text
    seq_id: Number
    forward_backward_input: _DataBody | None = None
    forward_input: _DataBody | None = None


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its Content-Encoding.

    Raises:
        Refusal: 413 while decompressing beyond `limit`; 400 for a damaged or unknown encoding.
    """
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise bad_request(f"Content-Encoding: found {encoding[:40]!r}; wanted zstd or none")
    found = io.BytesIO()
    try:
        with pa.CompressedInputStream(pa.py_buffer(body), "zstd") as stream:
            while part := stream.read(2**20):
                if found.tell() + len(part) > limit:
                    raise Refusal(
                        413, f"body: found more than {limit} bytes after zstd; wanted at most limits.decompressed_bytes"
                    )
                found.write(part)
    except OSError as error:
        raise bad_request(f"body: found bytes that are no zstd: {str(error)[:120]}") from None
    return found.getvalue()


def read_protobuf(body: bytes) -> PassRequest:
    message = messages.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise bad_request("body: found bytes that are no ForwardBackwardRequest, or a truncated one") from None
    if not message.model_id or message.seq_id < 0:
        raise bad_request(f"body: found model_id {message.model_id[:80]!r} and seq_id {message.seq_id}; wanted both")
    config: dict[str, Any] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is not None:
            config[key] = getattr(value, kind)
    try:
        data = [_datum_of(datum, f"datum {d}") for d, datum in enumerate(message.data)]
    except Refusal as refusal:
        is_pass = not message.forward_only
        raise NumberedRefusal(refusal.detail, message.model_id, message.seq_id, is_pass) from None
    return PassRequest(message.model_id, message.seq_id, data, message.loss_fn, config, message.forward_only)


def read_json(body: bytes, forward_only: bool) -> PassRequest:
    parsed = as_model(_PassBody, load(body, OF_PASS), not forward_only)
    inner = parsed.forward_input if forward_only else parsed.forward_backward_input
    try:
        if inner is None:
            raise bad_request(f"{'forward_input' if forward_only else 'forward_backward_input'}: is missing")
        data = [_datum_from_json(datum, f"datum {d}") for d, datum in enumerate(inner.data)]
    except Refusal as refusal:
        raise NumberedRefusal(refusal.detail, parsed.model_id, parsed.seq_id, not forward_only) from None
    return PassRequest(parsed.model_id, parsed.seq_id, data, inner.loss_fn, inner.loss_fn_config, forward_only)


def prepare(request: PassRequest, *, vocab_size: int, max_length: int, max_datums: int) -> PreparedPass:
    """Check the data against loss and model, and join them into one batch.

    Raises:
        Refusal: 400 with the datum's index, the key, what was found and what was wanted.
    """
    from rlsys import losses  # imports torch, which the command line does without
    from rlsys.datums import collate

    if request.loss_fn == "stable_reinforce":
        raise bad_request(_UNPUBLISHED)
    if not 1 <= len(request.data) <= max_datums:
        raise bad_request(f"data: found {len(request.data)} datums; wanted 1 to {max_datums} (limits.datums)")
    try:
        loss = losses.resolve(request.loss_fn, request.loss_fn_config)
        known = loss.required | loss.optional | {TARGETS, "weights"} | _ALIASES
        data, lengths, columns = [], [], []
        for d, datum in enumerate(request.data):
            K = _columns_of(datum, loss, f"datum {d}")
            lengths.append(len(datum.tokens))
            columns.append(K)
            for part in _parts(datum, K, known):
                if "weights" in loss.required:
                    part.setdefault("weights", np.ones(len(datum.tokens), np.float32))
                data.append(_checked(f"datum {d}", datum.tokens, part))
        batch = collate(data, loss, vocab_size=vocab_size, max_length=max_length)
    except (DatumError, LossError) as error:
        raise bad_request(str(error)) from None
    return PreparedPass(batch, loss, OutputLayout(np.array(lengths, np.int64), np.array(columns, np.int64)))


def _datum_of(datum: Any, where: str) -> WireDatum:  # Any: a protobuf class made at run time
    parts = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise bad_request(f"{where}: model_input: found a chunk of kind {kind}; {_ONLY_TEXT}")
        parts.append(tokens_of(chunk.encoded_text.tokens, f"{where}: model_input"))
    tokens = _joined(parts)
    inputs = {
        key: from_message(tensor, len(tokens), f"{where}: loss_fn_inputs[{key[:40]!r}]")
        for key, tensor in datum.loss_fn_inputs.items()
    }
    return WireDatum(tokens, inputs)


def _datum_from_json(datum: _DatumBody, where: str) -> WireDatum:
    parts = []
    for chunk in datum.model_input.chunks:
        if chunk.tokens is None:
            raise bad_request(f"{where}: model_input: found a chunk of type {chunk.type[:40]!r}; {_ONLY_TEXT}")
        parts.append(flat_numbers(chunk.tokens, f"{where}: model_input"))
    tokens = _joined(parts)
    inputs = {}
    for key, tensor in datum.loss_fn_inputs.items():
        at = f"{where}: loss_fn_inputs[{key[:40]!r}]"
        if tensor.sparse_crow_indices is None:
            inputs[key] = from_json(tensor.data, tensor.dtype, tensor.shape, at)
            continue
        values = from_json(tensor.data, tensor.dtype, None, at)
        crow = from_json(tensor.sparse_crow_indices, "int64", None, f"{at}: sparse_crow_indices")
        columns = from_json(tensor.sparse_col_indices or [], "int64", None, f"{at}: sparse_col_indices")
        inputs[key] = dense_of(values, crow, columns, tensor.shape or [], len(tokens), at)
    return WireDatum(tokens, inputs)


def _joined(parts: Sequence[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _columns_of(datum: WireDatum, loss: Loss, where: str) -> int:
    """K of (N, K) targets, or 0."""
    targets = datum.inputs.get(TARGETS)
    if targets is None or targets.ndim != 2:
        return 0
    if loss.name != "cross_entropy":
        raise bad_request(
            f"{where}: loss_fn_inputs['{TARGETS}']: found shape {targets.shape}; wanted ({len(datum.tokens)},) for "
            f"{loss.name!r}"
        )
    if targets.shape[0] != len(datum.tokens) or targets.shape[1] == 0:
        raise bad_request(
            f"{where}: loss_fn_inputs['{TARGETS}']: found shape {targets.shape}; wanted ({len(datum.tokens)}, K)"
        )
    return int(targets.shape[1])


def _parts(datum: WireDatum, K: int, known: frozenset[str] | set[str]) -> Iterator[dict[str, Array]]:
    """The inputs that the loss reads. (N, K) targets become K datums: the loss is a sum over both axes."""
    inputs = {key: array for key, array in datum.inputs.items() if key in known}
    if not K:
        yield inputs
        return
    for k in range(K):
        yield {key: array[:, k] if array.ndim == 2 and array.shape[1] == K else array for key, array in inputs.items()}


def _checked(where: str, tokens: Array, inputs: Mapping[str, Array]) -> Datum:
    try:
        return Datum(ModelInput.from_ints(tokens), inputs)
    except DatumError as error:
        raise DatumError(f"{where}: {str(error).removeprefix('Datum: ')}") from None
