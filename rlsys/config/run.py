"""Sections ``run``, ``cluster``, ``watchdog``, ``checkpoint``, ``checks`` and ``tracking``: how a run is operated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsys.config.key_types import Address, Name, PathText, Processes, Seconds, WandbProject, WandbTag
from rlsys.config.section import Section


class RunSection(Section):
    """Where a run is stored, and its seed."""

    name: Name
    dir: PathText = "runs"  # the run directory is dir/name
    seed: int = Field(0, ge=0, lt=2**63)


class ClusterSection(Section):
    address: Address = None  # None: RAY_ADDRESS if set, else a new cluster on this machine for this job
    num_cpus: Processes | None = None  # of a cluster started here; None: all cores
    object_store_gb: float = Field(0.5, ge=0.074, le=1_000_000)  # of a cluster started here; Ray wants 75 MiB

    max_restarts: int = Field(3, ge=0)  # of each actor kind between two completed steps; 0: fail on the first death


class WatchdogSection(Section):
    """Seconds without progress after which a stage with pending work stops the run. Not the total time of a stage."""

    start_s: Seconds = 900.0  # loading a base or starting an engine shows no progress until it ends
    base_s: Seconds = 300.0  # supervised stage: no step
    sample_s: Seconds = 120.0
    grade_s: Seconds = 120.0
    reference_s: Seconds = 120.0
    advantage_s: Seconds = 120.0
    learn_s: Seconds = 120.0
    sync_s: Seconds = 120.0
    save_s: Seconds = 120.0


class CheckpointSection(Section):
    """From what an interrupted run is resumed. In run.dir/name/checkpoints, written while the samplers work."""

    every_steps: int = Field(1, ge=1)
    keep: int = Field(2, ge=1)  # the newest checkpoints


class CheckSection(Section):
    """Bounds (nats, mean over tokens) beyond which the run stops; None: four times the noise of learner and engine on
    this model, at least 1e-3 in float32, 5e-3 in float16 and 1e-2 in bfloat16 (rlsys/weight_sync/canary.py)."""

    max_mean_logprob_diff: float | None = Field(None, gt=0)  # |p - q| of on-policy tokens, every step
    max_canary_diff: float | None = Field(None, gt=0)  # |sampler - learner| of the canary, every sync


class TrackingSection(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in, else offline
    project: WandbProject = "rlsys"
    tags: list[WandbTag] = Field(default_factory=list)  # of the wandb run
    tensorboard: bool = False  # event files in run.dir/name/tensorboard, beside wandb
    rollouts_per_step: int = Field(4, ge=0)  # rows of the rollouts table: those of highest and lowest reward
    rollout_steps: int = Field(20, ge=0)  # newest steps whose full rollouts are kept for `rlsys replay`; 0: none
    log_adapter: bool = False  # as a wandb artifact, at the end
