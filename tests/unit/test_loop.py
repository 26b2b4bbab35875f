"""Both loops against small stages that really compute something, and lose it now and then."""

from __future__ import annotations

import functools
import hashlib
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys import async_loop, loop
from rlsys.config import JobConfig, parse_config
from rlsys.data.problems import Epochs
from rlsys.metrics import Metrics
from rlsys.protocols import (
    DatumsRef,
    LogprobsRef,
    MinibatchPosition,
    PublishedAdapter,
    Ref,
    RewardsRef,
    RolledBack,
    RolloutsRef,
    Stages,
    TrainedStep,
)
from rlsys.run_state.ledger import AGREED, TRAINED, Ledger
from rlsys.types import Array, SamplingParams
from tests.examples import examples

STEPS, BATCH = 6, 3


@functools.cache
def job(every_steps: int = 1, lag: int | None = None, rl: str = "", minibatches: int = 1) -> JobConfig:
    overlapped = f"overlap: {{max_policy_lag: {lag}, minibatches: {minibatches}}}" if lag is not None else ""
    text = f"""
    run: {{name: toy, seed: 4}}
    model: {{path: x}}
    checkpoint: {{every_steps: {every_steps}}}
    rl: {{steps: {STEPS}, problems_per_step: {BATCH}{rl}}}
    eval: {{every_steps: 2}}
    {overlapped}
    sampler: {{max_live_adapters: 5}}
    """
    return parse_config(text)


def ledger() -> Ledger:
    return Ledger(Epochs(num_problems=7, batch=BATCH, seed=4))


@dataclass
class World:
    """A learner whose state is a hash over everything it was ever trained on, and stages that fail by a plan.

    `plan`: what the n-th call of any stage loses: nothing, the work in hand, or the learner. `agreeing`: problems whose
    rewards always agree. Samplers answer in the order asked, one ticket a call, each under the weights at its start.
    """

    config: JobConfig
    plan: list[str]
    state_hash: str = "base"
    version: int = 0  # that the samplers serve
    made: int = 0  # that the learner has
    done: int = -1
    saved: tuple[str, int, bytes] = ("base", 0, b"")
    loaded: str = ""
    lines: list[tuple[str, int]] = field(default_factory=list)
    agreeing: frozenset[int] = frozenset()
    trained: dict[int, TrainedStep] = field(default_factory=dict)
    tickets: dict[int, RolloutsRef] = field(default_factory=dict)
    batch: list[Any] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)
    life: int = 0  # of the learner
    saving: Any = field(default_factory=threading.RLock)

    def loses(self, may_lose_data: bool = True, may_lose_learner: bool = True) -> None:
        with self.lock:
            what = self.plan.pop(0) if self.plan else ""
        if what == "learner" and not may_lose_learner:
            what = "data"
        if what == "learner":
            self.restore()
        if what == "data" and may_lose_data:
            raise RolledBack(None)

    # samplers
    def submit(
        self,
        split: str,
        problems: Array,
        n: int,
        params: SamplingParams,
        occurrence: Array | None = None,
        urgent: bool = False,
    ) -> int:
        self.loses()
        if split == "train" and self.config.overlap.max_policy_lag is None:
            assert self.loaded == self.state_hash, "samplers serve something else than the learner's weights"
        metrics = {
            "sampler/completion_tokens_mean": 1.0,
            "sampler/completion_tokens": 8.0,
            "sampler/truncated_share": 0.0,
        }
        nth = () if occurrence is None else tuple(occurrence.tolist())
        drawn = (split, tuple(problems), params.seed, self.loaded, self.version, nth)
        ticket = max(self.tickets, default=-1) + 1
        self.tickets[ticket] = RolloutsRef((Ref(drawn),), metrics)
        return ticket

    def collect(self, timeout_s: float) -> list[tuple[int, RolloutsRef]]:
        if not self.tickets:
            time.sleep(timeout_s / 20)  # the cores are for the threads of graders and learner
        return [(first := min(self.tickets), self.tickets.pop(first))] if self.tickets else []

    def wait(self, ticket: int) -> RolloutsRef:
        found = self.tickets.pop(ticket)
        self.loses()
        return found

    def forget(self) -> None:
        self.tickets = {}

    def load(self, update: PublishedAdapter) -> Metrics:
        self.version, self.loaded = update.version, update.digest
        return {}

    # graders, advantages
    def grade(self, split: str, rollouts: RolloutsRef) -> RewardsRef:
        self.loses(may_lose_learner=False)  # graders do not know it
        problems = rollouts.refs[0].value[1]
        agreeing = np.array([problem in self.agreeing for problem in problems])
        zeros = np.zeros(len(problems))
        refs: Any = rollouts.refs
        return RewardsRef(refs, {"reward/mean": 0.5}, zeros, zeros.astype(np.int64), agreeing)

    def compute_advantages(
        self, rollouts: RolloutsRef, rewards: RewardsRef, reference: LogprobsRef | None, pieces: int
    ) -> DatumsRef:
        self.loses()
        problems = [problem for ref in rollouts.refs for problem in ref.value[1]]
        outcomes = np.array([AGREED if problem in self.agreeing else TRAINED for problem in problems], np.int8)
        shares = [tuple(share) for share in np.array_split(problems, pieces)]
        drawn_by = [ref.value[2:] for ref in rewards.refs]
        versions = [ref.value[4] for ref in rollouts.refs]
        metrics = {"sampler/version_min": float(min(versions)), "sampler/version_mean": float(np.mean(versions))}
        return DatumsRef(tuple(Ref((share, drawn_by)) for share in shares), metrics, (), outcomes)

    # learner
    def reference(self, rollouts: RolloutsRef) -> LogprobsRef:
        raise AssertionError("there is no KL penalty")

    def learn(self, datums: Any, place: MinibatchPosition) -> LogprobsRef:
        self.loses()
        assert place.first == (not self.batch)
        self.batch.append(datums)
        if place.last:
            self.state_hash = hashlib.sha1(f"{self.state_hash}{self.batch}{place.step}".encode()).hexdigest()
            self.made += 1
            self.batch = []
        return LogprobsRef((), {"policy/version": float(self.made)})

    def publish(self) -> PublishedAdapter:
        self.loses(may_lose_data=False)
        return PublishedAdapter(Ref(None), self.made, self.state_hash, 0)

    def state(self) -> Any:
        return self.life, self.state_hash, self.made

    def restore(self) -> None:
        with self.saving:
            self.life += 1
            self.state_hash, self.made, self.batch = *self.saved[:2], []
            raise RolledBack(self.done)

    # keeper
    def save(self, step: int, ledger: Ledger, state: Any) -> None:
        if self.config.overlap.max_policy_lag is None:
            self.loses(may_lose_data=False)
        with self.saving:
            if state[0] != self.life:  # the learner has gone back since
                raise RolledBack(self.done)
            self.saved, self.done = (*state[1:], ledger.to_bytes()), step

    # observer
    def on_rollback(self, step: int) -> None:
        assert not self.tickets or self.config.overlap.max_policy_lag is not None, "groups that nobody waits for"
        self.lines = [line for line in self.lines if line[1] <= step]

    def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None:
        self.lines.append(("step", step))
        self.trained[step] = trained

    def on_eval(self, step: int, metrics: Metrics, rollouts: RolloutsRef, rewards: RewardsRef) -> None:
        self.lines.append(("eval", step))

    def run(self, book: Ledger, stop_after: int = STEPS) -> int:
        stages = Stages(self, self, self, self, self)
        run = loop.run if self.config.overlap.max_policy_lag is None else async_loop.run
        last = run(
            self.config, stages, book, np.arange(2), self, lambda: self.version >= stop_after * self.config.rl.substeps
        )
        assert self.config.overlap.max_policy_lag is not None or not self.tickets, "groups that nobody waits for"
        return last


@pytest.fixture(scope="module")
def undisturbed() -> World:
    world = World(job(), [])
    assert world.run(ledger()) == STEPS
    return world


PLANS = st.lists(st.sampled_from(["", "", "", "data", "learner"]), max_size=60)


@examples(100)
@given(plan=PLANS, every_steps=st.integers(1, 4))
def test_whatever_is_lost_the_run_ends_as_if_nothing_had_been(
    undisturbed: World, plan: list[str], every_steps: int
) -> None:
    book, world = ledger(), World(job(every_steps), list(plan))
    assert world.run(book) == STEPS
    assert world.state_hash == undisturbed.state_hash
    assert world.lines == undisturbed.lines
    book.audit()
    assert book.counts()["trained"] == STEPS * BATCH
    assert world.done == STEPS


@examples(80)
@given(stop_after=st.integers(1, STEPS), every_steps=st.integers(1, 4), plan=PLANS)
def test_a_run_that_is_stopped_and_gone_on_with_equals_one_that_never_was(
    undisturbed: World, stop_after: int, every_steps: int, plan: list[str]
) -> None:
    first = World(job(every_steps), list(plan))
    done = first.run(ledger(), stop_after)
    assert done == first.done >= stop_after
    state, version, content = first.saved
    second = World(job(every_steps), [], state, version, version, first.done, first.saved, lines=first.lines)
    second.run(Ledger.from_bytes(content, Epochs(num_problems=7, batch=BATCH, seed=4)))
    assert second.state_hash == undisturbed.state_hash
    assert second.lines == undisturbed.lines


@pytest.mark.parametrize("lag", [None, 1])
def test_the_next_step_is_sampled_while_its_weights_are_evaluated(lag: int | None) -> None:
    class Watched(World):
        """Requests and their ends, in order."""

        seen: list[str]

        def submit(self, split: str, *rest: Any, **options: Any) -> int:
            self.seen.append(f"{split}{' first' if options.get('urgent') else ''}")
            return super().submit(split, *rest, **options)

        def wait(self, ticket: int) -> RolloutsRef:
            found = super().wait(ticket)
            self.seen.append(f"{found.refs[0].value[0]} done")
            return found

    world = Watched(job(lag=lag), [])
    world.seen = []
    assert world.run(ledger()) == STEPS
    steps = ["eval first", "train"] * (lag is None) + ["eval first", "train", "train"] * (lag is not None)
    assert world.seen[: len(steps) + 1] == [*steps, "eval done"]
    evaluations = [i for i, what in enumerate(world.seen) if what == "eval first"]
    assert len(evaluations) == 4 and world.seen[evaluations[-1] :] == ["eval first", "eval done"], "no step follows"
    if lag is None:
        assert world.seen.count("train") == STEPS
        assert all(world.seen[i + 1] == "train" for i in evaluations[:-1])


def test_a_steps_rate_counts_from_the_request_for_its_groups() -> None:
    rates: list[float] = []

    class Slow(World):
        def grade(self, split: str, rollouts: RolloutsRef) -> RewardsRef:
            time.sleep(0.2 if split == "eval" else 0)
            return super().grade(split, rollouts)

        def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None:
            rates.append(metrics["sampler/tokens_per_s"])
            assert metrics["time/sample_s"] < 0.2, "what a step waited for"
            super().on_step(step, metrics, trained)

    assert Slow(job(), []).run(ledger()) == STEPS
    beside = [8 / rate for rate in rates[0::2]]  # every other step follows an evaluation
    assert min(beside) >= 0.2, "its groups were being sampled since"


def test_without_a_step_to_make_the_base_is_evaluated_and_saved_once() -> None:
    world = World(parse_config("run: {name: toy}\nmodel: {path: x}\nrl: {steps: 0}"), [])
    assert world.run(ledger()) == 0
    assert world.lines == [("eval", 0)] and world.done == 0


def test_groups_that_agree_are_replaced_until_the_batch_is_full_or_the_rounds_are_over() -> None:
    world, book = World(job(rl=", refill_rounds: 2"), [], agreeing=frozenset({0, 1, 2, 3})), ledger()
    world.run(book)
    book.audit()
    assert {len(one.rollouts.refs) for one in world.trained.values()} <= {1, 2, 3}
    for step, one in world.trained.items():
        wanted = BATCH
        drawn = book.ids(step)
        assert one.problems.tolist() == drawn.tolist()
        for ref in one.rollouts.refs:
            assert len(ref.value[1]) == wanted > 0
            wanted = sum(problem in world.agreeing for problem in ref.value[1])
        assert wanted == 0 or len(one.rollouts.refs) == 3
    assert book.counts()["filtered"] == sum(
        problem in world.agreeing for one in world.trained.values() for problem in one.problems
    )


def draws_of(world: World) -> dict[int, list[tuple[int, int, int]]]:
    """(seed, problem, occurrence) of each group of a step: what its completions are a function of."""
    return {
        step: [
            (seed, int(p), nth)
            for ref in one.rollouts.refs
            for _, ids, seed, _, _, nths in [ref.value]
            for p, nth in zip(ids, nths, strict=True)
        ]
        for step, one in world.trained.items()
    }


CUTS = [
    # lag, pieces, the rl section: every way in which a step is cut into calls
    (None, 1, ""),
    (0, 1, ""),
    (0, 3, ""),
    (2, 3, ""),
    (1, 1, ", substeps: 3"),
    (None, 1, ", refill_rounds: 2"),
    (1, 1, ", refill_rounds: 2"),
]


@pytest.mark.parametrize(("lag", "minibatches", "rl"), CUTS)
@pytest.mark.parametrize("plan", [[], ["", "", "data", "", "", "", "learner"]], ids=["whole", "with losses"])
def test_a_problem_drawn_twice_in_a_step_draws_anew_however_the_step_is_cut_into_calls(
    lag: int | None, minibatches: int, rl: str, plan: list[str]
) -> None:
    agreeing = frozenset({0}) if "refill" in rl else frozenset[int]()
    world = World(job(lag=lag, minibatches=minibatches, rl=rl), list(plan), agreeing=agreeing)
    assert world.run(Ledger(Epochs(num_problems=2, batch=BATCH, seed=4))) == STEPS
    found = draws_of(world)
    every = [draw for draws in found.values() for draw in draws]
    assert len(set(every)) == len(every) >= STEPS * BATCH, "the same seed, problem and occurrence would draw the same"
    for draws in found.values():
        assert len({seed for seed, *_ in draws}) == 1, "nothing but the step is in the seed"
        for problem in (0, 1):
            assert [nth for _, p, nth in draws if p == problem] == list(range(sum(p == problem for _, p, _ in draws)))
    if not agreeing:
        plain = World(job(), [])
        plain.run(Ledger(Epochs(num_problems=2, batch=BATCH, seed=4)))
        assert found == draws_of(plain), "each group draws what it would draw in one call for all"


def test_substeps_share_the_groups_and_only_the_first_is_on_policy() -> None:
    seen: list[tuple[int, bool]] = []

    class Watched(World):
        def learn(self, datums: Any, place: MinibatchPosition) -> LogprobsRef:
            seen.append((place.substep, place.on_policy))
            return super().learn(datums, place)

    world = Watched(job(rl=", substeps: 2"), [])
    assert world.run(ledger()) == STEPS
    assert world.made == 2 * STEPS
    assert seen == [(0, True), (1, False)] * STEPS


@examples(15)
@given(plan=PLANS, every_steps=st.integers(1, 4))
def test_with_lag_0_the_overlapped_loop_makes_the_same_steps_of_the_same_datums(
    undisturbed: World, plan: list[str], every_steps: int
) -> None:
    book, world = ledger(), World(job(every_steps, lag=0), list(plan))
    assert world.run(book) == STEPS
    assert world.state_hash == undisturbed.state_hash
    assert world.lines == undisturbed.lines
    book.audit()


@examples(25)
@given(
    plan=PLANS,
    lag=st.integers(0, 2),
    pieces=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),
    every_steps=st.integers(1, 3),
)
def test_no_token_is_older_than_the_lag_allows_and_every_step_is_made_once(
    plan: list[str], lag: int, pieces: tuple[int, int], every_steps: int
) -> None:
    substeps, minibatches = pieces
    book, world = ledger(), World(job(every_steps, lag, f", substeps: {substeps}", minibatches), list(plan))
    assert world.run(book) == STEPS
    assert [line for line in world.lines if line[0] == "step"] == [("step", step) for step in range(1, STEPS + 1)]
    assert [line for line in world.lines if line[0] == "eval"] == [("eval", step) for step in range(0, STEPS + 1, 2)]
    book.audit()
    assert book.counts()["trained"] == STEPS * BATCH and world.done == STEPS
    for step, one in world.trained.items():
        assert one.problems.tolist() == book.ids(step).tolist()
        for ref in one.rollouts.refs:
            assert (step - 1 - lag) * substeps <= ref.value[4] <= (step - 1) * substeps


def test_the_samplers_are_ahead_by_the_whole_lag_when_nothing_holds_them_up() -> None:
    world = World(job(lag=2), [])
    world.run(ledger())
    assert world.trained[STEPS].rollouts.refs[0].value[4] < STEPS - 1


@examples(15)
@given(stop_after=st.integers(1, STEPS), lag=st.integers(0, 2), plan=PLANS)
def test_an_overlapped_run_that_is_stopped_goes_on_with_the_problems_it_had_drawn(
    stop_after: int, lag: int, plan: list[str]
) -> None:
    first = World(job(lag=lag), list(plan))
    done = first.run(ledger(), stop_after)
    assert done == first.done >= stop_after
    state, version, content = first.saved
    book = Ledger.from_bytes(content, Epochs(num_problems=7, batch=BATCH, seed=4))
    second = World(job(lag=lag), [], state, version, version, first.done, first.saved, lines=first.lines)
    assert second.run(book) == STEPS
    book.audit()
    assert [line for line in second.lines if line[0] == "step"] == [("step", step) for step in range(1, STEPS + 1)]


def test_in_overlapped_running_groups_that_agree_are_replaced_too() -> None:
    world, book = World(job(lag=1, rl=", refill_rounds: 3"), [], agreeing=frozenset({0, 1})), ledger()
    world.run(book)
    book.audit()
    for step, one in world.trained.items():
        assert one.problems.tolist() == book.ids(step).tolist()
        assert sum(problem not in world.agreeing for problem in one.problems) == BATCH


def test_an_error_in_a_thread_ends_the_overlapped_run_with_that_error() -> None:
    class Broken(World):
        def learn(self, datums: Any, place: MinibatchPosition) -> LogprobsRef:
            raise ValueError("cannot learn")

    with pytest.raises(ValueError, match="cannot learn"):
        Broken(job(lag=1), []).run(ledger())


def test_a_learner_that_went_back_is_not_taught_what_was_already_waiting_for_it() -> None:
    class Slow(World):
        calls = 0

        def learn(self, datums: Any, place: MinibatchPosition) -> LogprobsRef:
            self.calls += 1
            time.sleep(0.1)  # the steps after it are whole by then
            if self.calls == 3:
                self.restore()
            return super().learn(datums, place)

    world = Slow(job(lag=2), [])
    assert world.run(ledger()) == STEPS == world.made
    assert [world.trained[step].version for step in range(1, STEPS + 1)] == list(range(STEPS))


def test_an_error_of_a_steps_first_piece_is_heard_before_its_last_piece_is_there() -> None:
    class Broken(World):
        calls = 0

        def learn(self, datums: Any, place: MinibatchPosition) -> LogprobsRef:
            raise ValueError("cannot learn")

        def collect(self, timeout_s: float) -> list[tuple[int, RolloutsRef]]:
            self.calls += 1
            assert self.calls < 1000, "the error was not heard"
            time.sleep(0.001)
            return super().collect(timeout_s) if self.calls == 1 else []

    with pytest.raises(ValueError, match="cannot learn"):
        Broken(job(lag=0, minibatches=3), []).run(ledger())


def test_a_step_is_told_and_evaluated_though_something_is_lost_when_the_next_one_begins(undisturbed: World) -> None:
    class Loses(World):
        lost = False

        def submit(self, *arguments: Any, **options: Any) -> int:
            if self.version == 2 and not self.lost:
                self.lost = True
                raise RolledBack(None)
            return super().submit(*arguments, **options)

    world = Loses(job(lag=0), [])
    assert world.run(ledger()) == STEPS
    assert world.lost and world.lines == undisturbed.lines


@pytest.mark.parametrize("seed", range(15))
def test_losses_in_any_thread_at_any_moment_leave_every_step_made_once(seed: int) -> None:
    rng = random.Random(seed)

    class Uneven(World):
        def learn(self, datums: Any, place: MinibatchPosition) -> LogprobsRef:
            time.sleep(rng.random() * 0.004)
            return super().learn(datums, place)

        def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None:
            time.sleep(rng.random() * 0.004)
            super().on_step(step, metrics, trained)

    plan = [rng.choice(["", "", "", "", "", "data", "learner"]) for _ in range(60)]
    config = job(rng.choice([1, 2, 3]), lag=rng.choice([0, 1, 2]), minibatches=rng.choice([1, 3]))
    world, book = Uneven(config, plan), ledger()
    assert world.run(book) == STEPS == world.made == world.done
    book.audit()
    assert [world.trained[step].version for step in range(1, STEPS + 1)] == list(range(STEPS))
