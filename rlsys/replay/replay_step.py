"""Recomputes a step of a run from its saved rollouts and the learner's checkpoint before the step.

Needs no sampler, no grader and no Ray. Advantages, gradients and the optimizer step are computed with the same code as
in the run, and each metric is compared with the one in metrics.jsonl. The run directory is not changed.

If the checkpoint of the previous step does not exist, steps are replayed from an earlier checkpoint, or from the start
of the run, whose adapter is initialised again from run.seed. Every step in between needs its rollouts.
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
from rlsys.config import JobConfig, RlSection
from rlsys.config.relative_paths import resolve_paths
from rlsys.datums import DatumBatch
from rlsys.errors import CheckpointError
from rlsys.learner.learner import Learner
from rlsys.learner.policy import Policy
from rlsys.metrics import Metrics, reduce_metrics
from rlsys.rollouts import Rollouts
from rlsys.run_state.jsonl import METRICS, read_metrics
from rlsys.run_state.resume import checkpoint_steps, read_checkpoint
from rlsys.run_state.run_dir import BASE
from rlsys.run_state.run_info import folder_of_command
from rlsys.run_state.saved_config import read_saved_config
from rlsys.run_state.saved_rollouts import SavedStep, format_steps, load_step, recorded_steps
from rlsys.types import Array
from rlsys.weight_sync.canary import SHORT_TOKENS

# A missing one of these counts as a difference. Other metrics are compared only if the replay computes them.
ALWAYS = ("reward/mean", "datums/count", "loss/sum", "policy/grad_norm")
TOLERANCE = 1e-5  # float32 summed in another order differed by up to 3.3e-6 (docs/replay.md), in the same order by 0
IN_NATS = ("policy/kl_", "policy/logprob_diff_")  # differences of log-probabilities, which are normally near 0


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric, as recorded by the run and as recomputed; None: missing."""

    name: str
    recorded: float | None
    recomputed: float | None
    scale: float  # a difference is reported relative to this value

    @property
    def difference(self) -> float:
        """Difference relative to `scale`; 0.0: bit-identical; inf: one of the two is missing or not finite."""
        if self.recorded is None or self.recomputed is None:
            return math.inf
        if self.recorded == self.recomputed or (math.isnan(self.recorded) and math.isnan(self.recomputed)):
            return 0.0
        apart = abs(self.recorded - self.recomputed)
        return apart / self.scale if math.isfinite(apart) and self.scale > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Piece:
    """A minibatch as the learner received it. The optimizer step follows the last minibatch of a substep."""

    substep: int
    rows: Array  # (D,) completion of each datum
    batch: DatumBatch
    logprobs: Array  # (T,) float32 nats, the learner's p before the substep


@dataclass(frozen=True, slots=True)
class Replay:
    """A recomputed step: its metrics beside the recorded ones, and its minibatches."""

    step: int
    started: int  # step of the checkpoint that the replay started from; 0: the start of the run
    recorded: SavedStep
    figures: tuple[Figure, ...]
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]

    def differing(self, tolerance: float) -> list[Figure]:
        return [figure for figure in self.figures if not figure.difference <= tolerance]


def replay(run_dir: Path, step: int, device: Literal["cpu", "cuda"] | None = None) -> Replay:
    """Recompute a step. `device`: default: that of the run's learner.

    Raises:
        ConfigError: the directory holds no run, or its base cannot be loaded.
        CheckpointError: files of the step are missing (the message lists the steps that can be replayed) or damaged, or
            checkpoint and rollouts belong to different histories of the run.
        DivergedError: as in the run, if this step ended it.
    """
    config = resolve_paths(read_saved_config(run_dir), folder_of_command(run_dir), Path.cwd())
    started = _start(run_dir, config, step)
    policy = _policy(run_dir, config, started, device)
    metrics: Metrics = {}
    for at in range(started + 1, step + 1):
        recorded = load_step(run_dir, at)
        _refuse_other_history(run_dir, recorded, policy.learner.runs.version(policy.run_id), started)
        metrics, pieces = _learn(policy, recorded)
    written = _written(run_dir, step)
    notes = tuple(_notes(config.learner.num_workers, recorded, started, bool(written)))
    return Replay(step, started, recorded, _figures(written, metrics, pieces), pieces, notes)


def replayable(run_dir: Path) -> list[int]:
    """Steps that can be replayed: rollouts exist for them and for all steps since the checkpoint before."""
    return [step for step in recorded_steps(run_dir) if _starting_checkpoint(run_dir, step) is not None]


def _starting_checkpoint(run_dir: Path, step: int) -> int | None:
    """Step of the last checkpoint before `step` (0: start of the run), if rollouts exist for all steps after it."""
    start = max(saved for saved in (0, *checkpoint_steps(run_dir)) if saved < step)
    return start if set(range(start + 1, step + 1)) <= set(recorded_steps(run_dir)) else None


def _start(run_dir: Path, config: JobConfig, step: int) -> int:
    start = _starting_checkpoint(run_dir, step) if step >= 1 else None
    if start is None:
        raise CheckpointError(
            f"{run_dir}: step {step} cannot be replayed. Replayable steps: {format_steps(replayable(run_dir))}. The "
            f"run has rollouts of {format_steps(recorded_steps(run_dir))} and checkpoints after "
            f"{format_steps(checkpoint_steps(run_dir))}. A step needs its rollouts and the checkpoint of the previous "
            "step; an earlier checkpoint (or the start of the run) also serves if the rollouts of all steps in between "
            "exist. To keep more of them in a run, set tracking.rollout_steps (was "
            f"{config.tracking.rollout_steps}) and checkpoint.keep (was {config.checkpoint.keep})"
        )
    return start


def _policy(run_dir: Path, config: JobConfig, started: int, device: str | None) -> Policy:
    """The run's learner as of step `started`, on one rank, for any number of ranks of the run."""
    num_gpus = {"cpu": 0.0, "cuda": config.learner.num_gpus or 1.0}[device or config.learner.device]
    one_rank = {"num_workers": 1, "shard_base": False, "num_gpus": num_gpus}
    config = config.model_copy(
        update={
            "learner": config.learner.model_copy(update=one_rank),
            # a step whose |p - q| stopped the run can be replayed too
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
    """Compute advantages, gradients and optimizer steps as in the run. Returns the metrics of all minibatches."""
    rl = policy.config.rl
    computed = list(_compute_advantages(recorded, rl, policy.config.overlap.max_policy_lag is not None))
    minibatches = recorded.pieces // rl.substeps
    pieces, learned = [], []
    for i, (batch, rows, fresh) in enumerate(part for parts, _ in computed for part in parts):
        substep, place = divmod(i, minibatches)
        first, last, on_policy = place == 0, place == minibatches - 1, substep == 0 and fresh
        p_T, metrics = policy.learn(batch, recorded.step, substep, first=first, last=last, on_policy=on_policy)
        pieces.append(Piece(substep, rows, batch, p_T))
        learned.append(metrics)
    return {**reduce_metrics([metrics for _, metrics in computed]), **reduce_metrics(learned)}, tuple(pieces)


def _compute_advantages(
    recorded: SavedStep, rl: RlSection, overlapped: bool
) -> Iterator[tuple[list[tuple[DatumBatch, Array, bool]], Metrics]]:
    """Yield, for each call of the advantage stage, its minibatches and its metrics. A minibatch has its datums, their
    completions, and whether all tokens are from the newest version. With `overlap` (`rlsys.async_loop`) each call made
    one minibatch; otherwise one call made all of them."""
    if not overlapped:
        batches, rows, metrics, _ = to_minibatches(
            recorded.rollouts, recorded.rewards, rl, recorded.pieces, recorded.reference
        )
        yield [(batch, of, True) for batch, of in zip(batches, rows, strict=True)], metrics
        return
    for groups in np.array_split(np.arange(len(recorded.rollouts.problems)), recorded.pieces):
        share, first_row = _share(recorded, int(groups[0]), int(groups[-1]) + 1)
        (batch,), (of,), metrics, _ = to_minibatches(share.rollouts, share.rewards, rl, 1, share.reference)
        fresh = metrics.get("sampler/version_min", recorded.version) >= recorded.version
        yield [(batch, of + first_row, fresh)], metrics


def _share(recorded: SavedStep, first: int, end: int) -> tuple[SavedStep, int]:
    """The groups [first:end] of a step, and the index of their first completion."""
    full = recorded.rollouts
    row, last_row = np.searchsorted(full.group, [first, end])
    tokens = slice(full.offsets[row], full.offsets[last_row])
    prompts = slice(full.prompt_offsets[first], full.prompt_offsets[end])
    rollouts = Rollouts(
        problems=full.problems[first:end],
        prompt_tokens=full.prompt_tokens[prompts],
        prompt_offsets=full.prompt_offsets[first : end + 1] - prompts.start,
        group=full.group[row:last_row] - np.int32(first),
        tokens=full.tokens[tokens],
        logprobs=full.logprobs[tokens],
        versions=full.versions[tokens],
        offsets=full.offsets[row : last_row + 1] - tokens.start,
        stop_reasons=full.stop_reasons[row:last_row],
    )
    reference = None if recorded.reference is None else recorded.reference[tokens]
    rewards = recorded.rewards[row:last_row]
    return replace(recorded, pieces=1, rollouts=rollouts, rewards=rewards, reference=reference), int(row)


def _refuse_other_history(run_dir: Path, recorded: SavedStep, version: int, started: int) -> None:
    if recorded.version != version:
        raise CheckpointError(
            f"{run_dir}: step {recorded.step}: its rollouts were recorded with the learner at version "
            f"{recorded.version}, but the replay from the checkpoint of step {started} reaches version {version}: "
            "rollouts and checkpoint belong to different histories of the run"
        )


def _written(run_dir: Path, step: int) -> dict[str, float]:
    """Metrics of the step in metrics.jsonl; of repeated values the last one."""
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


def _notes(ranks: int, recorded: SavedStep, started: int, is_written: bool) -> Iterator[str]:
    if started < recorded.step - 1:
        beginning = "the start of the run" if started == 0 else f"the checkpoint of step {started}"
        yield f"started from {beginning} and replayed {format_steps(list(range(started + 1, recorded.step)))} first"
    if not is_written:
        yield f"{METRICS} has no metrics of step {recorded.step}: the run ended during the step, or repeated it"
    if recorded.reference is not None:
        yield "the log-probabilities of the reference are the recorded ones, not recomputed"
    if ranks > 1:
        yield (
            f"the run summed its gradients over {ranks} ranks, the replay uses one: sums are rounded in another order"
        )
