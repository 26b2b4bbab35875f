"""What a deployment is started with, by the devices that a cluster has."""

from __future__ import annotations

import pytest

from actors.service.placement import actor_options, dtype_of, sections, shortfall
from rlsys.client.config import ServiceConfig
from rlsys.config import LearnerSection, SamplerSection
from rlsys.errors import ConfigError

CPU, GPUS = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}


def test_the_default_dtype_follows_the_samplers_device() -> None:
    config = ServiceConfig()
    assert dtype_of(config, sections(config, CPU)[1]) == "float32"
    assert dtype_of(config, sections(config, GPUS)[1]) == "bfloat16"
    on_cpu = ServiceConfig(sampler=SamplerSection())
    assert dtype_of(on_cpu, sections(on_cpu, GPUS)[1]) == "float32"


def test_a_dtype_that_was_asked_for_stays() -> None:
    config = ServiceConfig(dtype="float16")
    assert dtype_of(config, sections(config, CPU)[1]) == dtype_of(config, sections(config, GPUS)[1]) == "float16"


def test_float32_adapters_on_a_cuda_sampler_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"dtype float32.*set dtype=bfloat16, or dtype=float16"):
        ServiceConfig(dtype="float32", sampler=SamplerSection(num_gpus=1))
    found = ServiceConfig(dtype="float32")  # nothing is known of the cluster yet
    with pytest.raises(ConfigError, match=r"dtype float32.*set dtype=bfloat16, or dtype=float16"):
        dtype_of(found, sections(found, GPUS)[1])


def test_a_learner_computes_where_its_gpus_are() -> None:
    assert [LearnerSection(num_gpus=gpus).device for gpus in (0, 0.5, 1)] == ["cpu", "cuda", "cuda"]


def test_learner_ranks_and_samplers_are_counted_when_a_deployment_is_fitted() -> None:
    config = ServiceConfig(
        learner=LearnerSection(num_workers=3, num_cpus=1, resources={"fast": 0.5}),
        sampler=SamplerSection(num_workers=2, num_cpus=0.5),
    )
    learner, sampler = sections(config, CPU)
    short = shortfall(learner, sampler, {"CPU": 3.5, "fast": 2.0})
    assert short is not None and (short.resource, short.needed, short.missing) == ("CPU", 4.0, 0.5)
    short = shortfall(learner, sampler, {"CPU": 4.0, "fast": 1.0})
    assert short is not None and (short.resource, short.missing) == ("fast", 0.5)
    assert shortfall(learner, sampler, {"CPU": 4.0, "fast": 1.5}) is None
    options = actor_options(learner, 1)
    assert (options["num_cpus"], options["resources"]) == (1, {"fast": 0.5})


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        (LearnerSection(num_workers=2, placement="STRICT_SPREAD"), r"learner\.placement: found STRICT_SPREAD; wanted"),
        (LearnerSection(shard_base=True), r"learner\.shard_base.*set learner\.num_workers to 2 or more"),
        (LearnerSection(num_workers=2, num_gpus=0.5), r"learner\.num_workers 2 of learner\.num_gpus 0\.5"),
    ],
)
def test_ranks_that_cannot_work_together_are_refused_with_the_way_out(learner: LearnerSection, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServiceConfig(learner=learner, sampler=SamplerSection())
