"""A base sharded over two ranks gives the results and gradients of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys import losses
from rlsys.datums import DatumBatch, take
from rlsys.distributed.ranks import ALONE, Ranks
from rlsys.errors import ActorDiedError, ConfigError, StalledError
from rlsys.learner.adapter_checkpoint import load_run, save_run
from rlsys.learner.packing import bins
from rlsys.types import AdamParams
from tests.unit.distributed.rank_processes import (
    BUDGET,
    SHORT_S,
    Pool,
    assert_near,
    assert_same,
    assert_whole,
    bad_share,
    found_gradients,
    learner_on,
    one_bad,
    trained,
)
from tests.unit.tiny_learner import (
    ALL_TARGETS,
    Models,
    base_bytes,
    draw,
    with_run,
)
from tests.waiting import times


def test_what_fails_on_one_rank_of_a_shared_base_is_an_error_on_the_others_within_the_timeout(
    pool: Pool, tiny_model: Models
) -> None:
    other, failed = pool.outcomes(
        2, bad_share, tiny_model(True), draw(), one_bad(), True, patience_s=2 * SHORT_S * times()
    )
    assert isinstance(failed[0], IndexError)
    assert isinstance(other[0], StalledError | ActorDiedError), other
    assert "learner rank 0 of 2: the forward pass" in str(other[0])
    assert other[1] and failed[1]


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
