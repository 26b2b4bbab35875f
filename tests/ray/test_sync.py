"""A sampler that misses a weight sync, or whose engine dies, stops the run and is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest

from actors import job as jobs
from actors.hosting.host_process import HostProcess
from actors.sampler_actor import SamplerActor
from actors.stages.sampler_pool import membership
from actors.stages.sampler_pool.pool import refuse_unattested
from rlsys.config import JobConfig
from rlsys.errors import ActorDiedError, WeightSyncError
from rlsys.protocols import PublishedAdapter, Ref
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.progress import Progress
from rlsys.weight_sync.update import Attestation


class ForgetfulSampler(SamplerActor):
    """Sampler 1 skips the sync of version 1 and answers with what it attested before."""

    last: Attestation

    async def load(self, update: Any, bound: float | None, reload: bool = False) -> Attestation:
        if self.index == 1 and update.snapshot.version == 1:
            return self.last
        self.last = await super().load(update, bound, reload)
        return self.last


def test_one_of_two_samplers_that_skips_a_sync_stops_the_run_and_is_named(
    ray_cluster: str, job: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "SamplerActor", ForgetfulSampler)
    config = job("sampler.num_workers=2", "rl.steps=3")
    with pytest.raises(
        WeightSyncError, match=r"^sampler 1 serves version 0 .* wanted version 1 .*missed a weight sync"
    ):
        jobs.train(config, Progress())
    assert not [line for line in read_metrics(config.run_dir) if "reward/mean" in line], "the step was dropped whole"


class DyingSampler(SamplerActor):
    """Its engine's process is killed before version 1 is loaded."""

    async def load(self, update: Any, bound: float | None, reload: bool = False) -> Attestation:
        if update.snapshot.version == 1:
            assert isinstance(self.host, HostProcess)
            [engine] = [
                each
                for each in psutil.Process(self.host.pid).children(recursive=True)
                if "EngineCore" in each.name() + "".join(each.cmdline())
            ]
            engine.kill()
        return await super().load(update, bound, reload)


@pytest.mark.soak
def test_an_engine_that_dies_again_and_again_stops_the_run_with_its_sampler_and_what_happened(
    ray_cluster: str, job: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "SamplerActor", DyingSampler)
    config = job("rl.steps=3", "cluster.max_restarts=1")
    what = r"^samplers died 2 times without a step in between .*\n.*sampler 0.*its process ended without a word: killed"
    with pytest.raises(ActorDiedError, match=what):
        jobs.train(config, Progress())
    assert (config.run_dir / "report.html").is_file()


HONEST = Attestation(
    sampler="sampler 0", run_id="a", version=3, digest="d3", distance_new=0.0, distance_previous=1.0, separation=1.0,
    has_power=True, seconds=0.1,
)  # fmt: skip
PUBLISHED = PublishedAdapter(ref=Ref(None), version=3, digest="d3", nbytes=8)


@pytest.mark.parametrize("lie", [{"version": 2}, {"digest": "d2"}, {"run_id": "b"}])
def test_an_answer_for_another_version_run_or_content_is_refused(lie: dict[str, Any]) -> None:
    refuse_unattested(HONEST, "sampler 1", PUBLISHED, "a")
    with pytest.raises(WeightSyncError, match="sampler 1"):
        refuse_unattested(replace(HONEST, **lie), "sampler 1", PUBLISHED, "a")
