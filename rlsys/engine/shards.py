"""Tensor parallelism: which part of an adapter each worker holds, and the proof that all of them hold all of it.

vLLM cuts an adapter as it cut the layer: B by rows where outputs are split, A by columns where inputs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlsys.errors import WeightSyncError
from rlsys.weights import AdapterSnapshot, digest_tensors

Region = tuple[int, int, int, int]  # first row, end, first column, end of a tensor
Held = tuple[str, Sequence[Region]]  # a worker's digest of its slots, and the region of each tensor of the layout


def regions(layer: Any, parts: Sequence[str], shapes: Mapping[str, Sequence[int]], cut: bool) -> dict[str, Region]:
    """What this worker takes of the tensors of a layer's `parts`.

    Where the layer is `cut`, its own slicing says so, given row and column numbers in the place of weights.
    """
    found: dict[str, Region] = {}
    for side in ("a", "b"):
        names = [f"{part}.lora_{side.upper()}" for part in parts]
        wholes = [shapes.get(name) for name in names]
        slicing = getattr(layer, f"slice_lora_{side}") if cut else None
        for name, rows, columns in zip(names, _spans(slicing, wholes, 0), _spans(slicing, wholes, 1), strict=True):
            if rows is not None and columns is not None:
                found[name] = (*rows, *columns)
    return found


def _spans(slicing: Any, wholes: Sequence[Sequence[int] | None], axis: int) -> list[tuple[int, int] | None]:
    """First and end of the rows (axis 0) or columns (axis 1) that are taken of each; None where there is no tensor."""
    numbers = [None if shape is None else _numbers(shape, axis) for shape in wholes]
    if slicing is not None and len(numbers) > 1:
        numbers = slicing(numbers)
    elif slicing is not None and numbers[0] is not None:
        numbers = [slicing(numbers[0])]
    return [None if part is None else _span(part, axis) for part in numbers]


def _numbers(shape: Sequence[int], axis: int) -> torch.Tensor:
    """Each element's row (axis 0) or column (axis 1)."""
    count = torch.arange(shape[axis])
    return (count[:, None] if axis == 0 else count).expand(*shape)


def _span(numbers: torch.Tensor, axis: int) -> tuple[int, int]:
    line = numbers.select(1 - axis, 0)
    first = int(line[0])
    if not torch.equal(line, torch.arange(first, first + len(line))):
        raise ValueError(f"a worker takes {'rows' if axis == 0 else 'columns'} that are not one behind another")
    return first, first + len(line)


def proven_digest(where: str, snapshot: AdapterSnapshot, held: Sequence[Held]) -> str:
    """The snapshot's digest, where each worker holds bit for bit its part of it and together they hold the whole.

    Raises:
        WeightSyncError: the worker whose part differs, or the tensor of which a part is nowhere.
    """
    tensors = snapshot.tensors()
    covered = {name: np.zeros(tuple(tensor.shape), np.bool_) for name, tensor in tensors.items()}
    for rank, (digest, places) in enumerate(held):
        parts = {}
        for slot, (top, bottom, left, right) in zip(snapshot.layout, places, strict=True):
            parts[slot.name] = tensors[slot.name][top:bottom, left:right]
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
