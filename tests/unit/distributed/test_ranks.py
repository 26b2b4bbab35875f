"""Gradients, results and adapters do not depend on the number of ranks, and a rank that fails is named."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlsys import losses
from rlsys.datums import DatumBatch, take
from rlsys.distributed.ranks import ALONE, Ranks
from rlsys.errors import ActorDiedError, ActorFailedError, ClusterError, GradientError, StalledError
from rlsys.learner.token_budget import TokenBudget
from rlsys.types import AdamParams, Array
from tests.unit.distributed.rank_processes import (
    SHORT_S,
    Pool,
    as_rank,
    assert_near,
    assert_same,
    assert_whole,
    bad_share,
    found_gradients,
    free_address,
    in_turns,
    learner_on,
    one_bad,
    trained,
)
from tests.unit.tiny_learner import (
    Models,
    draw,
    with_run,
)
from tests.waiting import times, until

LONER = 3  # a process that is in no group: one that failed to join cannot join again


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


def test_ranks_take_equally_many_turns_and_a_pass_that_fails_on_one_leaves_the_others(
    pool: Pool, tiny_model: Models
) -> None:
    path, batches = tiny_model(True), [draw(datums=count, seed=count) for count in (9, 1, 14)]
    for bad in (None, one_bad()):
        answers = pool.together(2, in_turns, path, batches, bad)
        found, gradients_of, failures, turns = zip(*answers, strict=True)
        assert turns[0] == turns[1]
        assert failures == (([], []) if bad is None else ([("run 3", "ActorFailedError")], [("run 3", "IndexError")]))
        for seed, batch in enumerate(batches):
            alone, gradient, _, _ = pool.together(2, in_turns, path, [*batches[:seed], batch], None)[0]
            assert found[0][f"run {seed}"].loss_sum == found[1][f"run {seed}"].loss_sum
            assert found[0][f"run {seed}"].metrics == alone[f"run {seed}"].metrics
            assert_same([gradients_of[0][f"run {seed}"], gradient[f"run {seed}"]])


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


def test_what_fails_on_one_rank_fails_on_all_and_leaves_their_gradients(pool: Pool, tiny_model: Models) -> None:
    (told, kept0, owned0), (own, kept1, owned1) = pool.together(
        2, bad_share, tiny_model(True), draw(), one_bad(), False
    )
    assert isinstance(own, IndexError)
    assert isinstance(told, ActorFailedError) and "rank 1 failed in its share" in str(told)
    assert kept0 and kept1
    assert_same([owned0, owned1])


def joined_alone(address: str, patience_s: float) -> Any:
    began = time.monotonic()
    try:
        Ranks.join(address, 0, 2, "cpu", patience_s)
    except StalledError as error:
        return str(error), time.monotonic() - began
    raise AssertionError("it met nobody")


def test_a_rank_that_never_comes_is_named_within_the_timeout(pool: Pool) -> None:
    pool.send(LONER, joined_alone, free_address("127.0.0.1"), SHORT_S * times())
    text, seconds = pool.receive(LONER)
    assert "learner rank 0 of 2: not all ranks met at tcp://127.0.0.1" in text
    assert 0.9 * SHORT_S * times() < seconds < 10 * SHORT_S * times()


def joined_at_a_taken_port(address: str) -> str:
    with pytest.raises(ClusterError, match="is taken; wanted a free port") as caught:
        Ranks.join(address, 0, 2, "cpu", 60.0)
    return str(caught.value)


def test_a_port_that_is_taken_is_said_to_be(pool: Pool) -> None:

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
    (text, seconds), _ = pool.outcomes(2, stays_away, tiny_model(True), tmp_path / "over", patience_s=SHORT_S * times())
    assert "learner rank 0 of 2: a sum over ranks: after" in text and f"limit {SHORT_S * times():g} s" in text
    assert 0.9 * SHORT_S * times() < seconds < 10 * SHORT_S * times()


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
        pool.send(rank, as_rank, address, rank, 3, 5 * SHORT_S * times(), dies_in_a_sum, ())
    answers = [pool.receive(rank) for rank in range(2)]
    assert any(isinstance(error, ActorDiedError) for error, _ in answers), answers
    assert all("learner rank" in str(error) and seconds < 10 * SHORT_S * times() for error, seconds in answers)


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
