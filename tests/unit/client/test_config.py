"""What a deployment is started with, by the devices that a cluster has."""

from __future__ import annotations

import pytest

from actors.service.placement import dtype_of, sections
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
