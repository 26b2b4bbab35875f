"""Actor of one learner rank: trains a base from scratch if the job asks for it, then trains one run's adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.cluster.meeting_point import meeting_point
from actors.cluster.processors import pin
from actors.forking.client import why_not_forked
from rlsys.config import JobConfig
from rlsys.types import Array
from rlsys.utils import gpu_memory
from rlsys.utils.importing import without_collections

if TYPE_CHECKING:  # the driver loads this module without torch
    from actors.cluster.base_folder import Base
    from rlsys.data.problems import ProblemSet
    from rlsys.datums import DatumBatch
    from rlsys.learner.learner import Learner
    from rlsys.learner.policy import Policy
    from rlsys.protocols import MinibatchPosition
    from rlsys.rollouts import Rollouts
    from rlsys.weight_sync.canary import StartupProbe
    from rlsys.weight_sync.update import WeightUpdate

Metrics = dict[str, float]
WATCH = "watch"  # concurrency group of methods that answer while the learner works


class LearnerActor:
    """Methods that change weights run in one thread, in the order of the calls. Every rank gets the same calls."""

    def __init__(self, config: JobConfig, rank: int) -> None:
        with without_collections():  # at once: the graders start and the samplers import vLLM meanwhile
            from transformers.utils import logging

            import rlsys.learner.policy  # noqa: F401

        logging.disable_progress_bar()  # the job shows its own progress
        self.config, self.rank = config, rank
        self.supervised: list[Metrics] = []
        self.loaded: Learner | None = None
        self.started: Policy | None = None

    @property
    def policy(self) -> Policy:
        assert self.started is not None, "the learner group calls start() first"
        return self.started

    def make_base(self) -> tuple[dict[str, bytes], Metrics]:
        from rlsys.bootstrap.supervised import make_base
        from rlsys.planning.memory import bound_growth
        from rlsys.utils.packed_folder import pack_folder

        assert self.config.model.make
        bound_growth(self.config.model.make.hidden_size)
        with self._on_its_share(), tempfile.TemporaryDirectory(prefix="rlsys-base-") as scratch:
            out = Path(scratch) / "base"
            result = make_base(
                self.config, out, lambda step, metrics: self.supervised.append({"sft/step": step, **metrics})
            )
            return pack_folder(out), result.metrics()

    @ray.method(concurrency_group=WATCH)
    def supervised_since(self, start: int) -> list[Metrics]:
        return self.supervised[start:]

    @ray.method(concurrency_group=WATCH)
    def progress(self) -> tuple[int, int]:
        """Supervised steps, and passes and steps of the policy: it changes while the rank makes progress."""
        return len(self.supervised), self.started.learner.progress() if self.started else 0

    def not_forked(self) -> str:
        return why_not_forked()

    def meeting_point(self) -> str:
        """An address on this node where the ranks can meet."""
        return meeting_point()

    def load(self, base: Base, meeting_point: str | None) -> str:
        """Load the base, and meet the other ranks. Returns the dtype in which the base computes."""
        assert self.loaded is None, "a base is loaded once"
        with self._on_its_share():
            self.loaded = self._load(base, meeting_point)
            return self.loaded.computing_dtype

    def start(self, train: ProblemSet, files: Mapping[str, bytes] | None) -> None:
        """Begin the run on the loaded base, or resume it from `files`."""
        from rlsys.learner.policy import Policy
        from rlsys.weight_sync.canary import canary_tokens

        with self._on_its_share():
            assert self.loaded is not None, "the learner group calls load() first"
            policy = Policy(self.loaded, self.config, canary_tokens(train))
            if files is not None:
                policy.restore(files)
            self.started = policy

    def _load(self, base: Base, meeting_point: str | None) -> Learner:
        from actors.cluster.base_folder import local_folder
        from actors.machine.gpus import refuse_dtype
        from rlsys.architectures.model_shape import hidden_size, read_config
        from rlsys.architectures.support import refuse_unsupported
        from rlsys.distributed.ranks import ALONE, Ranks
        from rlsys.learner.learner import Learner
        from rlsys.planning.memory import bound_growth
        from rlsys.sampler.vllm_build import refuse_other_torch

        section = self.config.learner
        refuse_other_torch(section.device)
        pin(section.cores, "learner.cores")
        ranks = ALONE
        if meeting_point is not None:
            limit = 2 * self.config.watchdog.limit_of(
                "learn"
            )  # the driver's watchdog acts first: it knows which rank is stuck
            ranks = Ranks.join(meeting_point, self.rank, section.num_workers, section.device, limit)
        if section.device == "cuda":
            refuse_dtype(self.config.model.dtype, f"learner rank {self.rank}")
        with local_folder(base) as folder:
            shape = read_config(folder)
            if self.config.model.path is not None:
                refuse_unsupported(
                    shape,
                    self.config.model.path,
                    max_length=self.config.model.max_length,
                    lora=self.config.lora,
                    sampler=self.config.sampler,
                    device=self.config.sampler_device,
                )
            bound_growth(hidden_size(shape))
            name = self.config.model.path or str(
                (self.config.run_dir / "base").absolute()
            )  # as adapter_config.json says
            return Learner(folder, self.config.model, section, base_name=name, ranks=ranks)

    def probe(self) -> StartupProbe:
        with self._on_its_share():
            return self.policy.probe()

    @ray.method(num_returns=2)
    def reference(self, *rollouts: Rollouts) -> tuple[Array, Metrics]:
        from rlsys.rollouts import concatenate

        with self._on_its_share():
            return self.policy.reference(concatenate(rollouts)), {}

    @ray.method(num_returns=2)
    def learn(self, datums: DatumBatch, position: MinibatchPosition) -> tuple[Array, Metrics]:
        with self._on_its_share():
            return self.policy.learn(
                datums,
                position.step,
                position.substep,
                first=position.first,
                last=position.last,
                on_policy=position.on_policy,
            )

    @ray.method(num_returns=2)
    def publish(self) -> tuple[WeightUpdate, dict[str, int | str]]:
        with self._on_its_share():
            update = self.policy.publish()
        snapshot = update.snapshot
        return update, {"version": snapshot.version, "digest": snapshot.digest, "nbytes": snapshot.buffer.nbytes}

    def digest(self) -> str:
        """Of the adapter in the learner's precision: equal on all ranks."""
        return self.policy.digest()

    def state_files(self) -> dict[str, bytes]:
        """A checkpoint's files, from which ``start`` resumes."""
        with self._on_its_share():
            return self.policy.state_files()

    @contextmanager
    def _on_its_share(self) -> Iterator[None]:
        """Limit GPU memory in the block to this rank's share (learner.num_gpus), and free cached memory afterwards:
        an engine on the same GPU needs it to start or to wake up."""
        section = self.config.learner
        gpu_memory.limit(section.device, section.num_gpus)
        try:
            yield
        finally:
            gpu_memory.give_back(section.device, section.num_gpus)
