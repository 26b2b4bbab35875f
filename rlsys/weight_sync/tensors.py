"""Converts an adapter's tensors to the buffer of a snapshot and back, and hashes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from rlsys.weight_sync.update import AdapterSnapshot, TensorSlot

DIGEST_BYTES = 16


def snapshot_of(
    run_id: str, version: int, rank: int, tensors: Mapping[str, torch.Tensor], dtype: str
) -> AdapterSnapshot:
    """Lay named tensors (on any device, scale already folded into B) end to end in `dtype`, sorted by name."""
    to = getattr(torch, dtype)
    sizes = {name: tensors[name].numel() * to.itemsize for name in sorted(tensors)}
    buffer = torch.empty(sum(sizes.values()), dtype=torch.uint8)
    layout, ready, at = [], [], 0
    for name, size in sizes.items():
        tensor = tensors[name].detach()
        ready.append((name, buffer[at : at + size].view(to).view(tensor.shape).copy_(tensor)))
        layout.append(TensorSlot(name, tuple(tensor.shape), at, size))
        at += size
    return AdapterSnapshot(run_id, version, rank, dtype, tuple(layout), buffer.numpy(), digest_tensors(ready))


def tensors_of(snapshot: AdapterSnapshot) -> dict[str, torch.Tensor]:
    """name -> tensor, views onto the buffer (read-only when it came through Ray)."""
    buffer = torch.from_numpy(snapshot.buffer)
    dtype = getattr(torch, snapshot.dtype)
    return {
        slot.name: buffer[slot.offset : slot.offset + slot.nbytes].view(dtype).reshape(slot.shape)
        for slot in snapshot.layout
    }


def digest_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash over names, shapes, dtypes and bytes, in the order given."""
    from blake3 import blake3  # only publishing and serving need it; benchmarks.gpu_check runs without it

    digest = blake3()
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest(length=DIGEST_BYTES)
