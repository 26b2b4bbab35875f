"""Sections ``run``, ``cluster``, ``watchdog``, ``checkpoint``, ``checks`` and ``tracking``: how a run is operated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsys.config.key_types import Address, Name, Processes, Seconds, WandbProject, WandbTag
from rlsys.config.section import Section
from rlsys.utils.shell_paths import PathText


class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    name: Name
    dir: PathText = "runs"  # the run directory is dir/name
    seed: int = Field(0, ge=0, lt=2**63)


class ClusterSection(Section):
    address: Address = None  # None: RAY_ADDRESS if set, else a cluster started on this machine for this job
    num_cpus: Processes | None = None  # of a cluster started here; None: all cores
    object_store_gb: float = Field(0.5, ge=0.074, le=1_000_000)  # of a cluster started here; Ray wants 75 MiB

    max_restarts: int = Field(3, ge=0)  # of actors of one kind without a step done in between; 0: a death ends the run


class WatchdogSection(Section):
    """Seconds without progress (not: seconds in all) after which a stage with work left stops the run."""

    start_s: Seconds = 900.0  # loading a base and starting an engine show no progress until they are done
    base_s: Seconds = 300.0  # supervised stage: no step
    sample_s: Seconds = 120.0
    grade_s: Seconds = 120.0
    reference_s: Seconds = 120.0
    advantage_s: Seconds = 120.0
    learn_s: Seconds = 120.0
    sync_s: Seconds = 120.0
    save_s: Seconds = 120.0


class CheckpointSection(Section):
    """What an interrupted run goes on from. In run.dir/name/checkpoints, written while the samplers work."""

    every_steps: int = Field(1, ge=1)
    keep: int = Field(2, ge=1)  # newest ones


class CheckSection(Section):
    """Bounds (nats, mean over tokens) beyond which the run stops; None: four times the noise of learner and engine on
    this model, at least 1e-3 in float32, 5e-3 in float16 and 1e-2 in bfloat16 (rlsys/weight_sync/canary.py)."""

    max_mean_logprob_diff: float | None = Field(None, gt=0)  # |p - q| of on-policy tokens, every step
    max_canary_diff: float | None = Field(None, gt=0)  # |sampler - learner| of the canary, every sync


class TrackingSection(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in, else offline
    project: WandbProject = "rlsys"
    tags: list[WandbTag] = Field(default_factory=list)  # as wandb takes them
    tensorboard: bool = False  # event files in run.dir/name/tensorboard, beside wandb
    rollouts_per_step: int = Field(4, ge=0)  # rows of the rollouts table: the best and the worst
    rollout_steps: int = Field(20, ge=0)  # newest steps whose rollouts are kept whole, for `rlsys replay`; 0: none
    log_adapter: bool = False  # as a wandb artifact, at the end
