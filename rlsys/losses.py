"""Losses. Each is one function with its equation and source. A loss is the plain sum of its values over all positions.

Per token: p = log-probability (nats) of the target under the learner, q = under the sampler, A = advantage,
r = exp(p - q), w = weight. The functions return (T,) values without w; ``Loss.__call__`` applies w and the mask.
"Tinker" refers to its documentation page "Loss Functions", "MinT" to the page of that name of the Mind Lab Toolkit.

If a ratio overflows at a position with a weight, value and gradient stay infinite: clamping would train on a wrong
gradient, whereas ``optim_step`` refuses a gradient that is not finite. In float32 an overflow needs p - q > 88, which
only broken log-probabilities reach.

The functions call methods of tensors only, so that a driver or client can check a loss's parameters without torch.

To add a loss: write its function, add a line to ``_LOSSES``, and add a golden test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlsys.errors import DatumError, LossError, MissingInputError, did_you_mean
from rlsys.types import Array, is_number

if TYPE_CHECKING:
    from torch import Tensor

    Bound = float | Tensor  # (T,) where a datum gives one per token

Config = Mapping[str, float]
SEQUENCE = "sequence"  # column with the number of each position's datum, for losses with a ratio per sequence
RATIO_MASK = "sequence_ratio_mask"  # column: positions that count in the sequence's ratio
CLIP_KEYS = ("clip_low_threshold", "clip_high_threshold")


def cross_entropy(p_T: Tensor) -> Tensor:
    """-p.  Shannon 1948; Tinker, MinT."""
    return -p_T


def importance_sampling(p_T: Tensor, q_T: Tensor, adv_T: Tensor) -> Tensor:
    """-r A; on policy its gradient is that of REINFORCE.  Kahn and Marshall 1953; Williams 1992; Tinker, MinT."""
    return -(p_T - q_T).exp() * adv_T


def ppo(p_T: Tensor, q_T: Tensor, adv_T: Tensor, *, low: Bound, high: Bound) -> Tensor:
    """-min(r A, clip(r, low, high) A).  Schulman et al. 2017, arXiv:1707.06347, equation 7; Tinker, MinT.

    The minimum is min(r, high) A for A > 0 and max(r, low) A for A < 0. It is clamped before exp, so that a clipped
    token whose r overflows has gradient 0 instead of 0 * inf.
    """
    return _pessimistic(p_T - q_T, adv_T, low, high)


def gspo(p_T: Tensor, mean_x_T: Tensor, adv_T: Tensor, *, low: Bound, high: Bound) -> Tensor:
    """-min(s A, clip(s, low, high) A), s_t = sg(s) p / sg(p).  Zheng et al. 2025, arXiv:2507.18071, equations 7 and 13.

    s = exp(mean of p - q over the sequence), see `sequence_log_ratio`: ``mean_x_T`` is its logarithm at each position.
    """
    return _pessimistic(mean_x_T + p_T - p_T.detach(), adv_T, low, high)


def _pessimistic(x_T: Tensor, adv_T: Tensor, low: Bound, high: Bound) -> Tensor:
    """-min(exp(x) A, clip(exp(x), low, high) A)."""
    return -_clamp(x_T, None, _log(high)).where(adv_T > 0, _clamp(x_T, _log(low), None)).exp() * adv_T


def _clamp(x_T: Tensor, low: Bound | None, high: Bound | None) -> Tensor:
    return x_T.clamp(low, high)  # type: ignore[arg-type]  # torch takes two numbers or two tensors


def sequence_log_ratio(p_T: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """(T,) mean of p - q over the positions of the same sequence that count: those of its RATIO_MASK, or without one
    those with an advantage and a weight. No gradient."""
    counts_T = columns[RATIO_MASK] != 0 if RATIO_MASK in columns else columns["advantages"] != 0
    if RATIO_MASK not in columns and "weights" in columns:
        counts_T = counts_T & (columns["weights"] != 0)
    sequence_T = columns[SEQUENCE].long()
    x_T = (p_T.detach() - columns["logprobs"]).where(counts_T, 0.0)
    size = int(sequence_T.max()) + 1 if len(sequence_T) else 0
    sums = x_T.new_zeros(size).index_add_(0, sequence_T, x_T)
    counts = x_T.new_zeros(size).index_add_(0, sequence_T, counts_T.to(x_T.dtype))
    return (sums / counts.clamp(min=1))[sequence_T]


def cispo(
    p_T: Tensor, q_T: Tensor, adv_T: Tensor, *, low: Bound, high: Bound, sharpness: float | None = None
) -> Tensor:
    """-sg(clip(r, low, high)) p A.  MiniMax-M1 2025, arXiv:2506.13585; Tinker, MinT.

    sg: stop-gradient. With `sharpness` (MinT's ``beta``) the clip is soft, see `soft_clip`.
    """
    x_T = (p_T - q_T).detach()
    weight_T = _clamp(x_T.exp(), low, high) if sharpness is None else soft_clip(x_T, low, high, sharpness)
    return -weight_T * adv_T * p_T


def soft_clip(x_T: Tensor, low: Bound, high: Bound, beta: float) -> Tensor:
    """exp(a + s(x - a) - s(x - b)), a = ln low, b = ln high, s(z) = ln(1 + e^(beta z)) / beta.

    The formula is ours: MinT names a soft clip and its sharpness, but gives no formula. Because s(z) = max(z, 0) +
    ln(1 + e^(-beta |z|)) / beta, the exponent is computed as the hard clip of x plus a correction of at most
    ln 2 / beta. This is exact also for large x, and for low = 0, where the formula is exp(x - s(x - b)).
    """
    a, b = _log(low), _log(high)
    above_low_T = (-beta * (x_T - a).abs()).exp().log1p()
    above_high_T = (-beta * (x_T - b).abs()).exp().log1p()
    return (_clamp(x_T, a, b) + (above_low_T - above_high_T) / beta).exp()


def dro(p_T: Tensor, q_T: Tensor, adv_T: Tensor, *, beta: float) -> Tensor:
    """-(p A - beta/2 (p - q)^2).  Richemond et al. 2024, arXiv:2405.19107, without its value function; Tinker, MinT.

    The quadratic term does not vanish for A = 0, so prompt positions need w = 0.
    """
    return -(p_T * adv_T - 0.5 * beta * (p_T - q_T) ** 2)


def _log(bound: Bound) -> Bound:
    if not isinstance(bound, float | int):
        return bound.log()
    return math.log(bound) if bound > 0 else -math.inf


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with its parameters, created by `resolve`. ``required``: its inputs besides target_tokens; ``optional``:
    those that it can take; thresholds per token replace those of ``params``."""

    name: str
    required: frozenset[str]
    params: Config = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    @property
    def is_per_sequence(self) -> bool:
        """Whether columns need SEQUENCE."""
        return _LOSSES[self.name].per_sequence

    def __call__(self, logp_T: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """(T,) weighted values, whose sum is the loss. Value and gradient are exactly 0 where the weight is 0.
        ``columns``: (T,) inputs by name.

        Raises:
            MissingInputError: a required column is missing.
        """
        _require_columns(self, columns)
        spec = _LOSSES[self.name]
        inputs = [logp_T] + [columns[key] for key in _RATIO_INPUTS if key in self.required]
        if spec.per_sequence:
            inputs[1] = sequence_log_ratio(logp_T, columns)
        weights_T = columns.get("weights")
        counts_T = logp_T.new_ones(logp_T.shape).bool() if weights_T is None else weights_T != 0
        if spec.silent_at_zero_advantage:
            counts_T = counts_T & (columns["advantages"] != 0)
        # Inputs are masked, not values: otherwise autograd would multiply the masked gradient 0 by an infinite exp.
        bounds = {name: columns[key] for key, name in zip(CLIP_KEYS, _BOUNDS, strict=True) if key in columns}
        params = _both_tensors({**self.params, **bounds}, logp_T) if bounds else self.params
        values_T = spec.equation(*(x.where(counts_T, 0.0) for x in inputs), **params)
        return values_T if weights_T is None else weights_T.where(counts_T, 0.0) * values_T


def resolve(name: str, config: Config | None = None) -> Loss:
    """Look up a loss by name, and set its parameters from ``loss_fn_config``.

    Raises:
        LossError: no such loss, or an invalid config.
    """
    if not isinstance(name, str) or name not in _LOSSES:
        raise LossError(f"loss_fn: found {name!r}; wanted one of {', '.join(_LOSSES)}{did_you_mean(name, _LOSSES)}")
    spec = _LOSSES[name]
    config = dict(config or {})
    for key, value in config.items():
        where = f"loss_fn_config[{key!r}] of {name!r}"
        if key not in spec.keys:
            takes = f"it takes {', '.join(spec.keys)}" if spec.keys else "it takes no parameters"
            raise LossError(f"{where} is not a parameter of this loss; {takes}{did_you_mean(key, spec.keys)}")
        if not is_number(value):
            raise LossError(f"{where}: found {value!r}; wanted a finite number")
    params = spec.parse({key: float(value) for key, value in config.items()})
    return Loss(name, spec.required, params, spec.optional)


def _both_tensors(params: Mapping[str, Bound], like: Tensor) -> dict[str, Bound]:
    """Both bounds as (T,): torch clamps between two tensors or two numbers."""
    found: dict[str, Bound] = {}
    for key, value in params.items():
        if key not in _BOUNDS:
            found[key] = value
        elif isinstance(value, float | int):
            found[key] = like.new_full(like.shape, value)
        else:
            found[key] = value.to(like)
    return found


def check_thresholds(columns: Mapping[str, Array]) -> None:
    """
    Raises:
        DatumError: thresholds per token that do not bound a ratio.
    """
    for key, least, most in ((CLIP_KEYS[0], 0.0, 1.0), (CLIP_KEYS[1], 1.0, math.inf)):
        if key in columns and not ((columns[key] >= least) & (columns[key] <= most)).all():
            raise DatumError(
                f"loss_fn_inputs[{key!r}]: found values from {columns[key].min():g} to {columns[key].max():g}; wanted "
                "0 <= low <= 1 <= high: they bound the ratio itself, which is 1 on policy"
            )


def _no_params(config: Config) -> Config:
    return {}


def _gspo_params(config: Config) -> Config:
    return _clip_bounds({"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4, **config})  # the paper's


def _clip_bounds(config: Config) -> Config:
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    if not 0.0 <= low <= 1.0 <= high:
        raise LossError(
            f"loss_fn_config: found clip_low_threshold {low:g} and clip_high_threshold {high:g}; wanted 0 <= low <= 1 "
            "<= high: they bound the ratio itself, which is 1 on policy (0.8 and 1.2, not 0.2)"
        )
    return {"low": low, "high": high}


def _ppo_params(config: Config) -> Config:
    if "clip_ratio" not in config:
        return _clip_bounds(config)
    if len(config) > 1:
        both = ", ".join(sorted(config))
        raise LossError(f"loss_fn_config of 'ppo': found {both}; wanted either clip_ratio or the two thresholds")
    ratio = config["clip_ratio"]
    if not 0.0 <= ratio <= 0.5:
        raise LossError(f"loss_fn_config['clip_ratio'] of 'ppo': found {ratio:g}; wanted a number in [0, 0.5]")
    return {"low": 1.0 - ratio, "high": 1.0 + ratio}


def _cispo_params(config: Config) -> Config:
    bounds = _clip_bounds(config)
    if "beta" not in config:
        return bounds
    if config["beta"] <= 0:
        found = f"{config['beta']:g}"
        raise LossError(
            f"loss_fn_config['beta'] of 'cispo': found {found}; wanted a number > 0, or no beta for the hard clip"
        )
    return {**bounds, "sharpness": config["beta"]}


def _dro_params(config: Config) -> Config:
    beta = config.get("beta", 0.05)  # value of the published example; no document gives a default
    if beta < 0:
        raise LossError(f"loss_fn_config['beta'] of 'dro': found {beta:g}; wanted a number >= 0")
    return {"beta": beta}


@dataclass(frozen=True, slots=True)
class _Spec:
    equation: Callable[..., Tensor]
    required: frozenset[str]
    parse: Callable[[Config], Config]
    keys: tuple[str, ...] = ()
    silent_at_zero_advantage: bool = False  # the value is a multiple of A, so a token with A = 0 is masked
    per_sequence: bool = False  # the ratio is that of the sequence
    optional: frozenset[str] = frozenset()


_RATIO_INPUTS = ("logprobs", "advantages")  # in the order in which the equations take them
_RL = frozenset(_RATIO_INPUTS)
_CLIP = CLIP_KEYS
_BOUNDS = ("low", "high")  # the same as parameters of the equations
_PER_TOKEN = frozenset(_CLIP)
_LOSSES = {
    "cross_entropy": _Spec(cross_entropy, frozenset({"weights"}), _no_params),
    "importance_sampling": _Spec(importance_sampling, _RL, _no_params, silent_at_zero_advantage=True),
    "ppo": _Spec(ppo, _RL, _ppo_params, (*_CLIP, "clip_ratio"), silent_at_zero_advantage=True, optional=_PER_TOKEN),
    "cispo": _Spec(cispo, _RL, _cispo_params, (*_CLIP, "beta"), silent_at_zero_advantage=True, optional=_PER_TOKEN),
    "dro": _Spec(dro, _RL, _dro_params, ("beta",)),
    "gspo": _Spec(gspo, _RL, _gspo_params, _CLIP, True, True, _PER_TOKEN | {RATIO_MASK}),
}


def metrics(loss: Loss, logp_T: Array, columns: Mapping[str, Array]) -> dict[str, float]:
    """Metrics of a batch, named ``name:reduction``, over its unmasked positions. Computed in float64.

    Unmasked positions have w != 0. If the batch masks no position (datums without weights), positions with advantage
    and logprob exactly 0 are treated as prompt positions: there 0 is padding, not a log-probability.

    k1 = q - p and k3 = r - 1 - (p - q) are both estimators of KL(q || p).  Schulman 2020,
    joschu.net/blog/kl-approx.html.
    """
    _require_columns(loss, columns)
    counts_T = np.asarray(columns["weights"]) != 0 if "weights" in columns else np.ones(len(logp_T), bool)
    if "logprobs" in loss.required and counts_T.all():
        counts_T = (np.asarray(columns["logprobs"]) != 0) | (np.asarray(columns["advantages"]) != 0)
    if loss.is_per_sequence:
        sequence_x_T = _sequence_log_ratio(logp_T, columns)[counts_T]
    keys = loss.required | (columns.keys() & _PER_TOKEN)
    p_T, *rest = (np.asarray(x, np.float64)[counts_T] for x in (logp_T, *(columns[key] for key in keys)))
    inputs = dict(zip(keys, rest, strict=True))
    if "logprobs" not in inputs:
        weights_T = inputs["weights"]
        return {"nll:mean": _mean(-(p_T * weights_T).sum(), np.abs(weights_T).sum())}
    x_T = p_T - inputs["logprobs"]
    with np.errstate(over="ignore"):  # an overflow is reported as inf
        r_T = np.exp(x_T)
        k3_T = np.expm1(x_T) - x_T
        clipped_r_T = np.exp(sequence_x_T) if loss.is_per_sequence else r_T
    n = len(x_T)
    return {
        "ratio:mean": _mean(r_T.sum(), n),
        "ratio:max": float(r_T.max(initial=0.0)),
        "clip_fraction:mean": _mean(_clipped(loss, clipped_r_T, inputs).sum(), n),
        "kl_k1:mean": _mean(-x_T.sum(), n),
        "kl_k3:mean": _mean(k3_T.sum(), n),
        "logprob_diff:mean": _mean(np.abs(x_T).sum(), n),
        "logprob_diff:max": float(np.abs(x_T).max(initial=0.0)),
    }


def _sequence_log_ratio(logp_T: Array, columns: Mapping[str, Array]) -> Array:
    """As `sequence_log_ratio`, of numpy arrays."""
    if RATIO_MASK in columns:
        counts_T = np.asarray(columns[RATIO_MASK]) != 0
    else:
        counts_T = (np.asarray(columns["advantages"]) != 0) & (np.asarray(columns.get("weights", 1.0)) != 0)
    x_T = np.where(counts_T, np.asarray(logp_T, np.float64) - columns["logprobs"], 0.0)
    sequence_T = columns[SEQUENCE]
    return (np.bincount(sequence_T, x_T) / np.bincount(sequence_T, counts_T).clip(min=1))[sequence_T]


def _clipped(loss: Loss, r_T: Array, inputs: Mapping[str, Array]) -> Array:
    """(T,) bool, whether a token is clipped. ppo and gspo: the clipped term is strictly smaller; cispo: r is out of
    bounds."""
    if "low" not in loss.params:
        return np.zeros(len(r_T), bool)
    low, high = (inputs.get(key, loss.params[name]) for key, name in zip(CLIP_KEYS, _BOUNDS, strict=True))
    below_T, above_T = r_T < low, r_T > high
    adv_T = inputs["advantages"]
    if loss.name in ("ppo", "gspo"):
        return (below_T & (adv_T < 0)) | (above_T & (adv_T > 0))
    return below_T | above_T


def _mean(total: float, count: float) -> float:
    return float(total / count) if count else 0.0


def _require_columns(loss: Loss, columns: Mapping[str, object]) -> None:
    missing = sorted(loss.required - columns.keys())
    if missing:
        raise MissingInputError(f"loss {loss.name!r}: found columns {sorted(columns)}; wanted {missing} too")
