"""Checkpoints in the background: packed by the learner after a step, written by a thread of the driver."""

from __future__ import annotations

import concurrent.futures
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from actors.faults.watchdog import Waiting, Watchdog, watched_all
from actors.stages.learner_group import LearnerGroup
from rlsys.config import WatchdogSection
from rlsys.errors import ActorDiedError, DataLostError
from rlsys.run_state.ledger import Ledger
from rlsys.run_state.run_dir import RunStore

FINISH_S = 5.0
EARLIER_LAUNCH = -1  # no launch of the learner has this number


class BackgroundCheckpointer:
    """The loop's ``Checkpointer``: at most one checkpoint is being written; `save` waits for the last one of a run."""

    def __init__(self, last_step: int, watchdog: WatchdogSection, store: RunStore, learner: LearnerGroup) -> None:
        self.last_step, self.watchdog, self.store, self.learner = last_step, watchdog, store, learner
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
                    life = EARLIER_LAUNCH  # another thread has rolled it back to an earlier step than this
                    raise DataLostError(f"the checkpoint of step {step}: the learner was rolled back meanwhile")
                self.flush()
                self._writing = self._writer.submit(self._write, step, state, ledger.to_bytes())
                self.done = step
                if step >= self.last_step:
                    self.flush()
        except (ActorDiedError, DataLostError) as error:
            self._forget()
            self.learner.recover(error, life)

    def flush(self) -> None:
        """Wait until a checkpoint that is being written is on the disk.

        Raises:
            CheckpointError: it cannot be written.
            ActorDiedError, DataLostError: the learner died before it had sent the files.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def flush_or_forget(self) -> None:
        """As `flush` after a death of the learner: a checkpoint that it did not send is dropped."""
        with self._handing_over:
            try:
                self.flush()
            except (ActorDiedError, DataLostError):
                self._forget()

    def finish(self) -> None:
        """End of the job: wait a few seconds for a checkpoint that is being written."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing], timeout=FINISH_S)

    def close(self) -> None:
        """Stop the writer, after the learner is gone: a checkpoint that it did not send has failed."""
        self._writer.shutdown(wait=True)

    def _forget(self) -> None:
        """The checkpoint that was being written is lost."""
        latest = self.store.latest()
        self.done = -1 if latest is None else latest.step

    def _write(self, step: int, packing: Waiting, ledger: bytes) -> None:
        dog = Watchdog("save", self.watchdog.limit_of("save"), self.learner.failures)
        self.store.save(step, watched_all([packing], dog)[0], ledger)
