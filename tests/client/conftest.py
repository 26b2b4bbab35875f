"""One deployment for all tests here (and gone before other tests use Ray): a learner and a sampler on Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

import rlsys
from rlsys import types
from rlsys.config import ClusterSection, LearnerSection, SamplerSection
from tests.client import tiny_base
from tests.client.tiny_base import LIVE


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny_base.make(folder)
    return str(folder)


@pytest.fixture(scope="package")
def service(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[rlsys.ServiceClient]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    config = rlsys.ServiceConfig(
        models={"tiny": base},
        cluster=ClusterSection(num_cpus=2, object_store_gb=0.3),
        learner=LearnerSection(num_cpus=0.5, token_budget=256),
        sampler=SamplerSection(
            num_cpus=0.5,
            kv_cache_gb=0.1,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            max_lora_rank=16,
            max_live_adapters=LIVE,
        ),
        checkpoints=str(tmp_path_factory.mktemp("checkpoints")),
        room_timeout_s=600,
    )
    assert not ray.is_initialized()
    with rlsys.ServiceClient(config) as client:
        client.create_lora_training_client("tiny", rank=1)  # pays for the start here and not in the first test
        yield client
    assert not ray.is_initialized()


@pytest.fixture
def trainer(service: rlsys.ServiceClient) -> rlsys.TrainingClient:
    return service.create_lora_training_client("tiny", rank=4, seed=1)


@pytest.fixture
def datum() -> types.Datum:
    """Six tokens under cross_entropy."""
    ids = [5, 900, 31_000, 7, 40_000, 12, 77]
    return types.Datum(types.ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": [1.0] * 6})
