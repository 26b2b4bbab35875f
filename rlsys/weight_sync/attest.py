"""Verifies that an engine serves the weights it was sent: compares its scores of the canary with the learner's."""

from __future__ import annotations

import numpy as np

from rlsys.errors import WeightSyncError
from rlsys.types import Array
from rlsys.weight_sync.canary import BOUND_FACTOR, BaseCanary, by_depth
from rlsys.weight_sync.update import Attestation, WeightUpdate

POWER = 2.0  # see `attest`


def distance(a: Array, b: Array) -> float:
    """Mean |a - b| in nats."""
    return float(np.mean(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def attest_base(sampler: str, base: BaseCanary, scored: Array, noise: float, bound: float | None) -> None:
    """Judge log-probabilities `scored` (K,) of the long canary under the base, depth by depth.

    `noise`: nats between two scores of one sequence by this engine. `bound`: nats, replaces the canary's bounds.

    Raises:
        WeightSyncError: the engine computes another function than the learner, and at which positions.
    """
    parts = by_depth(base.positions)
    found = [distance(scored[part], base.logprobs[part]) for *_, part in parts]
    wanted = [bound or max(each, BOUND_FACTOR * noise) for each in base.bounds]
    if all(gap <= most for gap, most in zip(found, wanted, strict=True)):  # a NaN fails
        return
    table = "; ".join(
        f"positions {first}-{last - 1}: {gap:.3g} (at most {most:.3g})"
        for (first, last, _), gap, most in zip(parts, found, wanted, strict=True)
    )
    raise WeightSyncError(
        f"sampler {sampler}: the base model's log-probabilities differ from the learner's. Mean |sampler - learner| in "
        f"nats by position: {table}. A difference that grows with the position comes from rotary embeddings, sliding "
        "windows or scaled positions; a difference at all positions comes from other weights or another precision. Set "
        "checks.max_canary_diff if this engine is known to be that far from the learner"
    )


def attest(
    sampler: str, update: WeightUpdate, digest: str, scored: Array, noise: float, bound: float, seconds: float
) -> Attestation:
    """Judge the canary's log-probabilities `scored` (C - 1,) under the version just installed.

    `noise`: distance of this engine from a learner with the same weights. An engine on the new version is within noise
    of that version and, by the triangle inequality, at least separation - noise from the previous one. So it is surely
    nearer to the new version only if separation > 2 noise. Otherwise the canary proves nothing.

    Raises:
        WeightSyncError: another digest, more than `bound` from the learner, or nearer to the previous version.
    """
    snapshot = update.snapshot
    where = f"sampler {sampler}, run {snapshot.run_id!r}, version {snapshot.version}"
    if digest != snapshot.digest:
        raise WeightSyncError(f"{where}: the engine's slots have digest {digest}; the learner sent {snapshot.digest}")
    new, previous = distance(scored, update.canary_new), distance(scored, update.canary_previous)
    separation = distance(update.canary_new, update.canary_previous)
    has_power = separation > POWER * noise
    found = f"found mean |sampler - learner| {new:.3g} nats to the new version, {previous:.3g} to the previous one"
    if not new <= bound:  # a NaN fails too
        raise WeightSyncError(f"{where}: {found}; wanted at most {bound:.3g} to the new version")
    if has_power and not new < previous:
        raise WeightSyncError(
            f"{where}: {found}, which are {separation:.3g} apart; wanted to be nearer to the new version"
        )
    return Attestation(
        sampler=sampler,
        run_id=snapshot.run_id,
        version=snapshot.version,
        digest=digest,
        distance_new=new,
        distance_previous=previous,
        separation=separation,
        has_power=has_power,
        seconds=seconds,
    )
