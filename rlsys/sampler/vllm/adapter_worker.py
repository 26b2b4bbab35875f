"""Mixed into vLLM's worker: adapters installed from plain tensors, and read back from the slots that serve them.

A module of the learner's model and its slots in the engine:

    k_proj          one of the three that vLLM packs into qkv_proj
    o_proj          a separate layer, as qkv_proj of Phi-3 is, which its checkpoints hold fused
    gate_up_proj    of GLM-4: fused in the learner, two slots here. Both get A, and each its rows of B
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import parse_fine_tuned_lora_name

from rlsys.sampler.vllm.cpu_lora import SegmentedPunica
from rlsys.sampler.vllm.lora_shards import Held, Region, pieces, regions
from rlsys.sampler.vllm.shared_buffer import from_shared_buffer
from rlsys.sampler.vllm.text_only import register
from rlsys.sampler.vllm.worker_calls import Answer, answer
from rlsys.weight_sync.tensors import digest_tensors

if TYPE_CHECKING:
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

register()  # this module is imported in each worker before its model is loaded

Layout = list[tuple[str, list[int], int, int]]  # (name, shape, offset, nbytes) of each tensor in a snapshot's buffer
Shape: TypeAlias = Sequence[int]
PREFIX = "base_model.model."  # PEFT's, of a module's name


@dataclass(frozen=True, slots=True)
class Slots:
    """Where one A and one B of every live adapter lie: `a` (adapters, 1, rank, in) and `b` (adapters, 1, out, rank)."""

    module: str  # as the engine calls it
    layer: BaseLayerWithLoRA
    a: torch.Tensor
    b: torch.Tensor


class AdapterExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`), so that `collective_rpc` reaches these."""

    rank: int  # an attribute of the worker, as the next two
    model_runner: LoRAModelRunnerMixin
    distributed_init_method: str

    def rlsys_answer(self, number: int, method: str, arguments: list[object]) -> Answer:
        return answer(self, number, method, arguments)

    def rlsys_meeting_file(self) -> str:
        """The file in which the engine's processes found one another; empty if they did not need one."""
        how, _, path = self.distributed_init_method.partition("://")
        return path if how == "file" else ""

    def rlsys_install(
        self, adapter: int, rank: int, dtype: str, layout: Layout, path: str, leaving: Sequence[int], is_alone: bool
    ) -> str | Held:
        """Put an adapter, whose buffer is lent at `path`, in the place of those that leave; what then is in its slots.

        In one call, since each is a round trip through the engine's loop.
        """
        for other in leaving:
            self.rlsys_remove_adapter(other)
        self.rlsys_add_adapter(adapter, rank, dtype, layout, path)
        read = self.rlsys_read_back if is_alone else self.rlsys_read_part
        return read(adapter, layout, dtype)

    def rlsys_add_adapter(self, adapter: int, rank: int, dtype: str, layout: Layout, path: str) -> None:
        """Put an adapter into a free slot."""
        manager = self._rlsys_manager()
        places = _places(manager, layout)
        whole = torch.from_numpy(from_shared_buffer(path))
        tensors: dict[str, torch.Tensor] = {}
        for name, shape, at, size in layout:
            module, _, side = name.rpartition(".")
            slots = places[module]
            tensor = whole[at : at + size].view(getattr(torch, dtype)).reshape(shape)
            for slot, part in zip(slots, _cut(tensor, side, slots), strict=True):
                tensors[f"{PREFIX}{slot.module}.{side}.weight"] = part
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
                if any(isinstance(slots[0].layer, LogitsProcessorWithLoRA) for slots in places.values()):
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

    def rlsys_read_back(self, adapter: int, layout: Layout, dtype: str) -> str:
        """Digest, in layout order, of what the forward pass multiplies by; anything beyond the layout must be zero.

        `dtype` is that in which the adapter came. Slots may be wider, but must hold its values.
        """
        whole = {name: [(0, shape[0], 0, shape[1])] for name, shape, _, _ in layout}
        return self._rlsys_digest(adapter, layout, dtype, whole)

    def rlsys_read_part(self, adapter: int, layout: Layout, dtype: str) -> Held:
        """The same of a worker that holds a part of each tensor, and which part that is."""
        mine = _parts(self._rlsys_manager(), layout)
        return self._rlsys_digest(adapter, layout, dtype, mine), [mine[name] for name, *_ in layout]

    def _rlsys_digest(self, adapter: int, layout: Layout, dtype: str, mine: Mapping[str, Sequence[Region]]) -> str:
        manager = self._rlsys_manager()
        number = manager.lora_index_to_id.index(adapter)
        read: set[int] = set()  # data pointers

        def filled(stacked: torch.Tensor, name: str, rows: int | None, columns: int) -> torch.Tensor:
            """The part of a slot that a tensor fills."""
            slot = stacked[number, 0]
            rows = len(slot) if rows is None else rows
            if not (_all_zero(slot[rows:]) and _all_zero(slot[:rows, columns:])):
                raise ValueError(f"the engine's slot of {name} holds values outside of shape ({rows}, {columns})")
            read.add(stacked.data_ptr())
            return slot[:rows, :columns]

        places, found = _places(manager, layout), dict[str, torch.Tensor]()
        for name, *_ in layout:
            module, _, side = name.rpartition(".")
            slots = places[module]
            rows = sum(bottom - top for top, bottom, _, _ in mine[name])
            columns = mine[name][0][3] - mine[name][0][2]
            if side == "lora_A":
                copies = [filled(slot.a, name, rows, columns) for slot in slots]
                if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
                    raise ValueError(f"the engine's slots of {name} differ; wanted the same A in each")
                found[name] = copies[0]
            else:
                parts = [filled(slot.b, name, rows if len(slots) == 1 else None, columns) for slot in slots]
                found[name] = torch.cat(parts)
        for slot in _slots(manager):
            for stacked in (slot.a, slot.b):
                if stacked.data_ptr() not in read and not _all_zero(stacked[number]):
                    raise ValueError(f"the engine's slot of {slot.module} holds values outside of shape (0, 0)")
        came = getattr(torch, dtype)
        return digest_tensors((name, _narrowed(name, tensor, came)) for name, tensor in found.items())

    def _rlsys_manager(self) -> LoRAModelManager:
        return self.model_runner.lora_manager._adapter_manager


def _layers(manager: LoRAModelManager) -> Iterator[tuple[str, list[Slots]]]:
    """(name, slots) of each layer that takes adapters: qkv and gate_up have three and two, every other one has one."""
    for name, layer in manager.modules.items():
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        a, b = (a, b) if isinstance(a, tuple) else ((a,), (b,))
        parts = manager.packed_modules.get(name, [name])
        yield name, [Slots(part, layer, *pair) for part, *pair in zip(parts, a, b, strict=True)]


def _slots(manager: LoRAModelManager) -> Iterator[Slots]:
    for _, slots in _layers(manager):
        yield from slots


def _places(manager: LoRAModelManager, layout: Layout) -> dict[str, list[Slots]]:
    """Module of the learner's model -> its slots.

    Raises:
        ValueError: the engine has none for a module.
    """
    by_name: dict[str, list[Slots]] = {}
    for name, slots in _layers(manager):
        by_name |= {name: slots, **{slot.module: [slot] for slot in slots}}
    # of text-and-image models and others whose classes here call their modules otherwise
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    modules = dict.fromkeys(name.rpartition(".")[0] for name, *_ in layout)
    called = {module: parse_fine_tuned_lora_name(f"{PREFIX}{module}.lora_A.weight", mapper)[0] for module in modules}
    unknown = sorted(module for module in modules if called[module] not in by_name)
    if unknown:
        raise ValueError(f"the engine has no LoRA slot for {', '.join(unknown)}")
    return {module: by_name[called[module]] for module in modules}


def _cut(tensor: torch.Tensor, side: str, slots: Sequence[Slots]) -> list[torch.Tensor]:
    """What each slot gets of a tensor: all get A, each its rows of B."""
    if len(slots) == 1 or side == "lora_A":
        return [tensor] * len(slots)
    return pieces(tensor, slots[0].layer.base_layer.output_sizes)


def _parts(manager: LoRAModelManager, layout: Layout) -> dict[str, list[Region]]:
    """Tensor -> the regions of it that this worker holds."""
    shapes = {name: shape for name, shape, _, _ in layout}
    # module here -> shapes of A and B, the learner's module, B's first row
    given: dict[str, tuple[tuple[Shape, Shape], str, int]] = {}
    for module, slots in _places(manager, layout).items():
        a, b = shapes[f"{module}.lora_A"], shapes[f"{module}.lora_B"]
        first, counts = 0, [b[0]] if len(slots) == 1 else slots[0].layer.base_layer.output_sizes
        for slot, rows in zip(slots, counts, strict=True):
            given[slot.module] = ((a, [rows, b[1]]), module, first)
            first += rows
    found: dict[str, list[Region]] = {}
    for _, slots in _layers(manager):
        layer, of = slots[0].layer, [given.get(slot.module) for slot in slots]
        is_cut = isinstance(layer, BaseLinearLayerWithLoRA) and layer.tp_size > 1  # the unembedding never is
        wholes = [None if one is None else one[0] for one in of]
        for one, (in_a, in_b) in zip(of, regions(layer, wholes) if is_cut else _whole(wholes), strict=True):
            if one is not None:
                _, module, first = one
                found[f"{module}.lora_A"] = in_a
                found.setdefault(f"{module}.lora_B", []).extend((t + first, u + first, le, r) for t, u, le, r in in_b)
    return found


def _whole(shapes: Sequence[tuple[Shape, Shape] | None]) -> list[tuple[list[Region], ...]]:
    return [
        ([], []) if shape is None else tuple([(0, rows, 0, columns)] for rows, columns in shape) for shape in shapes
    ]


def _narrowed(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of a slot in the dtype in which they came."""
    narrow = tensor.to(dtype)
    if narrow.dtype != tensor.dtype and not torch.equal(narrow.to(tensor.dtype), tensor):
        raise ValueError(f"the engine's slot of {name} holds values that are not of {dtype}")
    return narrow


def _all_zero(tensor: torch.Tensor) -> bool:
    """Bit for bit, which on CPU takes a tenth of the time of looking at bfloat16."""
    return not tensor.view(torch.uint8).any() if tensor.numel() else True
