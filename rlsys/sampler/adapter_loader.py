"""Adapter versions of an engine: loaded and attested, probed, unloaded, rolled back; kept over the engine's sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast

from rlsys.errors import ActorDiedError, SamplingError, WeightSyncError
from rlsys.sampler.adapter_slots import Adapter, AdapterSlots
from rlsys.sampler.request_runner import RequestRunner
from rlsys.sampler.scoring import Scorer
from rlsys.sampler.vllm.lora_shards import Held, proven_digest
from rlsys.sampler.vllm.shared_buffer import to_shared_buffer
from rlsys.sampler.vllm_engine import VllmEngine
from rlsys.weight_sync.attest import attest, attest_base
from rlsys.weight_sync.canary import BOUND_FACTOR, StartupProbe
from rlsys.weight_sync.update import AdapterSnapshot, Attestation, WeightUpdate


class AdapterLoader:
    """One load, rollback, sleep or wake at a time. `no_unembedding`: why an adapter of the output layer is refused."""

    def __init__(
        self,
        engine: VllmEngine,
        slots: AdapterSlots,
        runner: RequestRunner,
        scorer: Scorer,
        no_unembedding: str | None,
    ) -> None:
        self._engine, self._slots, self._runner, self._scorer = engine, slots, runner, scorer
        self._no_unembedding = no_unembedding
        self._strays: dict[str, float] = {}  # run id -> distance to the learner when last attested
        self._loading = asyncio.Lock()

    async def load(self, update: WeightUpdate, bound: float | None = None) -> Attestation:
        """Install a version, prove by a hash of the engine's slots and by the canary that it is served, then serve it.

        `bound`: nats by which the canary may differ; None: what the noise of learner and engine explains.

        Raises:
            WeightSyncError: the proof failed; the version was unloaded again.
        """
        async with self._loading:
            began = time.perf_counter()
            snapshot = update.snapshot
            self._engine.refuse_asleep()
            self._refuse_unloadable(snapshot)
            leaving = []
            while (key := self._slots.in_the_way(snapshot.run_id)) is not None:
                leaving.append(self._slots.drop(*key).id)
            adapter = self._slots.make(snapshot)
            try:
                digest = await self._install(snapshot, adapter, leaving)
                scored = await self._engine.guarded(self._scorer.score(update.canary_tokens, adapter))
                noise = max(self._scorer.noise, self._strays.get(snapshot.run_id, 0.0))
                seconds = time.perf_counter() - began
                allowed = bound or max(update.bound, BOUND_FACTOR * self._scorer.noise)
                attestation = attest(self._engine.name, update, digest, scored, noise, allowed, seconds)
            except BaseException:
                for gone in (*leaving, adapter.id):
                    await asyncio.shield(self._remove(gone))
                raise
            self._strays[snapshot.run_id] = attestation.distance_new
            if moving := self._slots.add(snapshot.run_id, adapter):
                await self._engine.abort(moving)  # their tokens so far come back as output
            return attestation

    async def probe(self, probe: StartupProbe, bound: float | None = None) -> Attestation:
        """Prove at start-up that the base equals the learner's, at early and late positions, and that adapters reach
        the forward pass. The probe's adapter is unloaded afterwards.

        Raises:
            WeightSyncError: a proof failed, or the adapter's effect was within the engine's noise.
        """
        self._engine.refuse_asleep()
        noise = self._scorer.noise
        scored = await self._engine.guarded(self._scorer.score_at(probe.base.tokens, probe.base.positions))
        attest_base(self._engine.name, probe.base, scored, noise, bound)
        attestation = await self.load(probe.update, bound)
        await self.unload(attestation.run_id, attestation.version)
        if not attestation.has_power:
            raise WeightSyncError(
                f"{self._engine.where}: the probe's versions are {attestation.separation:.3g} nats apart, "
                f"within the engine's noise of {noise:.3g}; wanted a larger B"
            )
        return attestation

    async def unload(self, run_id: str, version: int) -> None:
        """Unload a version.

        Raises:
            SamplingError: it is not loaded, or requests still run on it.
        """
        await self._remove(self._slots.drop(run_id, version).id)

    async def roll_back(self, run_id: str) -> None:
        """Abort the run's requests and unload all its versions; the same version numbers may then be loaded again.

        A learner that was rolled back to a checkpoint reuses these numbers for other weights.
        """
        async with self._loading:
            mine = self._slots.roll_back(run_id)
            self._strays.pop(run_id, None)
            for adapter in mine:
                await asyncio.gather(*adapter.work, return_exceptions=True)  # until the engine has released them
                await self._remove(adapter.id)

    async def sleep(self) -> None:
        """Free the GPU's memory for the learner until `wake`. Does nothing on a CPU. Not run on a GPU yet; read in vLLM
        0.32:

        At level 1 the pool "weights" moves to pinned host memory and comes back to the same addresses
        (device_allocator/sleep_mode_backend.py and cumem.py). Adapters' slots belong to it, since they are made while
        the model loads (v1/worker/gpu_worker.py load_model), so every attested version is still there on waking. The
        KV cache and the prefix cache are dropped (v1/engine/core.py sleep). vLLM would abort running requests and queue
        later ones without a limit: both are refused here.

        Raises:
            SamplingError: requests still run.
        """
        async with self._loading:
            running = self._runner.running
            if running:
                raise SamplingError(
                    f"{self._engine.where}: found {running} running requests; wanted none before it sleeps"
                )
            await self._engine.sleep()

    async def wake(self) -> None:
        """Take the memory back and serve the same versions again. Does nothing if the engine is awake."""
        async with self._loading:
            await self._engine.wake()

    def _refuse_unloadable(self, snapshot: AdapterSnapshot) -> None:
        where, engine = self._where(snapshot), self._engine
        if (snapshot.run_id, snapshot.version) in self._slots:
            raise WeightSyncError(f"{where}: is already served; wanted a new version")
        if snapshot.rank > engine.section.max_lora_rank:
            raise WeightSyncError(
                f"{where}: found rank {snapshot.rank}; "
                f"wanted at most sampler.max_lora_rank = {engine.section.max_lora_rank}"
            )
        if snapshot.dtype != engine.model.dtype:
            raise WeightSyncError(f"{where}: found {snapshot.dtype}; wanted model.dtype {engine.model.dtype}")
        reason = self._no_unembedding
        if reason is not None and any(".layers." not in slot.name for slot in snapshot.layout):
            raise WeightSyncError(
                f"{where}: holds an adapter of the output layer: {reason}; set lora.train_unembed=false"
            )

    async def _install(self, snapshot: AdapterSnapshot, adapter: Adapter, leaving: Sequence[int]) -> str:
        """Install an adapter. Returns the digest of the engine's slots, of which each worker has proved its part."""
        where = self._where(snapshot)
        layout = [(slot.name, list(slot.shape), slot.offset, slot.nbytes) for slot in snapshot.layout]
        is_alone = self._engine.section.tensor_parallel_size == 1
        try:
            with to_shared_buffer(snapshot.buffer) as path:
                held = await self._engine.call_workers(
                    "rlsys_install", adapter.id, snapshot.rank, snapshot.dtype, layout, path, leaving, is_alone
                )
        except ActorDiedError:
            raise
        except Exception as error:  # vLLM raises many types
            raise WeightSyncError(f"{where}: not installed: {error}") from error
        if is_alone:
            return cast(str, held[0])  # what `rlsys_install` returns, here and below
        return await asyncio.to_thread(proven_digest, where, snapshot, cast(list[Held], held))

    async def _remove(self, adapter: int) -> None:
        await self._engine.call_workers("rlsys_remove_adapter", adapter)

    def _where(self, snapshot: AdapterSnapshot) -> str:
        return f"{self._engine.where}, run {snapshot.run_id!r}, version {snapshot.version}"
