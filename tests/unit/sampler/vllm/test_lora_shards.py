"""Workers that hold parts of an adapter prove the whole only if every part is right and none is missing."""

from __future__ import annotations

import pytest
import torch

from rlsys.errors import ActorFailedError, WeightSyncError
from rlsys.sampler.vllm.lora_shards import Held, Region, part_of, pieces, proven_digest, regions
from rlsys.sampler.vllm.worker_calls import answer, values
from rlsys.weight_sync.tensors import digest_tensors, snapshot_of

TENSORS = {
    "down.lora_A": torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),
    "down.lora_B": torch.randn(6, 2, generator=torch.Generator().manual_seed(1)),
}
SNAPSHOT = snapshot_of("a", 1, 2, TENSORS, "float32")
B: Region = (0, 6, 0, 2)


def held(columns: tuple[int, int], wrong: float = 0.0) -> Held:
    """By a worker of a layer that is split by inputs."""
    a = TENSORS["down.lora_A"][:, columns[0] : columns[1]] + wrong
    digest = digest_tensors([("down.lora_A", a), ("down.lora_B", TENSORS["down.lora_B"])])
    return digest, [[(0, 2, *columns)], [B]]


def test_parts_that_are_right_and_make_up_the_whole_have_the_whole_s_digest() -> None:
    assert proven_digest("here", SNAPSHOT, [held((0, 4)), held((4, 8))]) == SNAPSHOT.digest


def test_one_wrong_part_is_named() -> None:
    with pytest.raises(WeightSyncError, match="here: the slots of tensor-parallel worker 1 of 2 have digest"):
        proven_digest("here", SNAPSHOT, [held((0, 4)), held((4, 8), wrong=1e-6)])


def test_a_part_that_nobody_holds_is_missed() -> None:
    with pytest.raises(WeightSyncError, match=r"no tensor-parallel worker holds 8 values of down.lora_A"):
        proven_digest("here", SNAPSHOT, [held((0, 4)), held((0, 4))])
    with pytest.raises(WeightSyncError, match=r"holds 2 values"):
        proven_digest("here", SNAPSHOT, [held((0, 4)), held((5, 8))])


class FusedLayer:
    """A worker's slice of gate_up_proj, as vLLM's ColumnParallelLinearWithLoRA cuts it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def slice_lora_a(self, a: torch.Tensor) -> torch.Tensor:
        return a

    def slice_lora_b(self, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([half.chunk(2)[self.rank] for half in b.chunk(2)])


def test_a_worker_of_a_fused_layer_holds_rows_that_do_not_lie_together() -> None:
    tensors = {"gate_up.lora_A": torch.randn(2, 4), "gate_up.lora_B": torch.randn(8, 2)}
    snapshot = snapshot_of("a", 1, 2, tensors, "float32")
    found = [regions(FusedLayer(rank), [((2, 4), (8, 2))]) for rank in (0, 1)]
    assert found[1] == [([(0, 2, 0, 4)], [(2, 4, 0, 2), (6, 8, 0, 2)])]
    workers = []
    for rank, ((in_a, in_b),) in enumerate(found):
        mine = [("gate_up.lora_A", tensors["gate_up.lora_A"])]
        mine.append(("gate_up.lora_B", FusedLayer(rank).slice_lora_b(tensors["gate_up.lora_B"])))
        assert torch.equal(part_of(tensors["gate_up.lora_B"], in_b), mine[1][1])
        workers.append((digest_tensors(mine), [in_a, in_b]))
    assert proven_digest("here", snapshot, workers) == snapshot.digest
    with pytest.raises(WeightSyncError, match=r"no tensor-parallel worker holds 8 values of gate_up\.lora_B"):
        proven_digest("here", snapshot, [workers[1], workers[1]])


def test_a_fused_b_is_cut_only_into_the_layers_that_are_fused() -> None:
    b = torch.arange(8.0)[:, None]
    assert [piece[:, 0].tolist() for piece in pieces(b, [4, 2, 2])] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match=r"outputs of \[4, 2\]; found B with 8 rows"):
        pieces(b, [4, 2])


class Worker:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def halve(self, number: int) -> float:
        return 1 / number if self.rank else self.rank


def test_an_error_of_one_worker_is_an_answer_and_its_name_reaches_the_caller() -> None:
    answers = [answer(Worker(rank), 5, "halve", [0]) for rank in (1, 0)]
    with pytest.raises(ActorFailedError, match=r"sampler 0: halve: worker 1: ZeroDivisionError: .* \(test_lora_shards"):
        values("sampler 0", "halve", 5, answers, 2)
    assert values("s", "halve", 6, [answer(Worker(rank), 6, "halve", [2]) for rank in (1, 0)], 2) == [0, 0.5]


def test_an_answer_to_another_call_is_no_answer() -> None:
    answers = [answer(Worker(0), 6, "halve", [2]), answer(Worker(1), 5, "halve", [2])]
    with pytest.raises(ActorFailedError, match=r"answered by workers \[0\] of 2; wanted an answer from each"):
        values("sampler 0", "halve", 6, answers, 2)
