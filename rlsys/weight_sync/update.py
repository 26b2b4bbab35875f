"""An adapter as one flat buffer, learner -> samplers, and a sampler's attestation of it.

The tensors lie end to end in one uint8 array in the order of ``layout``, in the sampler's dtype and with the LoRA scale
(alpha / r) folded into B. An engine's slots therefore hold exactly the bits that were hashed, and a hash over tensors
read back from the engine proves that they arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from rlsys.types import Array

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies in the buffer. ``name`` is ``<module path>.lora_A`` or ``.lora_B``."""

    name: str
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class AdapterSnapshot:
    """One version of one run's adapter. A is (r, in), B is (out, r), y += B @ (A @ x): the scale is folded into B."""

    run_id: str
    version: int
    rank: int
    dtype: str  # of all tensors, named as in model.dtype
    layout: tuple[TensorSlot, ...]  # sorted by name
    buffer: Array  # (nbytes,) uint8
    digest: str  # digest_tensors of the tensors in layout order

    def tensors(self) -> dict[str, torch.Tensor]:
        """name -> tensor, views onto the buffer (read-only when it came through Ray)."""
        buffer = torch.from_numpy(self.buffer)
        dtype = getattr(torch, self.dtype)
        return {
            slot.name: buffer[slot.offset : slot.offset + slot.nbytes].view(dtype).reshape(slot.shape)
            for slot in self.layout
        }


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """A snapshot, and what a sampler needs to prove that it serves the snapshot.

    The canary is a fixed token sequence, (C,) int32; its log-probabilities are (C - 1,) float32 nats of tokens 1..C-1
    under the learner's new version and under the version published before (the base for the first version). `bound` is
    the mean |sampler - learner| that this model's noise explains (rlsys/weight_sync/canary.py).
    """

    snapshot: AdapterSnapshot
    canary_tokens: Array
    canary_new: Array
    canary_previous: Array
    bound: float  # nats


@dataclass(frozen=True, slots=True)
class Attestation:
    """A sampler's proof that it serves a version: hash of its slots, and distances of its canary in nats."""

    sampler: str
    run_id: str
    version: int
    digest: str
    distance_new: float  # mean |sampler - learner's new version|
    distance_previous: float  # mean |sampler - learner's previous version|
    separation: float  # mean |learner's new - learner's previous|
    has_power: bool  # False if the versions are closer than the engine's noise, so that the canary proves nothing
    seconds: float


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


def digest_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash over names, shapes, dtypes and bytes, in the order given."""
    from blake3 import blake3  # imported here: only publishing and serving need it

    digest = blake3()
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest(length=DIGEST_BYTES)
