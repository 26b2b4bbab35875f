"""Several learner ranks and samplers behind a deployment, through ServiceClient and through HTTP."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import rlsys
from actors.service.deployment import RayBackend
from actors.service.http_backend import DeploymentBackend
from rlsys import types
from rlsys.client.config import ServiceConfig
from rlsys.config import LearnerSection, SamplerSection
from rlsys.errors import ActorFailedError, CheckpointError, GradientError, LossError
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import ServeConfig
from tests.unit.serve.http_client import Http
from tests.waiting import FAR_S

RANK_TIMEOUT_S = 120.0  # also for two processes to import torch on a busy machine
KINDS = ("ray::ServiceLearner", "ray::LearnerRank", "ray::ServiceSampler", "rlsys host of sampler")
PROMPT = types.ModelInput.from_ints([5, 900, 31_000, 7])


def config(checkpoints: Path, count: int, **more: str) -> ServiceConfig:
    """So many learner ranks and samplers."""
    return ServiceConfig(
        learner=LearnerSection(num_workers=count, num_cpus=0.25, token_budget=64),
        sampler=SamplerSection(
            num_workers=count,
            num_cpus=0.25,
            kv_cache_gb=0.1,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            max_lora_rank=16,
            max_live_adapters=3,
        ),
        checkpoints=str(checkpoints),
        room_timeout_s=600,
        rank_timeout_s=RANK_TIMEOUT_S,
        models=more,
    )


@pytest.fixture(scope="module")
def many(service: rlsys.ServiceClient, base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceConfig]:
    """The deployment of a copy of the base, on two ranks and two samplers."""
    folder = tmp_path_factory.mktemp("ranks")
    copy = shutil.copytree(base, folder / "base")
    chosen = config(folder / "checkpoints", 2, copy=str(copy))
    with rlsys.ServiceClient(chosen) as client:
        client.create_sampling_client(base_model="copy")
        yield chosen


@pytest.fixture
def ranks(many: ServiceConfig) -> Iterator[rlsys.ServiceClient]:
    with rlsys.ServiceClient(many) as client:
        yield client


def data(count: int = 12, seed: int = 0) -> list[types.Datum]:
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        ids = random.integers(0, 40_000, random.integers(4, 40)).tolist()
        inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
        found.append(types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs))
    return found


def mean_square(some: list[types.Datum], logprobs: list) -> tuple:  # type: ignore[type-arg]
    return sum((each**2).mean() for each in logprobs), {"datums": len(some)}


def test_two_ranks_train_several_runs_as_one_rank_does(
    service: rlsys.ServiceClient, ranks: rlsys.ServiceClient
) -> None:
    found = []
    for client, name in ((service, "tiny"), (ranks, "copy")):
        runs = [client.create_lora_training_client(name, rank=4, seed=seed) for seed in range(3)]
        steps = []
        for step in range(2):
            passes = [run.forward_backward(data(seed=i + step), "cross_entropy") for i, run in enumerate(runs)]
            customs = [run.forward_backward_custom(data(4, seed=9), mean_square) for run in runs]
            norms = [run.optim_step(types.AdamParams(learning_rate=1e-3)) for run in runs]
            steps.append(
                [
                    [each.result(FAR_S).loss for each in passes],
                    [each.result(FAR_S).loss for each in customs],
                    [each.result(FAR_S).metrics["grad_norm"] for each in norms],
                ]
            )
        scores = [run.save_weights_and_get_sampling_client().compute_logprobs(PROMPT).result(FAR_S) for run in runs]
        found.append((np.array(steps), np.array([score[1:] for score in scores], float)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-4)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-3)
    assert len({tuple(score) for score in found[1][1]}) == 3


def test_every_actor_of_a_deployment_and_every_host_is_forked(ranks: rlsys.ServiceClient) -> None:
    here = psutil.Process().children(recursive=True)
    servers = {each.pid for each in here if "actors.forking" in " ".join(each.cmdline())}
    parents: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for each in here:
        for kind in KINDS:
            if " ".join(each.cmdline()).startswith(kind):
                parents[kind].add(each.ppid())
    assert all(found and found <= servers for found in parents.values()), (parents, servers)


def test_states_are_saved_and_loaded_on_all_ranks(ranks: rlsys.ServiceClient) -> None:
    first = ranks.create_lora_training_client("copy", rank=4, seed=5)
    first.forward_backward(data(), "cross_entropy")
    first.optim_step(types.AdamParams(learning_rate=1e-2)).result(FAR_S)
    path = first.save_state("kept").result(FAR_S).path
    again = ranks.create_training_client_from_state_with_optimizer(path)
    for client in (first, again):
        client.forward_backward(data(seed=1), "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2))
    losses = [client.forward(data(), "cross_entropy").result(FAR_S).loss for client in (first, again)]
    assert losses[0] == losses[1]
    first.load_state(path).result(FAR_S)
    assert first.forward(data(), "cross_entropy").result(FAR_S).loss != losses[0]
    sampler = ranks.create_sampling_client(first.save_weights_for_sampler("kept").result(FAR_S).path)
    assert len(sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=4)).result(FAR_S).sequences) == 2


def test_what_fails_on_ranks_fails_the_request_alone(ranks: rlsys.ServiceClient, many: ServiceConfig) -> None:
    client = ranks.create_lora_training_client("copy", rank=4, seed=6)
    with pytest.raises(GradientError, match="no forward_backward"):
        client.optim_step(types.AdamParams()).result(FAR_S)
    with pytest.raises(CheckpointError):
        client.load_state("/none").result(FAR_S)
    client.save_state("twice").result(FAR_S)
    with pytest.raises(CheckpointError, match="already there"):
        client.save_state("twice").result(FAR_S)

    def fails_on_one_rank(some: list[types.Datum], logprobs: list) -> tuple:  # type: ignore[type-arg]
        import torch.distributed

        if torch.distributed.get_rank() == 1:
            raise ValueError("only here")
        return logprobs[0].sum(), {}

    with pytest.raises((LossError, ActorFailedError), match=r"only here|rank 1"):
        client.forward_backward_custom(data(), fails_on_one_rank, where="learner").result(FAR_S)
    client.forward_backward(data(), "cross_entropy")
    assert client.optim_step(types.AdamParams()).result(FAR_S).metrics["grad_norm"] > 0


class OnRay(Http):
    async def __aexit__(self, *_: object) -> None:
        await self.state.drain(60)
        await self.client.aclose()


def test_models_behind_http_train_on_two_ranks(many: ServiceConfig, tmp_path: Path) -> None:
    base = many.models["copy"]
    served = ServeConfig.model_validate(
        {"models": {"tiny": base}, "keys": None, "checkpoints": str(tmp_path), "deployment": {}}
    )
    cluster = RayBackend(many)
    backend = DeploymentBackend(cluster, served)

    async def main() -> list[float]:
        async with OnRay(backend, CheckpointStore(tmp_path)) as http:  # type: ignore[arg-type]
            session, losses = await http.session(), list[float]()
            models = [await http.model(session, number) for number in range(2)]
            for seq in (1, 3):
                passes = [await http.forward_backward(model, seq, datums=6) for model in models]
                steps = [await http.optim_step(model, seq + 1) for model in models]
                losses += [(await http.result(each))["metrics"]["loss:sum"] for each in passes]
                for each in steps:
                    assert (await http.result(each))["metrics"]["grad_norm"] > 0
            return losses

    losses = asyncio.run(main())
    cluster.close()
    assert losses[0] == losses[1] and losses[2] == losses[3] < losses[0]
