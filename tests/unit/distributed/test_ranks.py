"""Ranks are real processes that meet over gloo; whatever their number, gradients, results and adapters are as of one.

The processes are started once for the module and join a new group for every test.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch, take
from rlsys.distributed.ranks import ALONE, Ranks
from rlsys.errors import ActorDiedError, ActorFailedError, ClusterError, ConfigError, GradientError, StalledError
from rlsys.learner.adapter_checkpoint import load_run, save_run
from rlsys.learner.custom_loss import PASSES
from rlsys.learner.learner import Learner
from rlsys.learner.packing import bins
from rlsys.learner.token_budget import TokenBudget
from rlsys.types import AdamParams, Array
from tests.unit.tiny_learner import (
    ALL_TARGETS,
    Models,
    base_bytes,
    datums_of,
    draw,
    gradients,
    preference,
    weights,
    with_run,
)
from tests.waiting import cpu_of, slowdown, until

PROCESSES = 4
LONER = 3  # a process that is in no group: one that failed to join cannot join again
PATIENCE_S = 600.0
SHORT_S = 2.0 * round(slowdown())  # of ranks that wait in vain
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


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlsys.learner.learner"])  # imported once, not once for each process
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


def groups(prompts: int = 3, completions: int = 4) -> DatumBatch:
    """As `draw`, in groups that begin with the same 20 tokens."""
    random, parts = np.random.default_rng(2), []
    for _ in range(prompts):
        prompt = random.integers(0, 64, 20)
        parts += [np.concatenate([prompt, random.integers(0, 64, random.integers(2, 15))]) for _ in range(completions)]
    offsets = np.concatenate([[0], np.cumsum([len(part) - 1 for part in parts])])
    columns = {name: random.uniform(-3, -1, offsets[-1]).astype(np.float32) for name in ("logprobs", "advantages")}
    weights = np.ones(offsets[-1], np.float32)
    weights[offsets[:-1, None] + np.arange(19)] = 0.0
    return DatumBatch(
        np.concatenate([part[:-1] for part in parts]).astype(np.int32),
        np.concatenate([part[1:] for part in parts]).astype(np.int32),
        offsets,
        columns | {"weights": weights},
    )


@pytest.mark.parametrize("shard", [False, True])
def test_groups_that_share_their_prompts_give_the_gradients_of_one_rank(
    pool: Pool, tiny_model: Models, shard: bool
) -> None:
    path, batch = tiny_model(True), groups()
    wanted, gradient, _ = found_gradients(ALONE, path, batch, "importance_sampling", False)
    results, found, differs = zip(
        *pool.together(2, found_gradients, path, batch, "importance_sampling", shard), strict=True
    )
    assert all(differs)
    assert_whole(list(results), wanted)
    assert_same(list(found))
    assert_near(found[0], gradient)


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


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_datum_is_in_one_share_and_shares_have_about_as_many_tokens(size: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 200, 40)
    shares = Ranks(0, size).shares(lengths)
    assert sorted(np.concatenate(shares).tolist()) == list(range(40))
    assert all((np.diff(share) > 0).all() and share.dtype == np.int64 for share in shares)
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= lengths.max()
    for rank in range(size):
        assert np.array_equal(Ranks(rank, size).share(lengths), shares[rank])


def test_ranks_without_datums_have_empty_shares() -> None:
    assert [share.tolist() for share in Ranks(0, 4).shares(np.array([5, 9]))] == [[1], [0], [], []]
    assert [share.tolist() for share in Ranks(0, 2).shares(np.array([], np.int64))] == [[], []]
    assert ALONE.share(np.array([3, 0, 2])).tolist() == [0, 1, 2]


def summed(ranks: Ranks, sizes: list[int]) -> list[Array]:
    random = np.random.default_rng(ranks.rank)
    tensors = [torch.from_numpy(random.normal(size=size).astype(np.float32)) for size in sizes]
    ranks.sum_(tensors)
    return [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_has_the_same_bits_on_all_ranks_whatever_its_size(pool: Pool, size: int) -> None:
    sizes = [1, 2, 0, 5, 1001, 70001]
    found = pool.together(size, summed, sizes)
    drawn = [np.random.default_rng(rank) for rank in range(size)]
    wanted = [sum(random.normal(size=n).astype(np.float32) for random in drawn) for n in sizes]
    for column, exact in zip(zip(*found, strict=True), wanted, strict=True):
        assert all(np.array_equal(one, column[0]) for one in column)
        np.testing.assert_allclose(column[0], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["importance_sampling", "custom"])
@pytest.mark.parametrize("size", [2, 3])
def test_gradients_and_results_do_not_depend_on_the_number_of_ranks(
    pool: Pool, tiny_model: Models, size: int, loss: str
) -> None:
    path, batch = tiny_model(True), draw(datums=14, seed=4)
    wanted, gradient, _ = found_gradients(ALONE, path, batch, loss, False)
    results, found, partial = zip(*pool.together(size, found_gradients, path, batch, loss, False), strict=True)
    assert_whole(list(results), wanted)
    assert_same(list(found))
    assert_near(found[0], gradient)
    assert all(partial), "each rank computed the whole batch"


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


@pytest.mark.parametrize("size", [2, 3])
def test_adapters_and_optimizers_are_equal_to_the_bit_on_all_ranks_after_several_steps(
    pool: Pool, tiny_model: Models, size: int
) -> None:
    path = tiny_model(True)
    batches = [draw(datums=count, seed=count) for count in (9, 1, 4, 2)]  # ranks without a datum among them
    norms, owned, logprobs = zip(*pool.together(size, trained, path, batches), strict=True)
    assert_same(list(owned))
    assert all(
        of_rank == norms[0] and np.array_equal(p, logprobs[0]) for of_rank, p in zip(norms, logprobs, strict=True)
    )
    wanted_norms, wanted, wanted_logprobs = trained(ALONE, path, batches)
    np.testing.assert_allclose(norms[0], wanted_norms, rtol=1e-3)
    assert np.abs(logprobs[0] - wanted_logprobs).mean() < 1e-3
    assert owned[0].keys() == wanted.keys()


def test_a_batch_without_datums_is_a_step_of_gradient_zero_on_all_ranks(pool: Pool, tiny_model: Models) -> None:
    path, empty = tiny_model(True), take(draw(), [])
    (norms, owned, _), (again, other, _) = pool.together(2, trained, path, [draw(), empty])
    assert norms == again and norms[1] == 0.0
    assert_same([owned, other])


def without_gradient(ranks: Ranks, path: Path) -> str:
    learner = with_run(learner_on(ranks, path))
    with pytest.raises(GradientError, match="no forward_backward") as caught:
        learner.optim_step("run", AdamParams())
    return str(caught.value)


def test_a_step_without_a_gradient_is_refused_by_all_ranks_alike(pool: Pool, tiny_model: Models) -> None:
    first, second = pool.together(2, without_gradient, tiny_model(True))
    assert first == second


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


def short_of_memory(ranks: Ranks, fits: int, also: str) -> Any:
    """Rank 1 cannot allocate while the budget is above `fits`; rank 0 fails in a way of its own if asked to."""
    budget, sums = TokenBudget(4096, ranks), np.zeros(2)

    def work() -> None:
        sums[:] = 0.0
        with ranks.joint(sums):
            if ranks.rank == 1 and budget.tokens > fits:
                torch.empty(2**52, dtype=torch.uint8)
            if ranks.rank == 0 and also == "fails":
                raise IndexError("of its own")
            sums[ranks.rank] = budget.tokens

    try:
        budget.fitting(work)
    except Exception as error:
        return error
    return budget.tokens, sums.tolist()


def test_ranks_begin_anew_together_when_one_is_out_of_memory(pool: Pool) -> None:
    assert pool.together(2, short_of_memory, 1100, "works") == [(1024, [1024.0, 1024.0])] * 2


def test_a_rank_out_of_memory_does_not_begin_anew_without_one_that_failed(pool: Pool) -> None:
    own, told = pool.outcomes(2, short_of_memory, 1100, "fails")
    assert isinstance(own, IndexError)
    assert isinstance(told, ActorFailedError) and "failed in its share" in str(told)


def one_bad() -> DatumBatch:
    bad = draw(seed=5)
    victim = int(Ranks(0, 2).shares(bad.lengths)[1][0])
    bad.tokens[bad.offsets[victim]] = 64  # out of the vocabulary, in a datum of rank 1
    return bad


def test_what_fails_on_one_rank_fails_on_all_and_leaves_their_gradients(pool: Pool, tiny_model: Models) -> None:
    (told, kept0, owned0), (own, kept1, owned1) = pool.together(
        2, bad_share, tiny_model(True), draw(), one_bad(), False
    )
    assert isinstance(own, IndexError)
    assert isinstance(told, ActorFailedError) and "rank 1 failed in its share" in str(told)
    assert kept0 and kept1
    assert_same([owned0, owned1])


def test_what_fails_on_one_rank_of_a_shared_base_is_an_error_on_the_others_within_the_timeout(
    pool: Pool, tiny_model: Models
) -> None:
    other, failed = pool.outcomes(2, bad_share, tiny_model(True), draw(), one_bad(), True, patience_s=2 * SHORT_S)
    assert isinstance(failed[0], IndexError)
    assert isinstance(other[0], StalledError | ActorDiedError), other
    assert "learner rank 0 of 2: the forward pass" in str(other[0])
    assert other[1] and failed[1]


def joined_alone(address: str) -> Any:
    began = time.monotonic()
    try:
        Ranks.join(address, 0, 2, "cpu", SHORT_S)
    except StalledError as error:
        return str(error), time.monotonic() - began
    raise AssertionError("it met nobody")


def test_a_rank_that_never_comes_is_named_within_the_timeout(pool: Pool) -> None:
    pool.send(LONER, joined_alone, free_address("127.0.0.1"))
    text, seconds = pool.receive(LONER)
    assert "learner rank 0 of 2: not all ranks met at tcp://127.0.0.1" in text
    assert 0.9 * SHORT_S < seconds < 10 * SHORT_S


def joined_at_a_taken_port(address: str) -> str:
    with pytest.raises(ClusterError, match="is taken; wanted a free port") as caught:
        Ranks.join(address, 0, 2, "cpu", SHORT_S)
    return str(caught.value)


def test_a_port_that_is_taken_is_said_to_be(pool: Pool) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        pool.send(LONER, joined_at_a_taken_port, f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        assert "is taken" in str(pool.receive(LONER))


def stays_away(ranks: Ranks, path: Path, over: Path) -> Any:
    """Rank 1 makes no call until rank 0 has given up, and writes that to `over`."""
    learner, began = with_run(learner_on(ranks, path)), time.monotonic()
    if ranks.rank == 1:
        until(over.exists, "rank 0 to give up")
        return None
    try:
        learner.forward_backward("run", draw(), losses.resolve("importance_sampling"))
    except StalledError as error:
        return str(error), time.monotonic() - began
    finally:
        over.touch()
    raise AssertionError("nobody was waited for")


def test_a_rank_that_does_not_call_is_a_stall_within_the_timeout(
    pool: Pool, tiny_model: Models, tmp_path: Path
) -> None:
    (text, seconds), _ = pool.outcomes(2, stays_away, tiny_model(True), tmp_path / "over", patience_s=SHORT_S)
    assert "learner rank 0 of 2: a sum over ranks: after" in text and f"limit {SHORT_S:g} s" in text
    assert 0.9 * SHORT_S < seconds < 10 * SHORT_S


def sharded_facts(ranks: Ranks, path: Path, batch: DatumBatch, shard: bool, scratch: Path) -> Any:
    """What a run on a base is found to be by everything but its gradient."""
    learner = with_run(learner_on(ranks, path, shard=shard))
    learner.forward_backward("run", batch, losses.resolve("importance_sampling"))
    learner.optim_step("run", AdamParams(1e-2))
    probe, canary, _ = learner.probe("run", "float32", batch.tokens[:12])
    folder = scratch / f"rank-{ranks.rank}-of-{ranks.size}"
    save_run(learner, "run", folder, with_optimizer=True)
    learner.runs.create("other", ALL_TARGETS, 5)
    load_run(learner, "other", folder, with_optimizer=True)
    facts = {
        "of the base": learner.logprobs(None, batch.tokens, batch.offsets),
        "of the adapter": learner.logprobs("run", batch.tokens, batch.offsets),
        "of one loaded": learner.logprobs("other", batch.tokens, batch.offsets),
        "of the probe": canary,
        "greedy": np.concatenate(learner.greedy([batch.tokens[:5], batch.tokens[:2]], 6, [63], "run")),
    }
    learner.runs.drop("other")
    snapshot = learner.snapshot("run", "float32")
    return facts, snapshot, probe, learner.identity, base_bytes(learner), sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_shared_by_two_ranks_is_that_of_one(pool: Pool, tiny_model: Models, tied: bool, tmp_path: Path) -> None:
    path, batch = tiny_model(tied), draw(datums=5, seed=4)
    wanted, snapshot, probe, identity, nbytes, files = sharded_facts(ALONE, path, batch, False, tmp_path)
    answers = pool.together(2, sharded_facts, path, batch, True, tmp_path)
    for facts, its_snapshot, its_probe, its_identity, its_bytes, its_files in answers:
        for name, values in wanted.items():
            np.testing.assert_allclose(facts[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
            assert np.array_equal(facts[name], answers[0][0][name]), name
        assert its_snapshot.digest == answers[0][1].digest
        assert its_snapshot.layout == snapshot.layout
        assert its_probe.digest == probe.digest, "its size is that of the whole weight"
        assert its_identity == identity and its_files == files
        assert 0.45 * nbytes < its_bytes < 0.55 * nbytes


@pytest.mark.parametrize(
    ("loss", "datums", "seed", "micro_batches", "tied"),
    [
        ("importance_sampling", 1, 0, [1, 0], True),
        ("importance_sampling", 6, 4, [3, 2], True),
        ("importance_sampling", 6, 4, [3, 2], False),
        ("custom", 2, 0, [1, 1], True),
        ("custom", 6, 4, [3, 2], True),
    ],
)
def test_gradients_on_a_shared_base_are_those_of_one_rank_whatever_each_has_to_do(
    pool: Pool, tiny_model: Models, loss: str, datums: int, seed: int, micro_batches: list[int], tied: bool
) -> None:
    path, batch = tiny_model(tied), draw(datums=datums, seed=seed)
    assert [len(bins(batch.lengths[share], BUDGET)) for share in Ranks(0, 2).shares(batch.lengths)] == micro_batches
    wanted, gradient, _ = found_gradients(ALONE, path, batch, loss, False)
    results, found, _ = zip(*pool.together(2, found_gradients, path, batch, loss, True), strict=True)
    assert_whole(list(results), wanted)
    assert_same(list(found))
    assert_near(found[0], gradient)


def test_a_rank_without_datums_goes_along_with_a_shared_base(pool: Pool, tiny_model: Models) -> None:
    path, batches = tiny_model(True), [draw(datums=1, seed=3), take(draw(), []), draw(datums=7, seed=2)]
    (norms, owned, _), (again, other, _) = pool.together(2, trained, path, batches, True)
    assert norms == again
    assert_same([owned, other])
    np.testing.assert_allclose(norms, trained(ALONE, path, batches)[0], rtol=1e-3)


def test_one_rank_has_nobody_to_share_a_base_with(tiny_model: Models) -> None:
    with pytest.raises(ConfigError, match=r"learner\.shard_base: found one rank; wanted learner\.num_workers"):
        learner_on(ALONE, tiny_model(True), shard=True)


def dies_in_a_sum(ranks: Ranks) -> Any:
    if ranks.rank == 2:
        os._exit(9)
    began = time.monotonic()
    try:
        for _ in range(100):
            ranks.sum_([torch.ones(1000)])
    except (ActorDiedError, StalledError) as error:
        return error, time.monotonic() - began
    raise AssertionError("the dead answered")


def test_a_rank_that_dies_is_an_error_on_the_others_at_once(pool: Pool) -> None:
    """The last test of the module: afterwards one process is gone."""
    address = free_address("127.0.0.1")
    for rank in range(3):
        pool.send(rank, as_rank, address, rank, 3, 5 * SHORT_S, dies_in_a_sum, ())
    answers = [pool.receive(rank) for rank in range(2)]
    assert any(isinstance(error, ActorDiedError) for error, _ in answers), answers
    assert all("learner rank" in str(error) and seconds < 10 * SHORT_S for error, seconds in answers)


DUPLICATE = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN for "
    "details), NCCL version 2.29.7\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 10"
)


def test_two_ranks_on_one_gpu_are_a_fault_of_placement_and_no_death() -> None:
    found = pytest.raises(ActorFailedError, match=r"rank 0 of 2: the sum.*two ranks on one GPU")
    with found as caught, Ranks(0, 2).guard("the sum"):
        raise dist.DistBackendError(DUPLICATE)
    assert not isinstance(caught.value, ActorDiedError), "another rank would be started in vain"
    gone = "NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed"
    with pytest.raises(ActorDiedError, match=r"another rank has died.*NCCL_DEBUG=INFO"), Ranks(0, 2).guard("the sum"):
        raise dist.DistBackendError(gone)
