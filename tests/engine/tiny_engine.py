"""A random model small enough for every test, and what transformers and PEFT say about it."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.config import SamplerSection
from rlsys.sampler.engine import Sampler
from rlsys.types import Array
from rlsys.weight_sync.canary import BaseCanary, StartupProbe, by_depth, compared
from rlsys.weight_sync.tensors import snapshot_of
from rlsys.weight_sync.update import AdapterSnapshot, WeightUpdate
from tests.waiting import until_async

VOCAB, EOS, MAX_LENGTH = 160, 1, 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SECTION = SamplerSection(
    kv_cache_gb=0.1,
    max_num_seqs=64,
    max_num_batched_tokens=256,  # less than a test's batch: prefills of seeded requests have to wait, not be cut
    max_lora_rank=8,
    max_live_adapters=4,
)
BOUND = 1e-4  # nats, |sampler - transformers| of one token in float32


async def at_work(sampler: Sampler, calls: int = 1) -> None:
    """Until the engine computes for so many calls."""
    before = sampler.engine.heartbeat.advanced
    await until_async(
        lambda: sampler.stats().running_requests == calls and sampler.engine.heartbeat.advanced > before,
        f"an engine at work for {calls} calls",
        state=sampler.stats,
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """The base folder, and what transformers and PEFT say."""

    folder: Path

    def logits(self, tokens: Array, adapter: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """(T, V)"""
        model = _base(self.folder) if adapter is None else _with_peft(self.folder, adapter)
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor(np.asarray(tokens), dtype=torch.long)[None]).logits[0]
        return logits

    def logprobs(self, tokens: Array, adapter: dict[str, torch.Tensor] | None, temperature: float = 1.0) -> Array:
        """(T - 1,) of tokens 1..T-1."""
        logp = torch.log_softmax(self.logits(tokens, adapter)[:-1] / temperature, -1)
        targets = torch.tensor(np.asarray(tokens[1:]), dtype=torch.long)
        scores: Array = logp.gather(1, targets[:, None])[:, 0].numpy()
        return scores

    def adapter(
        self, rank: int, seed: int, *, targets: list[str] = LINEARS, size: float = 0.15
    ) -> dict[str, torch.Tensor]:
        """Random tensors in the names and shapes of a snapshot, scale folded in."""
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, module in _base(self.folder).named_modules():
            if name.rpartition(".")[2] in targets:
                out, inside = module.weight.shape
                tensors[f"{name}.lora_A"] = torch.randn(rank, inside, generator=draw) * size
                tensors[f"{name}.lora_B"] = torch.randn(out, rank, generator=draw) * size
        return tensors

    def startup(
        self, adapter: dict[str, torch.Tensor], previous: dict[str, torch.Tensor] | None = None
    ) -> StartupProbe:
        tokens = (np.arange(MAX_LENGTH) * 13 % VOCAB).astype(np.int32)
        positions = compared(len(tokens))
        scored = self.logprobs(tokens, None)[positions - 1]
        base = BaseCanary(tokens, positions, scored, (BOUND,) * len(by_depth(positions)))
        return StartupProbe(base, self.update("probe", 0, adapter, previous))

    def update(
        self,
        run_id: str,
        version: int,
        adapter: dict[str, torch.Tensor],
        previous: dict[str, torch.Tensor] | None = None,
        snapshot: AdapterSnapshot | None = None,
    ) -> WeightUpdate:
        canary = np.arange(40, dtype=np.int32) * 11 % VOCAB
        rank = min(adapter[name].shape[0] for name in adapter if name.endswith("lora_A"))
        return WeightUpdate(
            snapshot or snapshot_of(run_id, version, rank, adapter, "float32"),
            canary,
            self.logprobs(canary, adapter),
            self.logprobs(canary, previous),
            BOUND,
        )


@cache
def _base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


KEPT = 8  # adapters; the longest loops of these tests ask for the same few again and again
_adapted: deque[tuple[Path, dict[str, torch.Tensor], Any]] = deque(maxlen=KEPT)


def _with_peft(folder: Path, adapter: dict[str, torch.Tensor]) -> Any:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    for base, known, model in _adapted:
        if base == folder and known is adapter:
            return model
    rank = next(tensor.shape[0] for name, tensor in adapter.items() if name.endswith("lora_A"))
    targets = sorted({name.split(".")[-2] for name in adapter})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = get_peft_model(deepcopy(_base(folder)), config)
    set_peft_model_state_dict(model, {f"base_model.model.{name}.weight": tensor for name, tensor in adapter.items()})
    _adapted.append((folder, adapter, model))
    return model
