"""Defaults that follow from other keys."""

from __future__ import annotations

import pytest

from rlsys.config import load_config, parse_config
from rlsys.config.run import STAGES
from rlsys.errors import ConfigError
from tests.unit.config.test_job import CONFIGS, SMALL


def limits(*overrides: str) -> dict[str, float]:
    section = parse_config(SMALL, overrides).watchdog
    return {stage: section.limit_of(stage) for stage in STAGES}


def test_a_stage_has_the_limit_of_every_stage_unless_it_is_slow_or_has_its_own() -> None:
    others = dict.fromkeys(set(STAGES) - {"start", "base"}, 120.0)
    assert limits() == {**others, "start": 900.0, "base": 300.0}
    assert limits("watchdog.limit_s=400") == {**dict.fromkeys(others, 400.0), "start": 900.0, "base": 400.0}
    own = limits("watchdog.limit_s=30", "watchdog.stages.start=60", "watchdog.stages={learn: 600, start: 20}")
    assert own == {**dict.fromkeys(others, 30.0), "start": 20.0, "base": 300.0, "learn": 600.0}


def test_a_sampler_has_slots_of_the_adapters_rank() -> None:
    assert parse_config(SMALL).sampler.max_lora_rank == 16
    assert parse_config(SMALL, ["lora.rank=64"]).sampler.max_lora_rank == 64
    assert parse_config(SMALL, ["lora.rank=8", "sampler.num_workers=2"]).sampler.max_lora_rank == 8
    assert parse_config(SMALL, ["lora.rank=8", "sampler.max_lora_rank=32"]).sampler.max_lora_rank == 32
    for path in CONFIGS.glob("*.yaml"):
        job = load_config(path)
        assert job.sampler.max_lora_rank == job.lora.rank


@pytest.mark.parametrize("rank", ["0", "1024", "wide"])
def test_a_wrong_rank_is_refused_once(rank: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(SMALL, [f"lora.rank={rank}"])
    assert len(str(refused.value).splitlines()) == 1 and "lora.rank" in str(refused.value)


def test_a_learner_computes_where_its_gpus_are() -> None:
    assert [parse_config(SMALL, [f"learner.num_gpus={n}"]).learner.device for n in (0, 0.5, 1)] == [
        "cpu",
        "cuda",
        "cuda",
    ]
