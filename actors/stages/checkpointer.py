"""Checkpoints while the samplers work: packed by the learner after a step, written by a thread of the driver."""

from __future__ import annotations

import concurrent.futures
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from actors.faults.watchdog import Waiting, Watchdog, watched_all
from actors.stages.learner_group import LearnerGroup
from rlsys.config import JobConfig
from rlsys.errors import ActorDiedError, DataLostError
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.run_dir import RunStore

FINISH_S = 5.0
LONG_GONE = -1  # a life of the learner that is not its present one


class BackgroundCheckpointer:
    """The loop's ``Checkpointer``: at most one checkpoint is on its way, and the last one of a run is waited for."""

    def __init__(self, config: JobConfig, store: RunStore, learner: LearnerGroup) -> None:
        self.config, self.store, self.learner = config, store, learner
        self.done = -1 if store.resume is None else store.resume.step
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._handing_over = threading.RLock()
        learner.flush = self.flush_or_forget

    def save(self, step: int, ledger: Ledger, state: Waiting) -> None:
        life = self.learner.lives
        try:
            with self._handing_over:
                if not any(state.actor is rank for rank in self.learner.ranks):
                    life = LONG_GONE  # another thread has seen it go back; what it stands after is older than this
                    raise DataLostError(f"the checkpoint of step {step}: the learner has gone back since")
                self.flush()
                self._writing = self._writer.submit(self._write, step, state, ledger.to_bytes())
                self.done = step
                if step >= self.config.rl.steps:
                    self.flush()
        except (ActorDiedError, DataLostError) as error:
            self._forget()
            self.learner.recover(error, life)

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
        with self._handing_over:
            try:
                self.flush()
            except (ActorDiedError, DataLostError):
                self._forget()

    def finish(self) -> None:
        """At the end of a job, however it came: give a checkpoint that is on its way a moment to arrive."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing], timeout=FINISH_S)

    def close(self) -> None:
        """Once the learner is gone: what it did not hand over fails by that."""
        self._writer.shutdown(wait=True)

    def _forget(self) -> None:
        """What was on its way is lost."""
        latest = self.store.latest()
        self.done = -1 if latest is None else latest.step

    def _write(self, step: int, packing: Waiting, ledger: bytes) -> None:
        dog = Watchdog("save", self.config.watchdog.save_s, self.learner.failures)
        self.store.save(step, watched_all([packing], dog)[0], ledger)
