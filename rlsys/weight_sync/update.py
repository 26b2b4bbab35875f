"""An adapter as one flat buffer, learner -> samplers, and a sampler's attestation of it.

The tensors lie end to end in one uint8 array in the order of ``layout``, in the sampler's dtype and with the LoRA scale
(alpha / r) folded into B. An engine's slots therefore hold exactly the bits that were hashed, and a hash over tensors
read back from the engine proves that they arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.types import Array


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
    digest: str  # rlsys.weight_sync.tensors.digest_tensors of the tensors in layout order


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
