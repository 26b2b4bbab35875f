"""Door onto the learner: makes the base if asked, then trains one run's adapter on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray

from rlsys.config import JobConfig
from rlsys.types import Array

Facts = dict[str, float]


class LearnerActor:
    """Two threads, so that progress can be asked for during `make_base`."""

    def __init__(self, config: JobConfig) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the job has a progress bar of its own
        self.config = config
        self.supervised: list[Facts] = []

    def make_base(self) -> tuple[dict[str, bytes], Facts]:
        from rlsys.base import pack_folder
        from rlsys.supervised import make_base

        with tempfile.TemporaryDirectory(prefix="rlsys-base-") as scratch:
            out = Path(scratch) / "base"
            result = make_base(
                self.config, out, lambda step, facts: self.supervised.append({"sft/step": step, **facts})
            )
            return pack_folder(out), result.facts()

    def supervised_since(self, start: int) -> list[Facts]:
        return self.supervised[start:]

    def start(self, base: Any, train: Any) -> None:
        from actors.base_folder import local_folder
        from rlsys.learner import Learner
        from rlsys.policy import Policy, canary

        with local_folder(base) as folder:
            name = self.config.model.path or str(
                (self.config.run_dir / "base").absolute()
            )  # as adapter_config.json says
            learner = Learner(folder, self.config.model, self.config.learner, base_name=name)
        self.policy = Policy(learner, self.config, canary(train))

    def probe(self) -> Any:
        return self.policy.probe()

    @ray.method(num_returns=2)
    def reference(self, *rollouts: Any) -> tuple[Array, Facts]:
        from rlsys.rollouts import concatenate

        return self.policy.reference(concatenate(rollouts)), {}

    def step(self, datums: Any, step: int) -> Facts:
        return self.policy.step(datums, step)

    @ray.method(num_returns=2)
    def publish(self) -> tuple[Any, dict[str, Any]]:
        update = self.policy.publish()
        snapshot = update.snapshot
        return update, {"version": snapshot.version, "digest": snapshot.digest, "nbytes": snapshot.buffer.nbytes}

    def adapter_folder(self) -> dict[str, bytes]:
        from rlsys.base import pack_folder

        with tempfile.TemporaryDirectory(prefix="rlsys-adapter-") as scratch:
            self.policy.learner.save_adapter(self.policy.run_id, Path(scratch) / "adapter")
            return pack_folder(Path(scratch) / "adapter")
