"""Tensor parallelism: which part of an adapter each worker holds, and the proof that all of them hold all of it.

vLLM cuts an adapter as it cut the layer: B by rows where outputs are split, A by columns where inputs are. Of a fused
layer a worker takes its rows of each of the fused ones:

    B of qkv_proj, two workers      q q q q k k v v        the first holds   q q . . k . v .
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np
import torch

from rlsys.errors import WeightSyncError
from rlsys.weight_sync.tensors import digest_tensors, tensors_of
from rlsys.weight_sync.update import AdapterSnapshot

if TYPE_CHECKING:  # the sampler's process imports this module too
    from vllm.lora.layers.base import BaseLayerWithLoRA

Region = tuple[int, int, int, int]  # first row, end, first column, end of a tensor
Held = tuple[
    str, Sequence[Sequence[Region]]
]  # a worker's digest of its slots; the regions of each tensor of the layout


def pieces(b: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Rows of a fused layer's B, one piece for each of the layers that are fused.

    Raises:
        ValueError: the rows are not those of the layers.
    """
    if sum(sizes) != len(b):
        raise ValueError(f"the engine's layer has outputs of {list(sizes)}; found B with {len(b)} rows")
    return list(b.split(list(sizes)))


class Slicing(Protocol):
    """`slice_lora_a` or `slice_lora_b` of a layer: of several slot pairs it takes a list."""

    @overload
    def __call__(self, weights: torch.Tensor, /) -> torch.Tensor: ...
    @overload
    def __call__(self, weights: list[torch.Tensor | None], /) -> list[torch.Tensor | None]: ...


def regions(
    layer: BaseLayerWithLoRA, shapes: Sequence[tuple[Sequence[int], Sequence[int]] | None]
) -> list[tuple[list[Region], ...]]:
    """What a worker of several takes of A and of B for each slot pair of `layer`, given their whole shapes.

    The layer's own slicing says so, given row and column numbers in the place of weights.
    """
    sides = []
    for side in (0, 1):
        wholes = [None if shape is None else shape[side] for shape in shapes]
        slicing = layer.slice_lora_a if side == 0 else layer.slice_lora_b
        rows, columns = (_taken(slicing, wholes, axis) for axis in (0, 1))
        sides.append([_rectangles(r, c) for r, c in zip(rows, columns, strict=True)])
    return list(zip(*sides, strict=True))


def _taken(slicing: Slicing, wholes: Sequence[Sequence[int] | None], axis: int) -> list[torch.Tensor | None]:
    """Numbers of the rows (axis 0) or columns (axis 1) that are taken of each; None where there is no tensor."""
    numbers = [None if shape is None else _numbers(shape, axis) for shape in wholes]
    if len(numbers) > 1:
        numbers = slicing(numbers)
    elif numbers[0] is not None:
        numbers = [slicing(numbers[0])]
    return [None if part is None else part.select(1 - axis, 0) for part in numbers]


def _numbers(shape: Sequence[int], axis: int) -> torch.Tensor:
    """Each element's row (axis 0) or column (axis 1)."""
    count = torch.arange(shape[axis])
    return (count[:, None] if axis == 0 else count).expand(*shape)


def _rectangles(rows: torch.Tensor | None, columns: torch.Tensor | None) -> list[Region]:
    if rows is None or columns is None:
        return []
    (left, right), *gaps = _spans(columns)
    if gaps:
        raise ValueError("a worker takes columns that are not one behind another")
    return [(top, bottom, left, right) for top, bottom in _spans(rows)]


def _spans(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """5 6 7 9 10  ->  (5, 8) (9, 11)"""
    line = numbers.numpy()
    runs = np.split(line, np.flatnonzero(np.diff(line) != 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def part_of(whole: torch.Tensor, places: Sequence[Region]) -> torch.Tensor:
    """The regions of a tensor, one below another, as a worker holds them."""
    return torch.cat([whole[top:bottom, left:right] for top, bottom, left, right in places])


def proven_digest(where: str, snapshot: AdapterSnapshot, held: Sequence[Held]) -> str:
    """The snapshot's digest, if each worker holds its part bit for bit and together they hold every value.

    Raises:
        WeightSyncError: a worker's part differs, or no worker holds a part of a tensor.
    """
    tensors = tensors_of(snapshot)
    covered = {name: np.zeros(tuple(tensor.shape), np.bool_) for name, tensor in tensors.items()}
    for rank, (digest, places) in enumerate(held):
        parts = {}
        for slot, mine in zip(snapshot.layout, places, strict=True):
            parts[slot.name] = part_of(tensors[slot.name], mine)
            for top, bottom, left, right in mine:
                covered[slot.name][top:bottom, left:right] = True
        wanted = digest_tensors(parts.items())
        if digest != wanted:
            raise WeightSyncError(
                f"{where}: the slots of tensor-parallel worker {rank} of {len(held)} have digest {digest}; its part "
                f"of what the learner sent has {wanted}"
            )
    for name, mask in covered.items():
        if not mask.all():
            raise WeightSyncError(f"{where}: no tensor-parallel worker holds {int((~mask).sum())} values of {name}")
    return snapshot.digest
