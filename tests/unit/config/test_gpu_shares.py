"""Shares of GPUs that cannot work are refused by key, in a job and in a deployment alike."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from actors.service.placement import sections
from rlsys.client.config import ServiceConfig
from rlsys.config import LearnerSection, SamplerSection, parse_config
from rlsys.config.gpu_shares import may_share
from rlsys.errors import ConfigError

JOB = "run: {name: a}\nmodel: {path: x}\n"


def keys(**sections: object) -> list[str]:
    """``learner.num_gpus=1`` and so on."""
    return [f"{key}={str(value).lower()}" for key, value in sections.items()]


def job(learner: float, sampler: float, ranks: int = 1, samplers: int = 1, **more: object) -> list[str]:
    amounts = {
        "learner.num_gpus": learner,
        "sampler.num_gpus": sampler,
        "learner.num_workers": ranks,
        "sampler.num_workers": samplers,
    }
    return keys(**amounts, **{f"sampler.{key}": value for key, value in more.items()})


REFUSED = [
    # overrides, what the message names, what it suggests
    (job(2, 1), "num_gpus 2", "learner.num_workers=2"),
    (job(1, 2), "sampler.tensor_parallel_size 1", "set sampler.num_gpus=1"),
    (job(1, 0.5, tensor_parallel_size=2), "sampler.tensor_parallel_size 2", "set sampler.num_gpus=2"),
    (job(0.5, 1, ranks=2), "learner.num_workers 2", "set learner.num_gpus=1"),
    (job(0.25, 1, ranks=4), "NCCL refuses two ranks", "learner.num_workers=1"),
    (job(1, 0.5, samplers=2), "sampler.num_workers 2", "set sampler.num_gpus=1"),
    (job(0.5, 0.5), "sampler.gpu_memory_utilization 0.6", "sampler.gpu_memory_utilization=0.5"),
    (job(0.5, 0, colocate=True), "sampler.colocate", "give both a part of a GPU"),
    (job(0, 0.5, colocate=True), "sampler.colocate", "or set sampler.colocate=false"),
    (job(1, 1, colocate=True), "sampler.colocate", "such as 0.5 each"),
    (job(0.5, 2, colocate=True, tensor_parallel_size=2), "sampler.colocate", "sampler.tensor_parallel_size=1"),
    (job(0.25, 0.25, ranks=2, samplers=2, colocate=True), "learner.num_workers 2", "such as 0.5 each"),
]
ACCEPTED = [
    job(1, 1),
    job(0, 1),
    job(1, 0),
    job(1, 2, tensor_parallel_size=2),
    job(0.5, 0.5, colocate=True),
    job(0.5, 0.5, gpu_memory_utilization=0.45),
    job(0.6, 0.5),  # too much for one GPU: they get one each
    job(0.5, 0.5, ranks=4, samplers=4, colocate=True),
    job(0.6, 0.4, ranks=2, samplers=2, colocate=True),
    job(1, 1, ranks=2, samplers=6),
    job(0.6, 1, ranks=2),
    job(0, 0, ranks=2, samplers=2, colocate=True),
    job(0, 0, tensor_parallel_size=2),
]


@pytest.mark.parametrize(("overrides", "named", "suggested"), REFUSED, ids=lambda value: str(value)[:60])
def test_shares_that_cannot_work_are_refused_in_one_line_with_the_way_out(
    overrides: list[str], named: str, suggested: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(JOB, overrides)
    message = str(caught.value)
    assert named in message and suggested in message and "\n" not in message, message


@pytest.mark.parametrize("overrides", ACCEPTED, ids=str)
def test_shares_that_work_are_accepted(overrides: list[str]) -> None:
    config = parse_config(JOB, overrides)
    assert config.model.dtype == ("bfloat16" if config.sampler.num_gpus else "float32")


@pytest.mark.parametrize(
    ("learner", "sampler", "named"),
    [
        ({"num_gpus": 0.5}, {"num_gpus": 0.5}, "sampler.gpu_memory_utilization=0.5"),
        ({"num_gpus": 1}, {"num_gpus": 0.5, "num_workers": 2}, "set sampler.num_gpus=1"),
        ({"num_gpus": 2}, {"num_gpus": 1}, "set learner.num_gpus=1"),
        ({}, {"num_gpus": 0.5, "colocate": True}, "sampler.colocate=false"),
        ({}, {"num_gpus": 1, "tensor_parallel_size": 2}, "set sampler.num_gpus=2"),
    ],
)
def test_a_deployment_is_held_to_the_same(learner: dict[str, object], sampler: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ServiceConfig.model_validate({"learner": learner, "sampler": sampler})
    assert named in str(caught.value)


def test_a_deployment_s_own_choice_goes_together_on_any_number_of_gpus() -> None:
    for gpus in (1, 2, 4, 8):
        learner, sampler = sections(ServiceConfig(), {"CPU": 16.0, "GPU": float(gpus)})
        assert learner.num_gpus + sampler.num_gpus <= gpus
        assert may_share(learner, sampler) == (gpus == 1)


def test_a_section_that_does_not_go_with_what_the_cluster_adds_is_refused_with_its_key() -> None:
    half = ServiceConfig(sampler=SamplerSection(num_gpus=0.5))  # whose utilization is for a GPU that learns in turn
    with pytest.raises(ConfigError, match=r"ServiceConfig: .*sampler\.gpu_memory_utilization=0\.5"):
        sections(half, {"CPU": 8.0, "GPU": 1.0})
    whole = ServiceConfig(learner=LearnerSection(num_gpus=1))
    assert sections(whole, {"CPU": 8.0, "GPU": 2.0})[1].num_gpus == 1
