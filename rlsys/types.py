"""Public data types of the client API, named as in Tinker. Needs only numpy.

Shapes are ``(N,)`` with N = ``model_input.length``. Log-probabilities are nats (natural log). Position i of
``model_input`` predicts ``target_tokens[i]``: targets are already shifted. Constructors check a single object; checks
against the loss or the model are made on submission (``rlsys.datums.collate``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rlsys.errors import ConfigError, DatumError, SamplingError
from rlsys.limits import LEAST_EPS

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]  # Any: numpy's dtype, which the comment beside an array names
DType = Literal["float32", "int64"]
StopReason = Literal["stop", "length"]

INTEGER_INPUTS = frozenset({"target_tokens"})
MAX_TOKEN_ID = 2**31 - 1  # batches use int32


def to_array(value: object) -> Array:
    """Convert a list, numpy array, torch tensor or TensorData to a numpy array, without a copy if possible.

    Raises:
        DatumError: the value is ragged or not numeric.
    """
    if isinstance(value, TensorData):
        return value.to_numpy()
    if hasattr(value, "detach"):
        tensor: torch.Tensor = value.detach().cpu()
        value = tensor.float().numpy() if tensor.dtype.is_floating_point else tensor.numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DatumError(f"found a ragged or non-numeric value of type {type(value).__name__}: {error}") from error


class TensorData:
    """A dense tensor with dtype ``float32`` or ``int64``.

    Behaves like a sequence: ``len``, iteration, slicing, ``numpy.asarray``.
    ``TensorData(data=[1.0, 2.0], dtype="float32", shape=[2])`` takes flat values in C order, as in Tinker.

    Raises:
        DatumError: values are not numbers, do not fit the dtype, or do not match `shape`.
    """

    __slots__ = ("_array",)

    def __init__(self, data: object, dtype: DType | None = None, shape: Sequence[int] | None = None) -> None:
        array = to_array(data)
        if dtype is None:
            dtype = "int64" if array.dtype.kind in "iub" else "float32"
        if dtype not in ("float32", "int64"):
            raise DatumError(f"TensorData: unknown dtype {dtype!r}; wanted 'float32' or 'int64'")
        if array.dtype.kind not in "iubf":
            raise DatumError(f"TensorData: found values of numpy dtype {array.dtype}; wanted numbers")
        array = _cast(array, dtype)
        if shape is not None:
            if int(np.prod(shape)) != array.size:
                raise DatumError(f"TensorData: found {array.size} values for shape {list(shape)}")
            array = array.reshape(tuple(shape))
        self._array = array

    @classmethod
    def from_numpy(cls, array: Array) -> TensorData:
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        return cls(tensor)

    @property
    def data(self) -> list[float] | list[int]:
        """The flat values in C order."""
        values: list[float] | list[int] = self._array.reshape(-1).tolist()
        return values

    @property
    def dtype(self) -> str:
        return str(self._array.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self._array.shape)

    def to_numpy(self) -> Array:
        return self._array

    def to_torch(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(self._array))  # a copy: torch must not write into a shared buffer

    def tolist(self) -> list[Any]:  # Any: numbers, or lists as deep as the shape
        values: list[Any] = self._array.tolist()
        return values

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        array = self._array if dtype is None else self._array.astype(dtype, copy=False)
        return np.array(array) if copy else array

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:  # Any: as in tolist
        return iter(self._array.tolist())

    def __getitem__(self, index: Any) -> Any:  # Any: what numpy takes; a number or a TensorData, as in a list
        part = self._array[index]
        return part.item() if np.ndim(part) == 0 else TensorData(part)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.dtype == other.dtype and np.array_equal(self._array, other._array)

    __hash__ = None  # type: ignore[assignment]  # mutable contents: unhashable, like numpy arrays

    def __repr__(self) -> str:
        return f"TensorData({self._array!r})"


def _cast(array: Array, dtype: DType) -> Array:
    """Cast to `dtype`. Raises DatumError if int64 does not hold the values exactly, or float32 overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == "int64" and not (cast == array).all():
        raise DatumError(
            "TensorData: found fractional, infinite or too large values for dtype 'int64'; wanted whole numbers"
        )
    if (np.isinf(cast) & np.isfinite(array)).any():
        raise DatumError(f"TensorData: found {np.abs(array).max():g}, which float32 cannot hold")
    return cast


@dataclass(frozen=True, slots=True)
class EncodedTextChunk:
    """A chunk of token ids."""

    tokens: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.tokens)


class ModelInput:
    """The token ids of a model's input."""

    __slots__ = ("_tokens",)

    def __init__(self, chunks: Sequence[EncodedTextChunk]) -> None:
        runs = [_token_ids(chunk.tokens) for chunk in chunks]
        self._tokens = np.concatenate(runs) if runs else np.zeros(0, np.int64)

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | Array) -> ModelInput:
        return cls([EncodedTextChunk(tokens)])  # type: ignore[arg-type]  # any sequence of ints is accepted

    @classmethod
    def empty(cls) -> ModelInput:
        return cls([])

    @property
    def chunks(self) -> list[EncodedTextChunk]:
        return [EncodedTextChunk(self.to_ints())]

    @property
    def length(self) -> int:
        return len(self._tokens)

    def to_ints(self) -> list[int]:
        tokens: list[int] = self._tokens.tolist()
        return tokens

    def to_numpy(self) -> Array:
        return self._tokens

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        return ModelInput([EncodedTextChunk(self.to_ints()), chunk])

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk([token]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelInput):
            return NotImplemented
        return np.array_equal(self._tokens, other._tokens)

    __hash__ = None  # type: ignore[assignment]  # compared by contents, so unhashable

    def __repr__(self) -> str:
        return f"ModelInput({self.to_ints()})"


def _token_ids(tokens: object) -> Array:
    array = to_array(tokens)
    if array.ndim != 1:
        raise DatumError(f"model_input: found shape {array.shape}; wanted one dimension of token ids")
    if array.size and array.dtype.kind not in "iu":
        raise DatumError(f"model_input: found dtype {array.dtype}; wanted integer token ids")
    array = array.astype(np.int64)
    if array.size and (array.min() < 0 or array.max() > MAX_TOKEN_ID):
        raise DatumError(f"model_input: found ids from {array.min()} to {array.max()}; wanted 0 to {MAX_TOKEN_ID}")
    return array


@dataclass(frozen=True, slots=True)
class Datum:
    """One training sequence with all inputs of its loss.

    ``loss_fn_inputs`` maps names to lists, numpy arrays, torch tensors or TensorData. Each is ``(N,)``, except that
    ``advantages`` can be a scalar or of length 1 (one advantage for all tokens), and ``weights`` of length N + 1, whose
    first value is dropped. Containers are kept unchanged: results use the container type of ``target_tokens``.

    Raises:
        DatumError: a value is not numeric, not finite, of a wrong dtype, or of a wrong length.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any]  # Any: the user's containers, which a custom loss gets back

    def __post_init__(self) -> None:
        if not isinstance(self.model_input, ModelInput):
            raise DatumError(
                f"Datum: model_input is a {type(self.model_input).__name__}; wanted ModelInput.from_ints(token_ids)"
            )
        if self.model_input.length == 0:
            raise DatumError("Datum: model_input is empty; wanted at least one token")
        if not isinstance(self.loss_fn_inputs, Mapping):
            raise DatumError(
                f"Datum: loss_fn_inputs is a {type(self.loss_fn_inputs).__name__}; wanted a dict of name -> values"
            )
        for key, value in self.loss_fn_inputs.items():
            _check_input(key, to_array(value), self.model_input.length)


def _check_input(key: str, array: Array, length: int) -> None:
    where = f"Datum: loss_fn_inputs[{key!r}]"
    if array.dtype.kind not in "iubf":
        raise DatumError(f"{where}: found dtype {array.dtype}; wanted numbers")
    if key in INTEGER_INPUTS and array.dtype.kind not in "iu":
        raise DatumError(f"{where}: found dtype {array.dtype}; wanted integer token ids")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DatumError(f"{where}: found {array.reshape(-1)[at]} at position {at}; wanted finite values")
    if key == "advantages" and array.size == 1 and array.ndim <= 1:
        return
    if key == "weights" and array.ndim == 1 and len(array) == length + 1:
        return  # one weight per token of prompt and completion, as MinT's example passes; the first is dropped
    if array.ndim != 1 or len(array) != length:
        raise DatumError(f"{where}: found shape {array.shape}; wanted ({length},), one value per model_input token")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request.

    ``stop``: None: the model's end tokens end a completion. Strings end it in addition to those; the text of a special
    token stands for that token. Token ids replace the model's end tokens, and [] means no stop condition.
    ``seed``: the same seed gives the same completions; the completions of one request use different random numbers.
    None: random in every request and every session.

    Raises:
        SamplingError: a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: all tokens
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _require(
            _is_whole(self.max_tokens) and self.max_tokens >= 1,
            "max_tokens",
            self.max_tokens,
            "a whole number, at least 1",
        )
        temperature_ok = is_number(self.temperature) and self.temperature >= 0.0
        _require(temperature_ok, "temperature", self.temperature, "a number >= 0 (0 is greedy)")
        _require(is_number(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        top_k_ok = _is_whole(self.top_k) and (self.top_k == -1 or self.top_k >= 1)
        _require(top_k_ok, "top_k", self.top_k, "-1 (all) or a whole number, at least 1")
        _require(self.seed is None or _is_whole(self.seed), "seed", self.seed, "a whole number or None")
        stops = () if self.stop is None or isinstance(self.stop, str) else self.stop
        stop_ok = isinstance(stops, Sequence) and (
            all(isinstance(stop, str) for stop in stops) or all(map(_is_token_id, stops))
        )
        _require(stop_ok, "stop", self.stop, "a string, strings, or token ids")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_token_id(value: object) -> bool:
    return isinstance(value, Integral) and _is_whole(value) and 0 <= int(value) <= MAX_TOKEN_ID


def is_number(value: object) -> bool:
    """Whether the value is a finite real number; True and False are not."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def _require(ok: bool, name: str, found: object, wanted: str) -> None:
    if not ok:
        raise SamplingError(f"SamplingParams.{name}: found {found!r}; wanted {wanted}")


@dataclass(frozen=True, slots=True)
class AdamParams:
    """Parameters of one AdamW step, with the names and defaults of Tinker; weight decay is decoupled
    (arXiv:1711.05101).

    ``grad_clip_norm``: maximum of the global L2 norm of the summed gradient; 0: no clipping.

    Raises:
        ConfigError: a value is out of range.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if not (is_number(self.eps) and self.eps >= LEAST_EPS):
            raise ConfigError(f"AdamParams.eps: found {self.eps!r}; wanted a finite number >= {LEAST_EPS}")
        for name in ("learning_rate", "weight_decay", "grad_clip_norm"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0.0):
                raise ConfigError(f"AdamParams.{name}: found {value!r}; wanted a finite number >= 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not (is_number(value) and 0.0 <= value < 1.0):
                raise ConfigError(f"AdamParams.{name}: found {value!r}; wanted a number in [0, 1)")


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Result of a pass over a batch, learner -> training client. ``loss_sum`` is ``metrics["loss:sum"]``, summed in
    float64."""

    loss_sum: float
    metrics: Mapping[str, float]
    logprobs: Array  # (T,) float32 nats of the targets, datums end to end


@dataclass(frozen=True, slots=True)
class ForwardBackwardOutput:
    """Result of a forward or forward-backward pass. ``loss`` equals ``metrics["loss:sum"]``;
    ``loss_fn_outputs[i]["logprobs"]`` is ``(N,)`` in nats."""

    loss: float
    metrics: Mapping[str, float]
    # Any: the container type of the caller's target_tokens
    loss_fn_outputs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class OptimStepResponse:
    """Result of an optimizer step. ``metrics["grad_norm"]``: global L2 norm before clipping."""

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One completion, including a sampled stop token. ``logprobs``: nats, under the distribution sampled from."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class SampleResponse:
    """The completions of one prompt."""

    sequences: Sequence[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
