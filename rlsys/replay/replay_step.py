"""A step of a run once more, from what the run has kept: its rollouts, and the learner as it was before the step.

No sampler, no grader and no Ray: rewards are centred, gradients computed and the optimizer stepped by the very code of
the run, and each figure is laid beside the one in metrics.jsonl. Nothing in the run's directory is changed.

Where the checkpoint of the step before is gone, steps are replayed from an earlier one, or from the run's beginning,
whose adapter run.seed makes again; every step on the way needs its rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from transformers.utils import logging

from rlsys.advantages import to_minibatches
from rlsys.config import JobConfig, load_config
from rlsys.config.relative_paths import resolve_paths
from rlsys.datums import DatumBatch
from rlsys.errors import CheckpointError
from rlsys.learner.learner import Learner
from rlsys.learner.policy import Policy
from rlsys.metrics import Metrics, reduce_metrics
from rlsys.rollouts import Rollouts
from rlsys.run_state.jsonl import CONFIG, METRICS, read_metrics
from rlsys.run_state.resume import checkpoint_steps, read_checkpoint
from rlsys.run_state.run_dir import BASE
from rlsys.run_state.run_info import folder_of_command
from rlsys.run_state.saved_rollouts import SavedStep, format_steps, load_step, recorded_steps
from rlsys.types import Array
from rlsys.weight_sync.canary import SHORT_TOKENS

# Without these a step is not the same, whatever else agrees. The run's other figures have no counterpart here.
ALWAYS = ("reward/mean", "datums/count", "loss/sum", "policy/grad_norm")
TOLERANCE = 1e-5  # float32 rounded in another order was up to 3.3e-6 off (docs/replay.md), in the same order not at all
IN_NATS = ("policy/kl_", "policy/logprob_diff_")  # differences of log-probabilities: near 0 when all is well


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, as the run has written it down and as it comes out now; None: there is none."""

    name: str
    recorded: float | None
    recomputed: float | None
    scale: float  # what a difference is measured by

    @property
    def difference(self) -> float:
        """In parts of `scale`; 0.0 is equal to the bit, inf where one of the two is missing or not a number."""
        if self.recorded is None or self.recomputed is None:
            return math.inf
        if self.recorded == self.recomputed or (math.isnan(self.recorded) and math.isnan(self.recomputed)):
            return 0.0
        apart = abs(self.recorded - self.recomputed)
        return apart / self.scale if math.isfinite(apart) and self.scale > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Piece:
    """A batch as the learner had it. An optimizer step is made after the last one of a substep."""

    substep: int
    rows: Array  # (D,) which completion each datum is
    batch: DatumBatch
    logprobs: Array  # (T,) the learner's p, before the substep


@dataclass(frozen=True, slots=True)
class Replay:
    step: int
    started: int  # the checkpoint from which it was reached; 0: the run's beginning
    recorded: SavedStep
    figures: tuple[Figure, ...]
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]

    def differing(self, tolerance: float) -> list[Figure]:
        return [figure for figure in self.figures if not figure.difference <= tolerance]


def replay(run_dir: Path, step: int, device: Literal["cpu", "cuda"] | None = None) -> Replay:
    """Compute the step again; `device` is where, by default the run's own.

    Raises:
        ConfigError: the directory holds no run, or its base cannot be loaded.
        CheckpointError: something of the step is no longer there (and which steps can be replayed), is damaged, or
            checkpoint and rollouts are not of one history.
        DivergedError: as in the run, where the step was the one that ended it.
    """
    config = resolve_paths(load_config(run_dir / CONFIG), folder_of_command(run_dir), Path.cwd())
    started = _start(run_dir, config, step)
    policy = _policy(run_dir, config, started, device)
    metrics: Metrics = {}
    for at in range(started + 1, step + 1):
        recorded = load_step(run_dir, at)
        _refuse_other_history(run_dir, recorded, policy.learner.runs.version(policy.run_id), started)
        metrics, pieces = _learn(policy, recorded)
    written = _written(run_dir, step)
    notes = tuple(_notes(run_dir, config, recorded, started, bool(written)))
    return Replay(step, started, recorded, _figures(written, metrics, pieces), pieces, notes)


def replayable(run_dir: Path) -> list[int]:
    """The steps whose rollouts are there, and with them a way from a checkpoint or from the beginning."""
    return [step for step in recorded_steps(run_dir) if _way(run_dir, step) is not None]


def _way(run_dir: Path, step: int) -> int | None:
    """The step of the nearest checkpoint before, if there are rollouts of all steps from there on."""
    start = max(found for found in (0, *checkpoint_steps(run_dir)) if found < step)
    return start if set(range(start + 1, step + 1)) <= set(recorded_steps(run_dir)) else None


def _start(run_dir: Path, config: JobConfig, step: int) -> int:
    start = _way(run_dir, step) if step >= 1 else None
    if start is None:
        raise CheckpointError(
            f"{run_dir}: step {step} cannot be replayed. Steps that can be: {format_steps(replayable(run_dir))}. "
            f"There are "
            f"rollouts of {format_steps(recorded_steps(run_dir))} and checkpoints after "
            f"{format_steps(checkpoint_steps(run_dir))}; a "
            "step needs its own rollouts, and a checkpoint of the step before, or of an earlier one (0: the run's "
            "beginning) with the rollouts of all steps in between. A run keeps more of them with "
            f"tracking.rollout_steps (it was {config.tracking.rollout_steps}) and checkpoint.keep (it was "
            f"{config.checkpoint.keep})"
        )
    return start


def _policy(run_dir: Path, config: JobConfig, started: int, device: str | None) -> Policy:
    """The run's learner as it was after step `started`, alone, whatever ranks the run had."""
    alone = {"num_workers": 1, "shard_base": False, "device": device or config.learner.device}
    config = config.model_copy(
        update={
            "learner": config.learner.model_copy(update=alone),
            # what stopped the run, if it did, is to be looked at here
            "checks": config.checks.model_copy(update={"max_mean_logprob_diff": math.inf}),
        }
    )
    logging.disable_progress_bar()  # of weights being loaded
    learner = Learner(config.model.path or run_dir / BASE, config.model, config.learner)
    canary = load_step(run_dir, started + 1).rollouts.prompt_tokens[:SHORT_TOKENS]
    policy = Policy(learner, config, canary)
    if started in checkpoint_steps(run_dir):
        policy.restore(read_checkpoint(run_dir, started).files)
    return policy


def _learn(policy: Policy, recorded: SavedStep) -> tuple[Metrics, tuple[Piece, ...]]:
    """Rewards to datums to an update, as the run does it; the figures of all pieces together."""
    computed = list(_compute_advantages(recorded, policy.config))
    minibatches = recorded.pieces // policy.config.rl.substeps
    pieces, learned = [], []
    for i, (batch, rows, fresh) in enumerate(part for parts, _ in computed for part in parts):
        substep, place = divmod(i, minibatches)
        first, last, on_policy = place == 0, place == minibatches - 1, substep == 0 and fresh
        p_T, metrics = policy.learn(batch, recorded.step, substep, first=first, last=last, on_policy=on_policy)
        pieces.append(Piece(substep, rows, batch, p_T))
        learned.append(metrics)
    return {**reduce_metrics([metrics for _, metrics in computed]), **reduce_metrics(learned)}, tuple(pieces)


def _compute_advantages(
    recorded: SavedStep, config: JobConfig
) -> Iterator[tuple[list[tuple[DatumBatch, Array, bool]], Metrics]]:
    """What was centred in one go: of each piece the datums, their completions, and whether no token is of an older
    version; and the figures. In overlapped running (`rlsys.async_loop`) every piece was centred by itself.
    """
    if config.overlap.max_policy_lag is None:
        batches, rows, metrics, _ = to_minibatches(
            recorded.rollouts, recorded.rewards, config.rl, recorded.pieces, recorded.reference
        )
        yield [(batch, of, True) for batch, of in zip(batches, rows, strict=True)], metrics
        return
    for groups in np.array_split(np.arange(len(recorded.rollouts.problems)), recorded.pieces):
        share, first_row = _share(recorded, int(groups[0]), int(groups[-1]) + 1)
        (batch,), (of,), metrics, _ = to_minibatches(share.rollouts, share.rewards, config.rl, 1, share.reference)
        fresh = metrics.get("sampler/version_min", recorded.version) >= recorded.version
        yield [(batch, of + first_row, fresh)], metrics


def _share(recorded: SavedStep, first: int, end: int) -> tuple[SavedStep, int]:
    """The groups from `first` to before `end`, and the number of their first completion."""
    whole = recorded.rollouts
    row, last_row = np.searchsorted(whole.group, [first, end])
    tokens = slice(whole.offsets[row], whole.offsets[last_row])
    prompts = slice(whole.prompt_offsets[first], whole.prompt_offsets[end])
    rollouts = Rollouts(
        problems=whole.problems[first:end],
        prompt_tokens=whole.prompt_tokens[prompts],
        prompt_offsets=whole.prompt_offsets[first : end + 1] - prompts.start,
        group=whole.group[row:last_row] - np.int32(first),
        tokens=whole.tokens[tokens],
        logprobs=whole.logprobs[tokens],
        versions=whole.versions[tokens],
        offsets=whole.offsets[row : last_row + 1] - tokens.start,
        stop_reasons=whole.stop_reasons[row:last_row],
    )
    reference = None if recorded.reference is None else recorded.reference[tokens]
    rewards = recorded.rewards[row:last_row]
    return replace(recorded, pieces=1, rollouts=rollouts, rewards=rewards, reference=reference), int(row)


def _refuse_other_history(run_dir: Path, recorded: SavedStep, version: int, started: int) -> None:
    if recorded.version != version:
        raise CheckpointError(
            f"{run_dir}: step {recorded.step}: its rollouts were recorded with the learner at version "
            f"{recorded.version}, and from the checkpoint of step {started} it comes to version {version}: the two are "
            "not of one history"
        )


def _written(run_dir: Path, step: int) -> dict[str, float]:
    """The step's figures in metrics.jsonl; of two values the later one counts."""
    lines = (line for line in read_metrics(run_dir) if line["stage"] == "rl" and line["step"] == step)
    return {name: value for line in lines for name, value in line.items() if "/" in name}


def _figures(written: Mapping[str, float], metrics: Metrics, pieces: tuple[Piece, ...]) -> tuple[Figure, ...]:
    names = [name for name in metrics if name in written or name in ALWAYS]
    names += [name for name in ALWAYS if name in written and name not in metrics]
    summands = sum(
        float(np.abs(piece.batch.columns["advantages"] * piece.batch.columns["weights"]).sum(dtype=np.float64))
        for piece in pieces
    )

    def scale(name: str) -> float:
        values = [abs(found[name]) for found in (written, metrics) if name in found]
        return max([*values, summands if name == "loss/sum" else 1.0 if name.startswith(IN_NATS) else 0.0])

    return tuple(Figure(name, written.get(name), metrics.get(name), scale(name)) for name in names)


def _notes(run_dir: Path, config: JobConfig, recorded: SavedStep, started: int, is_written: bool) -> Iterator[str]:
    if started < recorded.step - 1:
        beginning = "the run's beginning" if started == 0 else f"the checkpoint of step {started}"
        yield f"reached from {beginning}, through {format_steps(list(range(started + 1, recorded.step)))}"
    if not is_written:
        yield f"{METRICS} has no figures of step {recorded.step}: the run ended within it, or began it anew"
    if recorded.reference is not None:
        yield "the reference's log-probabilities are the recorded ones; they are not computed again"
    if config.learner.num_workers > 1:
        yield (
            f"the run summed its gradient over {config.learner.num_workers} ranks, this is one: sums are rounded in "
            "another order"
        )
