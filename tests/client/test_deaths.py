"""Actors of a deployment that are killed: what fails, what goes on, and what is started again."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray

import rlsys
from actors.faults.actor_logs import process_of
from actors.service.ray_deployment import RayDeployment
from rlsys import types
from rlsys.errors import ActorDiedError, RunLostError
from tests.client.test_ranks import RANK_TIMEOUT_S, config, data
from tests.waiting import FAR_S, cpu_of, family, until

pytestmark = pytest.mark.soak
PROMPT = types.ModelInput.from_ints([5, 900, 31_000, 7])
SOON_S = 30.0
FEW = types.SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def count(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def client(
    count: int, service: rlsys.ServiceClient, base: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[rlsys.ServiceClient]:
    folder = tmp_path_factory.mktemp("deaths")
    copy = str(shutil.copytree(base, folder / "base"))
    chosen = config(folder / "checkpoints", count, mortal=copy)
    with rlsys.ServiceClient(chosen) as started:
        started.create_sampling_client(base_model="mortal")
        yield started


def deployment_of(client: rlsys.ServiceClient) -> RayDeployment:
    assert client._backend is not None
    found = client._backend.deployment("mortal")
    assert isinstance(found, RayDeployment)
    return found


def actors(client: rlsys.ServiceClient) -> list[psutil.Process]:
    """Samplers first, then rank 0 of the learner."""
    found = [process_of(actor) for actor in deployment_of(client).actors]
    return [psutil.Process(each.pid) for each in found if each is not None]


def other_ranks() -> list[psutil.Process]:
    """Of the learner of this test process's cluster."""
    found = []
    for each in family(os.getpid()):
        try:
            found += [each] if "LearnerRank" in " ".join(each.cmdline()) else []
        except psutil.Error:
            continue
    return found


def host_of_sampler_0() -> psutil.Process:
    """The newest: of the deployment of these tests."""
    hosts = [each for each in family(os.getpid()) if "rlsys host of sampler 0" in " ".join(each.cmdline())]
    return max(hosts, key=psutil.Process.create_time)


def serves(client: rlsys.ServiceClient, number: int) -> Callable[[], bool]:
    """Whether so many actors of the deployment serve."""

    def look() -> bool:
        supervisor = deployment_of(client)._supervisor
        with supervisor.lock:
            return sum(each.serves for each in (*supervisor.samplers, supervisor.learner)) == number

    return look


VICTIMS: dict[str, Callable[[psutil.Process], psutil.Process]] = {
    "actor": lambda sampler: sampler,
    "host process": lambda _: host_of_sampler_0(),
    "engine": lambda _: host_of_sampler_0().children(recursive=True)[-1],
}


@pytest.mark.parametrize("victim", list(VICTIMS))
def test_a_killed_sampler_is_replaced_and_gets_the_snapshots(
    client: rlsys.ServiceClient, count: int, victim: str
) -> None:
    trainer = client.create_lora_training_client("mortal", rank=4, seed=1)
    trainer.forward_backward(data(), "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=1e-2)).result(FAR_S)
    sampler = trainer.save_weights_and_get_sampling_client()
    wanted = sampler.compute_logprobs(PROMPT).result(FAR_S)
    before = actors(client)
    VICTIMS[victim](before[0]).send_signal(signal.SIGKILL)
    began = time.monotonic()
    outcomes: list[bool | str] = []
    for _ in range(8):
        try:
            outcomes.append(sampler.compute_logprobs(PROMPT).result(FAR_S) == pytest.approx(wanted, abs=1e-4))
        except ActorDiedError as error:
            outcomes.append(str(error))
    assert time.monotonic() - began < SOON_S
    print(f"\n{victim}: {outcomes}, {time.monotonic() - began:.1f} s")
    if count == 2:
        assert outcomes == [True] * 8, "another sampler takes the calls"
    else:
        assert any("sampler 0" in str(each) for each in outcomes)
    until(serves(client, count + 1), "the sampler's return", cpu_of(os.getpid()))
    after = actors(client)
    assert len(after) == len(before) and after[0].pid != before[0].pid
    for _ in range(2 * count):
        assert sampler.compute_logprobs(PROMPT).result(FAR_S) == pytest.approx(wanted, abs=1e-4)
        assert len(sampler.sample(PROMPT, 2, FEW).result(FAR_S).sequences) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_learner_loses_its_runs_and_no_checkpoint(client: rlsys.ServiceClient, count: int, rank: int) -> None:
    if rank >= count:
        pytest.skip("it has one rank")
    trainer, other = (client.create_lora_training_client("mortal", rank=4, seed=seed) for seed in (1, 2))
    trainer.forward_backward(data(), "cross_entropy")
    trainer.optim_step(types.AdamParams(learning_rate=1e-2)).result(FAR_S)
    saved = trainer.save_state(f"kept{rank}").result(FAR_S).path
    loss = trainer.forward(data(), "cross_entropy").result(FAR_S).loss
    sampler = trainer.save_weights_and_get_sampling_client()
    wanted = sampler.compute_logprobs(PROMPT).result(FAR_S)
    pending = [each.forward_backward(data(2000), "cross_entropy") for each in (trainer, other)]
    time.sleep(0.5)
    ranks = [actors(client)[-1], *other_ranks()]
    ranks[rank].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for call in pending:
        with pytest.raises(ActorDiedError, match=r"runs are lost.*checkpoints remain"):
            call.result(FAR_S)
    print(f"\nrank {rank}: pending calls failed after {time.monotonic() - began:.1f} s")
    for each in (trainer, other):
        with pytest.raises((RunLostError, ActorDiedError)) as raised:
            each.forward(data(), "cross_entropy").result(FAR_S)
    assert time.monotonic() - began < SOON_S
    print(raised.value)
    fresh = client.create_lora_training_client("mortal", rank=4, seed=1)  # waits for the learner
    print(f"a new model after {time.monotonic() - began:.1f} s")
    assert fresh.forward(data(), "cross_entropy").result(FAR_S).loss != loss
    again = client.create_training_client_from_state(saved)
    assert again.forward(data(), "cross_entropy").result(FAR_S).loss == loss
    assert sampler.compute_logprobs(PROMPT).result(FAR_S) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(RunLostError, match=r"the learner of this run died at \d\d:\d\d:\d\d.*checkpoints remain"):
        trainer.optim_step(types.AdamParams()).result(FAR_S)
    taken = again.save_weights_and_get_sampling_client()
    assert taken.compute_logprobs(PROMPT).result(FAR_S) == pytest.approx(wanted, abs=1e-4)
    assert ray.is_initialized()


def test_a_rank_that_stands_still_ends_the_learner_within_the_limit(client: rlsys.ServiceClient, count: int) -> None:
    if count == 1:
        pytest.skip("it has one rank")
    trainer = client.create_lora_training_client("mortal", rank=4, seed=1)
    trainer.forward(data(), "cross_entropy").result(FAR_S)
    (rank,) = other_ranks()
    rank.send_signal(signal.SIGSTOP)
    with pytest.raises(ActorDiedError, match=rf"another rank had not arrived \(limit {RANK_TIMEOUT_S:g} s\)"):
        trainer.forward_backward(data(), "cross_entropy").result(FAR_S)
    fresh = client.create_lora_training_client("mortal", rank=4, seed=1)
    assert fresh.forward(data(), "cross_entropy").result(FAR_S).loss > 0
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_a_sampler_that_dies_too_often_is_not_started_again(client: rlsys.ServiceClient, count: int) -> None:
    """The last test of the module: a sampler is missing afterwards."""
    if count > 1:
        pytest.skip("another sampler serves")
    sampler = client.create_sampling_client(base_model="mortal")
    member = deployment_of(client)._supervisor.samplers[0]
    while len(member.deaths) < 4:
        until(serves(client, count + 1), "the sampler's return", cpu_of(os.getpid()))
        actors(client)[0].send_signal(signal.SIGKILL)
        with pytest.raises(ActorDiedError):
            sampler.compute_logprobs(PROMPT).result(FAR_S)
    with pytest.raises(
        ActorDiedError, match=r"4 deaths within 600 s, and cluster.max_restarts is 3\); it is not started again"
    ):
        sampler.compute_logprobs(PROMPT).result(FAR_S)
