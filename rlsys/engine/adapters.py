"""Mixed into vLLM's worker: adapters installed from plain tensors, and read back from the slots that serve them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from rlsys.engine.lent import borrowed
from rlsys.engine.punica import SegmentedPunica
from rlsys.engine.shards import Held, Region, regions
from rlsys.engine.workers import Answer, answer
from rlsys.weights import digest_tensors

Layout = list[tuple[str, list[int], int, int]]  # (name, shape, offset, nbytes) of each tensor in a snapshot's buffer


class AdapterExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`), so that `collective_rpc` reaches these."""

    model_runner: Any

    def rlsys_answer(self, number: int, method: str, arguments: list[Any]) -> Answer:
        return answer(self, number, method, arguments)

    def rlsys_install(
        self, adapter: int, rank: int, dtype: str, layout: Layout, path: str, leaving: Sequence[int], is_alone: bool
    ) -> str | Held:
        """Put an adapter, whose buffer is lent at `path`, in the place of those that leave; what then is in its slots.

        In one call, since each is a round trip through the engine's loop.
        """
        for other in leaving:
            self.rlsys_remove_adapter(other)
        self.rlsys_add_adapter(adapter, rank, dtype, layout, path)
        return self.rlsys_read_back(adapter, layout) if is_alone else self.rlsys_read_part(adapter, layout)

    def rlsys_add_adapter(self, adapter: int, rank: int, dtype: str, layout: Layout, path: str) -> None:
        """Put an adapter into a free slot."""
        manager = self._rlsys_manager()
        targets = {name for name, _, _ in _slots(manager)}
        unknown = sorted({_module(name) for name, *_ in layout} - targets)
        if unknown:
            raise ValueError(f"the engine has no LoRA slot for {', '.join(unknown)}")
        whole = torch.from_numpy(borrowed(path))
        tensors = {
            f"base_model.model.{name}.weight": whole[at : at + size].view(getattr(torch, dtype)).reshape(shape)
            for name, shape, at, size in layout
        }
        is_zero = not any(tensor.any() for name, tensor in tensors.items() if name.endswith(".lora_B.weight"))
        # alpha = r: the scale is already in B, and a factor of one leaves its bits alone
        helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])
        lora_dtype = manager.lora_config.lora_dtype
        model = LoRAModel.from_lora_tensors(adapter, tensors, helper, device="cpu", dtype=lora_dtype)
        for punica in manager.punica_wrapper_mapping.values():
            if isinstance(punica, SegmentedPunica):
                punica.ranks[adapter] = rank
                if is_zero:
                    punica.zero.add(adapter)
                if any(_module(name) == "lm_head" for name, *_ in layout):
                    punica.unembedding.add(adapter)
        manager.add_adapter(model)
        manager.activate_adapter(adapter)

    def rlsys_remove_adapter(self, adapter: int) -> None:
        manager = self._rlsys_manager()
        manager.remove_adapter(adapter)
        for punica in manager.punica_wrapper_mapping.values():
            if isinstance(punica, SegmentedPunica):
                punica.ranks.pop(adapter, None)
                punica.unembedding.discard(adapter)
                punica.zero.discard(adapter)

    def rlsys_read_back(self, adapter: int, layout: Layout) -> str:
        """Digest, in layout order, of what the forward pass multiplies by; anything beyond the layout must be zero."""
        whole = {name: (0, shape[0], 0, shape[1]) for name, shape, _, _ in layout}
        return self._rlsys_digest(adapter, whole)

    def rlsys_read_part(self, adapter: int, layout: Layout) -> Held:
        """The same of a worker that holds a part of each tensor, and which part that is."""
        shapes = {name: shape for name, shape, _, _ in layout}
        found: dict[str, Region] = {}
        for parts, layer in _layers(self._rlsys_manager()):
            cut = isinstance(layer, BaseLinearLayerWithLoRA) and layer.tp_size > 1  # the unembedding never is
            found |= regions(layer, parts, shapes, cut)
        mine = {name: found[name] for name, *_ in layout}
        return self._rlsys_digest(adapter, mine), list(mine.values())

    def _rlsys_digest(self, adapter: int, mine: dict[str, Region]) -> str:
        manager = self._rlsys_manager()
        slot = manager.lora_index_to_id.index(adapter)
        found: dict[str, torch.Tensor] = {}
        for module, a, b in _slots(manager):
            for name, stacked in ((f"{module}.lora_A", a), (f"{module}.lora_B", b)):
                whole = stacked[slot, 0]
                top, bottom, left, right = mine.get(name, (0, 0, 0, 0))
                rows, columns = bottom - top, right - left
                if not (_all_zero(whole[rows:]) and _all_zero(whole[:rows, columns:])):
                    raise ValueError(f"the engine's slot of {name} holds values outside of shape ({rows}, {columns})")
                found[name] = whole[:rows, :columns]
        return digest_tensors((name, found[name]) for name in mine)

    def rlsys_live_adapters(self) -> list[int]:
        return sorted(adapter for adapter in self._rlsys_manager().lora_index_to_id if adapter is not None)

    def _rlsys_manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager


def _layers(manager: Any) -> Iterator[tuple[list[str], Any]]:
    """(modules that it packs, layer): qkv and gate_up stand for three and two, every other one for itself."""
    for name, layer in manager.modules.items():
        yield manager.packed_modules.get(name, [name]), layer


def _slots(manager: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, A slots, B slots) with qkv and gate_up taken apart into the modules that they pack."""
    for parts, layer in _layers(manager):
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        a, b = (a, b) if isinstance(a, tuple) else ((a,), (b,))
        yield from zip(parts, a, b, strict=True)


def _all_zero(tensor: torch.Tensor) -> bool:
    """Bit for bit, which on CPU takes a tenth of the time of looking at bfloat16."""
    return not tensor.view(torch.uint8).any() if tensor.numel() else True


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
