"""Which checkpoints are begun and which are not, where the learner dies in between; no cluster is needed for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.faults.actor_logs import Failures
from actors.faults.watchdog import Waiting
from actors.stages.checkpointer import BackgroundCheckpointer
from actors.stages.learner_group import LearnerGroup, LearnerInit
from rlsys.config import parse_config
from rlsys.data.problems import Epochs
from rlsys.errors import ActorDiedError
from rlsys.protocols import RolledBack
from rlsys.run_state.ledger import Ledger


class Store:
    resume = None
    steps: list[int]

    def __init__(self) -> None:
        self.steps = []

    def latest(self) -> Any:
        return SimpleNamespace(step=self.steps[-1]) if self.steps else None


class Learner(LearnerGroup):
    """Its ranks do nothing."""

    def launch(self, seats: Any) -> None:
        self.lives += 1
        self.ranks = [object()]

    def start(self, init: LearnerInit) -> None:
        pass

    def state(self) -> Waiting:
        return Waiting(None, "learner", "packing", self.ranks[0])


class Keeper(BackgroundCheckpointer):
    dies = False

    def _write(self, step: int, packing: Waiting, ledger: bytes) -> None:
        if self.dies:
            raise ActorDiedError("the learner died while it packed")
        self.store.steps.append(step)  # type: ignore[attr-defined]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Learner, Keeper, Ledger]:
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    config = parse_config("{run: {name: toy}, model: {path: x}, rl: {steps: 7}, cluster: {max_restarts: 3}}")
    store = Store()
    learner = Learner(config, store, Failures(), lambda text: None)
    learner.init = LearnerInit(None, None)  # type: ignore[arg-type]
    learner.launch(())
    return store, learner, Keeper(7, config.watchdog, store, learner), Ledger(Epochs(4, 2, 0))  # type: ignore[arg-type]


def test_a_state_from_before_the_learner_went_back_makes_no_checkpoint(
    parts: tuple[Store, Learner, Keeper, Ledger],
) -> None:
    store, learner, keeper, ledger = parts
    keeper.save(1, ledger, learner.state())
    old = learner.state()
    with pytest.raises(RolledBack) as back:
        learner.recover(ActorDiedError("seen by the learner's thread"))
    assert back.value.step == 1
    with pytest.raises(RolledBack) as again:
        keeper.save(2, ledger, old)
    assert again.value.step == 1 and learner.lives == 2, "it was healed once"
    assert store.steps == [1] and keeper.done == 1
    keeper.save(2, ledger, learner.state())
    keeper.flush()
    assert store.steps == [1, 2]


def test_a_checkpoint_that_was_lost_on_its_way_does_not_count_as_made(
    parts: tuple[Store, Learner, Keeper, Ledger],
) -> None:
    _, learner, keeper, ledger = parts
    keeper.save(5, ledger, learner.state())
    keeper.flush()
    keeper.dies = True
    with pytest.raises(RolledBack) as back:
        keeper.save(7, ledger, learner.state())
    assert back.value.step == 5 == keeper.done


def test_at_the_jobs_end_nobody_starts_the_learner_again(parts: tuple[Store, Learner, Keeper, Ledger]) -> None:
    _, learner, _, _ = parts
    learner.close()
    with pytest.raises(ActorDiedError, match="killed"):
        learner._relaunch(ActorDiedError("killed"))
    assert learner.lives == 1
