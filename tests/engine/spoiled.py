"""Workers of an engine that spoil what they hold, or fail, when a test asks for it."""

from __future__ import annotations

from typing import Any

from rlsys.sampler.vllm.adapter_worker import AdapterExtension
from rlsys.sampler.vllm_engine import VllmEngine


class SpoiledExtension(AdapterExtension):
    to_spoil: tuple[int, str] | None = None

    def spoil(self, where: tuple[int, str] | None) -> None:
        """Between installing and reading back: one value of B, in the first slot in use of a module, in the worker of
        a rank."""
        self.to_spoil = where

    def rlsys_add_adapter(self, *args: Any) -> None:
        super().rlsys_add_adapter(*args)
        if self.to_spoil is None:
            return
        rank, module = self.to_spoil
        manager = self._rlsys_manager()
        slot = next(slot for slot, adapter in enumerate(manager.lora_index_to_id) if adapter is not None)
        if self.rank == rank:
            manager.modules[module].lora_b_stacked[0][slot, 0, -1, 0] += 1e-6

    def fail(self, rank: int) -> int:
        if self.rank == rank:
            raise ValueError("on purpose")
        return self.rank


class SpoiledEngine(VllmEngine):
    """Spoils (worker's rank, module) of adapters from the moment that `spoil` is set."""

    spoil: tuple[int, str] | None = None

    def arguments(self) -> dict[str, object]:
        return {**super().arguments(), "worker_extension_cls": "tests.engine.spoiled.SpoiledExtension"}

    async def call_workers(self, method: str, *args: object) -> list[object]:
        if method == "rlsys_install":
            await super().call_workers("spoil", self.spoil)
        return await super().call_workers(method, *args)
