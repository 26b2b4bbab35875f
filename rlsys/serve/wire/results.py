"""Results of promises as protobuf or JSON. Encoding is columnar: bytes of whole arrays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rlsys.rollouts import LENGTH
from rlsys.serve.errors import Failure
from rlsys.serve.wire import messages
from rlsys.serve.wire.passes import OutputLayout
from rlsys.types import Array

JSON, PROTOBUF = "application/json", "application/x-protobuf"
UNDEFINED_LOGPROB = -99999.0  # of the first prompt token, in tables without nulls


@dataclass(frozen=True, slots=True)
class Encoded:
    """A body and its media type."""

    body: bytes
    media_type: str = JSON


class Result(Protocol):
    """Result of a promise."""

    @property
    def nbytes(self) -> int: ...
    def encode(self, protobuf: bool) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class JsonResult:
    """Result of an operation that has no protobuf form."""

    value: Mapping[str, Any]  # Any: JSON

    @property
    def nbytes(self) -> int:
        return 512

    def encode(self, protobuf: bool) -> Encoded:
        return Encoded(json_bytes(self.value))


@dataclass(frozen=True, slots=True)
class FailedResult:
    failure: Failure

    @property
    def nbytes(self) -> int:
        return 512 + len(self.failure.error)

    def encode(self, protobuf: bool) -> Encoded:
        return Encoded(json_bytes({"error": self.failure.error, "category": self.failure.category}))


@dataclass(frozen=True, slots=True)
class PassResult:
    """Result of forward or forward_backward. `logprobs`: (T,) float32, laid out as the request's targets."""

    metrics: Mapping[str, float]
    logprobs: Array
    layout: OutputLayout

    @property
    def nbytes(self) -> int:
        return self.logprobs.nbytes + 1024

    def encode(self, protobuf: bool) -> Encoded:
        return Encoded(self._message().SerializeToString(), PROTOBUF) if protobuf else Encoded(self._json())

    def _message(self) -> Any:  # Any: a protobuf class made at run time
        message = messages.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=self.metrics)
        sizes = self.layout.lengths * np.maximum(self.layout.columns, 1)
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        columns = self.layout.columns
        starts = [0, *(np.flatnonzero(np.diff(columns)) + 1).tolist(), len(columns)]
        for first, last in itertools.pairwise(starts):  # one record per stretch of equal shape
            record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=last - first)
            tensor = record.fields["logprobs"]
            tensor.data = self.logprobs[ends[first] : ends[last]].astype("<f4", copy=False).tobytes()
            tensor.offsets = ((ends[first : last + 1] - ends[first]) * 4).astype("<i8").tobytes()
            tensor.dtype = messages.FLOAT32
            if columns[first]:
                tensor.trailing_shape.append(int(columns[first]))
        return message

    def _json(self) -> bytes:
        outputs, start = [], 0
        for length, columns in zip(self.layout.lengths.tolist(), self.layout.columns.tolist(), strict=True):
            end = start + length * max(columns, 1)
            shape = [length, columns] if columns else [length]
            outputs.append(
                {"logprobs": {"data": self.logprobs[start:end].tolist(), "dtype": "float32", "shape": shape}}
            )
            start = end
        return json_bytes(
            {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": dict(self.metrics)}
        )


def laid_out(logprobs: Array, layout: OutputLayout) -> Array:
    """The learner's values with those of (N, K) targets in C order: it had K datums of N for each of these."""
    if not layout.columns.any():
        return logprobs
    parts, start = [], 0
    for length, columns in zip(layout.lengths.tolist(), layout.columns.tolist(), strict=True):
        end = start + length * max(columns, 1)
        part = logprobs[start:end]
        parts.append(part.reshape(columns, length).T.reshape(-1) if columns else part)
        start = end
    return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Completions of one prompt. Prompt columns have one row per prompt token, the first undefined."""

    tokens: Array  # (T,) int32
    logprobs: Array  # (T,) float32
    offsets: Array  # (n + 1,)
    stop_reasons: Array  # (n,)
    prompt_logprobs: Array | None = None  # (N,) float32, NaN where not asked for
    topk_tokens: Array | None = None  # (N, k) int32
    topk_logprobs: Array | None = None  # (N, k) float32
    sequence_ids: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        arrays = (self.tokens, self.logprobs, self.prompt_logprobs, self.topk_tokens, self.topk_logprobs)
        return 1024 + sum(array.nbytes for array in arrays if array is not None)

    def encode(self, protobuf: bool) -> Encoded:
        return Encoded(self._message().SerializeToString(), PROTOBUF) if protobuf else Encoded(self._json())

    def _message(self) -> Any:  # Any: a protobuf class made at run time
        message = messages.SampleResponse()
        tokens, logprobs = self.tokens.astype("<i4", copy=False), self.logprobs.astype("<f4", copy=False)
        for i, reason in enumerate(self.stop_reasons.tolist()):
            part = slice(self.offsets[i], self.offsets[i + 1])
            message.sequences.add(
                stop_reason=messages.LENGTH if reason == LENGTH else messages.STOP,
                tokens=tokens[part].tobytes(),
                logprobs=logprobs[part].tobytes(),
            )
        if self.prompt_logprobs is not None:
            message.prompt_logprobs = self.prompt_logprobs.astype("<f4").tobytes()
        if self.topk_tokens is not None and self.topk_logprobs is not None:
            topk = message.topk_prompt_logprobs
            topk.length, topk.k = self.topk_tokens.shape
            topk.token_ids = self.topk_tokens.astype("<i4").tobytes()
            topk.logprobs = self.topk_logprobs.astype("<f4").tobytes()
        return message

    def _json(self) -> bytes:
        sequences = []
        for i, reason in enumerate(self.stop_reasons.tolist()):
            part = slice(self.offsets[i], self.offsets[i + 1])
            sequence = {
                "stop_reason": "length" if reason == LENGTH else "stop",
                "tokens": self.tokens[part].tolist(),
                "logprobs": self.logprobs[part].tolist(),
            }
            if self.sequence_ids:
                sequence["sequence_id"] = self.sequence_ids[i]
            sequences.append(sequence)
        value: dict[str, Any] = {"type": "sample", "sequences": sequences}
        if self.prompt_logprobs is not None:
            value["prompt_logprobs"] = [None if x != x else x for x in self.prompt_logprobs.tolist()]
        if self.topk_tokens is not None and self.topk_logprobs is not None:
            rows = zip(self.topk_tokens.tolist(), self.topk_logprobs.tolist(), strict=True)
            table = [[list(pair) for pair in zip(*row, strict=True)] for row in rows]
            value["topk_prompt_logprobs"] = [None, *table[1:]]
        return json_bytes(value)


def json_bytes(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
