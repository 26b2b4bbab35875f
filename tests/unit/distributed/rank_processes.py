"""Learner ranks as real processes that meet over gloo, and what several tests let them do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch, take
from rlsys.distributed.ranks import Ranks
from rlsys.errors import ActorFailedError
from rlsys.learner.custom_loss import PASSES
from rlsys.learner.learner import Learner
from rlsys.types import AdamParams, Array
from tests.forked import fork_server
from tests.unit.tiny_learner import (
    datums_of,
    draw,
    gradients,
    preference,
    weights,
    with_run,
)
from tests.waiting import cpu_of, until

PROCESSES = 4
PATIENCE_S = 600.0
SHORT_S = 2.0  # of ranks that wait in vain, on a machine that does nothing else
BUDGET = 30  # tokens of a micro-batch
Task = Callable[..., Any]


def free_address(ip: str) -> str:
    """``tcp://ip:port`` with a port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"


@dataclass
class Pool:
    """Processes that do what they are sent, one thing at a time."""

    connections: list[Connection]

    def send(self, process: int, task: Task, *arguments: Any) -> None:
        self.connections[process].send((task, arguments))

    def receive(self, process: int) -> Any:
        until(self.connections[process].poll, f"an answer of process {process}", cpu_of(os.getpid()), poll_s=0.01)
        return self.connections[process].recv()

    def together(self, size: int, task: Task, *arguments: Any) -> list[Any]:
        """What each of `size` ranks returned."""
        answers = self.outcomes(size, task, *arguments)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def outcomes(self, size: int, task: Task, *arguments: Any, patience_s: float = PATIENCE_S) -> list[Any]:
        """The same with errors as values."""
        address = free_address("127.0.0.1")
        for rank in range(size):
            self.send(rank, as_rank, address, rank, size, patience_s, task, arguments)
        return [self.receive(rank) for rank in range(size)]


def serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(task(*arguments))
        except Exception as error:
            connection.send(error)


def as_rank(address: str, rank: int, size: int, patience_s: float, task: Task, arguments: tuple[Any, ...]) -> Any:
    ranks = Ranks.join(address, rank, size, "cpu", patience_s)
    try:
        return task(ranks, *arguments)
    finally:
        ranks.leave()


@contextmanager
def rank_processes() -> Iterator[Pool]:
    """Processes that join a new group for every task of several ranks."""
    context = fork_server()
    pairs = [context.Pipe() for _ in range(PROCESSES)]
    processes = [context.Process(target=serve, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    for _, theirs in pairs:
        theirs.close()
    yield Pool([ours for ours, _ in pairs])
    for ours, _ in pairs:
        ours.close()
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()


def learner_on(ranks: Ranks, path: Path, *, shard: bool = False) -> Learner:
    section = LearnerSection(token_budget=BUDGET, shard_base=shard, num_workers=max(2, ranks.size) if shard else 1)
    return Learner(path, ModelSection(path=str(path)), section, dtype=torch.float32, ranks=ranks)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def found_gradients(ranks: Ranks, path: Path, batch: DatumBatch, loss: str, shard: bool) -> Any:
    """(result, gradient summed over ranks as a step does it, whether this rank's own gradient was another one)."""
    learner = with_run(learner_on(ranks, path, shard=shard))
    if loss == "custom":
        result = learner.forward_backward_custom("run", batch, datums_of(batch), preference)
    else:
        result = learner.forward_backward("run", batch, losses.resolve(loss), temperature=0.9)
    own, total = gradients(learner), {}
    step = learner.runs["run"].stepper.step

    def kept_step(adam: AdamParams) -> None:
        total.update(gradients(learner))
        step(adam)

    learner.runs["run"].stepper.step = kept_step  # type: ignore[method-assign]
    learner.optim_step("run", AdamParams())
    return result, arrays(total), not any(torch.equal(own[name], total[name]) for name in own)


def trained(ranks: Ranks, path: Path, batches: list[DatumBatch], shard: bool = False) -> Any:
    """(norms, adapter and optimizer state, log-probabilities) after a step per batch; two calls add up to a step."""
    learner = with_run(learner_on(ranks, path, shard=shard), LoraSection(rank=3, alpha=6.0))
    norms = []
    for batch in batches:
        for part in (np.arange(0, batch.num_datums, 2), np.arange(1, batch.num_datums, 2)):
            learner.forward_backward("run", take(batch, part), losses.resolve("ppo"))
        norms.append(learner.optim_step("run", AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0))["grad_norm"])
    state = learner.runs.state("run")
    logprobs = learner.logprobs("run", batches[0].tokens, batches[0].offsets)
    owned = {**state.weights, **(state.optimizer or {})}
    return norms, arrays({name: value.clone() for name, value in owned.items()}), logprobs


def bad_share(ranks: Ranks, path: Path, good: DatumBatch, bad: DatumBatch, shard: bool) -> Any:
    """The error of a batch in which one rank's share is bad, and the gradient from before and after it."""
    learner, loss = with_run(learner_on(ranks, path, shard=shard)), losses.resolve("importance_sampling")
    learner.forward_backward("run", good, loss)
    before = gradients(learner)
    try:
        learner.forward_backward("run", bad, loss)
    except Exception as error:
        failure = error
    kept = all(torch.equal(a, b) for a, b in zip(before.values(), gradients(learner).values(), strict=True))
    if not shard:
        learner.optim_step("run", AdamParams(1e-2))  # the group goes on
    return failure, kept, arrays(weights(learner))


def in_turns(ranks: Ranks, path: Path, batches: list[DatumBatch], bad: DatumBatch | None) -> Any:
    """(results, gradients) of passes of several runs that take turns, among them a `bad` one of another run. The ranks
    have other numbers of micro-batches."""
    learner, loss = learner_on(ranks, path), losses.resolve("importance_sampling")
    passes = {}
    for seed, batch in enumerate([*batches, *([bad] if bad else [])]):
        with_run(learner, LoraSection(rank=3, alpha=6.0), run=f"run {seed}", seed=seed)
        passes[f"run {seed}"] = learner.forward_backward_in_turns(f"run {seed}", batch, loss)
    results, failures, turns_taken = {}, [], 0
    while passes:
        for run, turns in list(passes.items()):
            turns_taken += 1
            try:
                next(turns)
                continue
            except StopIteration as end:
                results[run] = end.value
            except (IndexError, ActorFailedError) as error:
                failures.append((run, type(error).__name__))
            del passes[run]
    return results, {run: arrays(gradients(learner, run)) for run in results}, failures, turns_taken


def one_bad() -> DatumBatch:
    bad = draw(seed=5)
    victim = int(Ranks(0, 2).shares(bad.lengths)[1][0])
    bad.tokens[bad.offsets[victim]] = 64  # out of the vocabulary, in a datum of rank 1
    return bad


def assert_near(found: dict[str, Array], wanted: dict[str, Array], bound: float = 1e-5) -> None:
    """||g - g'|| <= bound ||g|| for each parameter."""
    assert found.keys() == wanted.keys()
    assert all(np.linalg.norm(value) > 0 for value in wanted.values())
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) <= bound * np.linalg.norm(value), name


def assert_same(answers: list[dict[str, Array]]) -> None:
    for answer in answers[1:]:
        assert all(np.array_equal(answer[name], answers[0][name]) for name in answers[0])


def assert_whole(results: list[Any], wanted: Any) -> None:
    """The same bits on all ranks, and K = 1's up to fp32 rounding: micro-batches are cut otherwise."""
    for result in results:
        assert result.loss_sum == results[0].loss_sum
        assert result.metrics == results[0].metrics
        assert np.array_equal(result.logprobs, results[0].logprobs)
    np.testing.assert_allclose(results[0].logprobs, wanted.logprobs, rtol=2e-5, atol=1e-6)
    assert results[0].metrics.keys() == wanted.metrics.keys()
    for name in wanted.metrics.keys() - {PASSES}:  # more ranks have one micro-batch each sooner
        value = wanted.metrics[name]
        assert results[0].metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
