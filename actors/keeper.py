"""Checkpoints while the samplers work: packed by the learner after a step, written by a thread of the driver."""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import Future, ThreadPoolExecutor

from actors.learner_group import LearnerGroup
from actors.watchdog import Waiting, Watchdog, watched_all
from rlsys.config import JobConfig
from rlsys.errors import ActorDiedError, DataLostError
from rlsys.ledger import Ledger
from rlsys.run_store import RunStore

FINISH_S = 5.0


class CheckpointKeeper:
    """The loop's ``Keeper``: at most one checkpoint is on its way, and the last one of a run is waited for."""

    def __init__(self, config: JobConfig, store: RunStore, learner: LearnerGroup) -> None:
        self.config, self.store, self.learner = config, store, learner
        self.done = -1 if store.resume is None else store.resume.step
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        learner.flush = self.flush_or_forget

    def save(self, step: int, ledger: Ledger) -> None:
        try:
            self.flush()
            self._writing = self._writer.submit(self._write, step, self.learner.state_files(), ledger.to_bytes())
            self.done = step
            if step >= self.config.rl.steps:
                self.flush()
        except (ActorDiedError, DataLostError) as error:
            self.learner.recover(error)

    def flush(self) -> None:
        """Wait until what is on its way is on the disk.

        Raises:
            CheckpointError: it cannot be written.
            ActorDiedError, DataLostError: the learner died before it had handed it over.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def flush_or_forget(self) -> None:
        """As `flush`, where the learner is dead anyway: what it did not hand over is done again."""
        try:
            self.flush()
        except (ActorDiedError, DataLostError):
            latest = self.store.latest()
            self.done = -1 if latest is None else latest.step

    def finish(self) -> None:
        """At the end of a job, however it came: give a checkpoint that is on its way a moment to arrive."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing], timeout=FINISH_S)

    def close(self) -> None:
        """Once the learner is gone: what it did not hand over fails by that."""
        self._writer.shutdown(wait=True)

    def _write(self, step: int, packing: Waiting, ledger: bytes) -> None:
        dog = Watchdog("save", self.config.watchdog.save_s, self.learner.failures)
        self.store.save(step, watched_all([packing], dog)[0], ledger)
