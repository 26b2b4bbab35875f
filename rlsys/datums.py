"""Columnar training sequences.

``collate`` validates a user's datums against loss and model, and joins them into one batch. ``shift`` builds the same
kind of batch from rollouts and advantages. All columns are aligned to the T-1 predictions of ``prompt + sample``:

    prompt = a b, sample = x y   ->   tokens     a b x
                                      targets    b x y
                                      weights    0 1 1
                                      logprobs   0 q q
                                      advantages 0 A A

A reply of an environment inside a sample is both input and target, with weight, logprob and advantage 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlsys.errors import DatumError, MissingInputError, did_you_mean
from rlsys.rollouts import Rollouts, join_offsets, offsets_of, spans
from rlsys.types import Array, Datum, to_array

if TYPE_CHECKING:
    from rlsys.losses import Loss

ALIASES = {"behavior_logprobs": "logprobs"}  # MinT's name


@dataclass(frozen=True, slots=True)
class DatumBatch:
    """D datums, T positions end to end. ``columns`` holds the inputs of the loss: weights, logprobs, advantages."""

    tokens: Array  # (T,) int32, input of the model
    targets: Array  # (T,) int32, target token of each position
    offsets: Array  # (D + 1,) int64, datum d is [offsets[d]:offsets[d + 1]]
    columns: Mapping[str, Array]  # each (T,) float32; "weights" is always present

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.targets) == self.offsets[-1]
        assert all(len(column) == len(self.tokens) for column in self.columns.values())

    @property
    def num_datums(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """(D,) positions per datum."""
        return np.diff(self.offsets)


def collate(data: Sequence[Datum], loss: Loss, *, vocab_size: int, max_length: int) -> DatumBatch:
    """Validate the user's datums against loss and model, and join them into one batch.

    Raises:
        MissingInputError: a datum lacks an input that the loss requires.
        DatumError: a datum is invalid otherwise; the message has its index, the key, what was found and wanted.
    """
    if len(data) == 0:
        raise DatumError("data: found no datums; wanted at least one")
    inputs = [_inputs(f"datum {d}", datum, loss, max_length) for d, datum in enumerate(data)]
    offsets = offsets_of([datum.model_input.length for datum in data])
    tokens = np.concatenate([datum.model_input.to_numpy() for datum in data])
    targets = np.concatenate([arrays["target_tokens"] for arrays in inputs])
    for key, ids in (("model_input", tokens), ("loss_fn_inputs['target_tokens']", targets)):
        wanted = f"ids from 0 to {vocab_size - 1}, the model's vocabulary"
        _refuse_where((ids < 0) | (ids >= vocab_size), ids, offsets, key, wanted)
    given = {key for arrays in inputs for key in arrays} & loss.optional
    for d, arrays in enumerate(inputs):
        for key in sorted(given - arrays.keys()):
            raise MissingInputError(
                f"datum {d}: loss_fn_inputs[{key!r}] is missing; other datums have it; wanted it in all or in none"
            )
    with np.errstate(over="ignore"):  # values beyond float32 become inf and are refused below
        columns = {
            key: np.concatenate([arrays[key] for arrays in inputs]).astype(np.float32)
            for key in sorted(loss.required | {"weights"} | given)
        }
    for key, column in columns.items():
        _refuse_where(~np.isfinite(column), column, offsets, f"loss_fn_inputs[{key!r}]", "values finite in float32")
    if given:
        from rlsys.losses import check_thresholds  # imports torch, as the loss that takes them did

        check_thresholds(columns)
    return DatumBatch(tokens.astype(np.int32), targets.astype(np.int32), offsets, columns)


def _inputs(where: str, datum: Datum, loss: Loss, max_length: int) -> dict[str, Array]:
    """target_tokens, weights and the inputs that the loss requires, each (N,)."""
    if not isinstance(datum, Datum):
        raise DatumError(f"{where}: found a {type(datum).__name__}; wanted a Datum")
    N = datum.model_input.length
    if max_length < N:
        raise DatumError(f"{where}: model_input: found {N} tokens; wanted at most {max_length}, the model's max_length")
    values = _named(where, datum.loss_fn_inputs, loss)
    arrays = {key: to_array(value) for key, value in values.items() if key != "mask"}
    arrays.setdefault("weights", np.ones(N, np.float32))
    if arrays["weights"].shape == (N + 1,):
        arrays["weights"] = arrays["weights"][1:]  # the first token of a sequence is not a target
    if "advantages" in arrays and arrays["advantages"].shape in ((), (1,)):
        arrays["advantages"] = np.broadcast_to(arrays["advantages"], N)
    for key, array in arrays.items():  # checked again: the user may have changed the containers
        if array.shape != (N,):
            raise DatumError(f"{where}: loss_fn_inputs[{key!r}]: found shape {array.shape}; wanted ({N},)")
    return arrays


def _named(where: str, inputs: Mapping[str, object], loss: Loss) -> dict[str, object]:
    """Replace aliases by the names of the inputs; refuse missing and unknown inputs."""
    values = dict(inputs)
    required = loss.required | {"target_tokens"}
    for alias, name in ALIASES.items():
        if name in required and alias in values:
            if name in values:
                raise DatumError(f"{where}: loss_fn_inputs: found both {name!r} and {alias!r}; wanted one of the two")
            values[name] = values.pop(alias)
    for key in sorted(required - values.keys()):
        raise MissingInputError(
            f"{where}: loss_fn_inputs[{key!r}] is missing; found {sorted(map(str, inputs))}; "
            f"wanted {sorted(required)} for {loss.name!r}"
        )
    allowed = required | loss.optional | {"weights", "mask"}
    for key in sorted(values.keys() - allowed, key=str):
        raise DatumError(
            f"{where}: loss_fn_inputs[{key!r}] is not an input of {loss.name!r}; "
            f"wanted only {sorted(allowed)}{did_you_mean(key, allowed)}"
        )
    return values


def _refuse_where(bad_T: Array, values_T: Array, offsets: Array, key: str, wanted: str) -> None:
    if bad_T.any():
        t = int(bad_T.argmax())
        d = int(np.searchsorted(offsets, t, side="right")) - 1
        raise DatumError(f"datum {d}: {key}: found {values_T[t]!s} at position {t - offsets[d]}; wanted {wanted}")


def learned_rows(rollouts: Rollouts, keep_R: Array | None = None) -> Array:
    """(D,) completions that become datums: those in ``keep_R`` (default: all) with at least one sampled token."""
    has_tokens_R = rollouts.sampled_lengths > 0
    return np.flatnonzero(has_tokens_R if keep_R is None else has_tokens_R & keep_R)


def shift(rollouts: Rollouts, advantages_T: Array, keep_R: Array | None = None) -> DatumBatch:
    """Build one datum per completion of ``learned_rows``, in that order, aligned as in the module's docstring.
    ``advantages_T``: (T,), one value per completion token.

    Raises:
        DatumError: a prompt is empty.
    """
    kept = learned_rows(rollouts, keep_R)
    completion_lengths, starts = rollouts.lengths[kept], rollouts.offsets[:-1][kept]
    prompt_lengths = np.diff(rollouts.prompt_offsets)[rollouts.group[kept]]
    if (prompt_lengths == 0).any():
        r = int(kept[prompt_lengths == 0][0])
        raise DatumError(f"rollouts: the prompt of completion {r} is empty; wanted at least one token to predict from")
    from_prompt = spans(rollouts.prompt_offsets[:-1][rollouts.group[kept]], prompt_lengths)
    from_completion = spans(starts, completion_lengths)

    ends = offsets_of(prompt_lengths + completion_lengths)  # of prompt + sample, end to end
    tokens = np.empty(ends[-1], np.int32)
    tokens[spans(ends[:-1], prompt_lengths)] = rollouts.prompt_tokens[from_prompt]
    tokens[spans(ends[:-1] + prompt_lengths, completion_lengths)] = rollouts.tokens[from_completion]

    offsets = ends - np.arange(len(ends))  # one prediction fewer than tokens
    predicted = spans(offsets[:-1] + prompt_lengths - 1, completion_lengths)
    columns = {key: np.zeros(offsets[-1], np.float32) for key in ("weights", "logprobs", "advantages")}
    by_model = rollouts.sampled[from_completion]
    columns["weights"][predicted] = by_model
    columns["logprobs"][predicted] = np.where(by_model, rollouts.logprobs[from_completion], 0.0)
    columns["advantages"][predicted] = np.where(by_model, advantages_T[from_completion], 0.0)
    return DatumBatch(
        tokens=tokens[spans(ends[:-1], np.diff(offsets))],
        targets=tokens[spans(ends[:-1] + 1, np.diff(offsets))],
        offsets=offsets,
        columns=columns,
    )


def concatenate(batches: Sequence[DatumBatch]) -> DatumBatch:
    """Join batches with the same columns into one."""
    assert len(batches) > 0
    assert all(batch.columns.keys() == batches[0].columns.keys() for batch in batches)
    return DatumBatch(
        tokens=np.concatenate([batch.tokens for batch in batches]),
        targets=np.concatenate([batch.targets for batch in batches]),
        offsets=join_offsets([batch.offsets for batch in batches]),
        columns={key: np.concatenate([batch.columns[key] for batch in batches]) for key in batches[0].columns},
    )


def take(batch: DatumBatch, indices: Array | Sequence[int]) -> DatumBatch:
    """The datums at ``indices``: integers, in that order, or a boolean mask."""
    picked = np.arange(batch.num_datums)[indices]
    lengths = batch.lengths[picked]
    at = spans(batch.offsets[:-1][picked], lengths)
    columns = {key: column[at] for key, column in batch.columns.items()}
    return DatumBatch(batch.tokens[at], batch.targets[at], offsets_of(lengths), columns)
