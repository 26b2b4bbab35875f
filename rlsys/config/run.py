"""Sections ``run``, ``cluster``, ``watchdog``, ``checkpoint``, ``checks`` and ``tracking``: how a run is operated."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from rlsys.config.key_types import Address, Name, PathText, Processes, Seconds, WandbProject, WandbTag
from rlsys.config.section import Section
from rlsys.errors import did_you_mean


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


Stage = Literal["start", "base", "sample", "grade", "reference", "advantage", "learn", "sync", "save"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Stages that show no progress until they end: loading a base or starting an engine; a step of the supervised stage with
# its gate
SLOW_STAGES_S: dict[str, float] = {"start": 900.0, "base": 300.0}


def _known_stages(limits: dict[str, float]) -> dict[str, float]:
    for stage in sorted(limits.keys() - set(STAGES)):
        raise ValueError(f"found the stage {stage!r}; wanted {', '.join(STAGES)}{did_you_mean(stage, STAGES)}")
    return limits


class WatchdogSection(Section):
    """Seconds without progress after which a stage with pending work stops the run. Not the total time of a stage."""

    limit_s: Seconds = 120.0  # of every stage; start has at least 900 s, base (the supervised stage) at least 300 s
    stages: Annotated[dict[str, Seconds], AfterValidator(_known_stages)] = Field(
        default_factory=dict
    )  # stages with a limit of their own, such as {sample: 600}

    def limit_of(self, stage: Stage) -> float:
        return self.stages.get(stage, max(self.limit_s, SLOW_STAGES_S.get(stage, 0.0)))


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
