"""Finding, joining, refusing and closing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

import rlsys
from actors.cluster import setup_worker
from actors.service.deployment import RayBackend
from rlsys import types
from rlsys.client.backend import Adopted, RunProgress
from rlsys.client.requests import Drop, TakeSnapshot
from rlsys.config import LearnerSection
from rlsys.errors import ClusterError, ConfigError
from tests.waiting import FAR_S, cpu_of, run


def test_a_second_service_client_joins_what_runs_and_leaves_it_running(
    service: rlsys.ServiceClient, base: str, datum: types.Datum
) -> None:
    other = rlsys.ServiceClient()
    joined = other.create_lora_training_client(base, rank=4, seed=3)
    own = service.create_lora_training_client("tiny", rank=4, seed=3)
    assert joined.model_id != own.model_id
    losses = [client.forward([datum], "cross_entropy").result(FAR_S).loss for client in (joined, own)]
    assert losses[0] == losses[1]
    other.close()
    assert own.forward([datum], "cross_entropy").result(FAR_S).loss == losses[0]


def test_a_ray_of_its_own_has_no_dashboard_log_monitor_or_autoscaler(service: rlsys.ServiceClient) -> None:
    """Nor a program that imports Ray to read a worker's environment."""
    commands = [each.cmdline() for each in psutil.Process().children(recursive=True)]
    of_ray = {Path(part).name: command for command in commands for part in command[:3] if "/ray/" in part}
    assert of_ray.keys() >= {"gcs_server", "raylet"}
    assert not of_ray.keys() & {"dashboard.py", "log_monitor.py", "monitor.py"}
    assert setup_worker.__file__ in " ".join(of_ray["raylet"])


def test_another_process_joins_what_runs(service: rlsys.ServiceClient, base: str, datum: types.Datum) -> None:
    code = f"""
import rlsys
from rlsys.config import ClusterSection

config = rlsys.ServiceConfig(cluster=ClusterSection(address={ray.get_runtime_context().gcs_address!r}))
with rlsys.ServiceClient(config) as service:
    client = service.create_lora_training_client({base!r}, rank=4, seed=3)
    datum = rlsys.Datum(rlsys.ModelInput.from_ints({datum.model_input.to_ints()}), {dict(datum.loss_fn_inputs)})
    print("loss", repr(client.forward([datum], "cross_entropy").result(1e5).loss))

import threading, time
import ray
from actors.service import supervisor

supervisor.CHECK_S = 0.1
left_open = rlsys.ServiceClient(config)
left_open.create_lora_training_client({base!r}, rank=4)
[watching] = [each for each in threading.enumerate() if each.name == "rlsys-supervisor"]
beside = left_open._backend.deployment({base!r})._supervisor
ray.shutdown()
member, suspected = beside.samplers[0], beside.samplers[0].handle
for dead in (suspected, None):  # as a thread does that begins or goes on after the end of the connection
    member.handle, member.returned = dead, type(member.returned)()
    beside._replace(member)
    print("why", member.why)
print("verdict", beside.suspect(member, suspected).result(10))
try:
    beside._bring_up_sampler(member, suspected, time.monotonic() + 10)
except Exception as error:
    print("not brought up:", error)
print("connected", ray.is_initialized())
ray.init(address=config.cluster.address, log_to_driver=False)
watching.join(60)
print("watching", watching.is_alive())
"""
    found = run([sys.executable, "-c", code], signs=[cpu_of(os.getpid())])
    assert found.returncode == 0, found.stderr
    own = service.create_lora_training_client("tiny", rank=4, seed=3)
    assert f"loss {own.forward([datum], 'cross_entropy').result(FAR_S).loss!r}" in found.stdout
    assert found.stdout.count("why it could not be started again: this process has left the Ray cluster") == 2
    assert "verdict False" in found.stdout and "not brought up: this process has left the Ray cluster" in found.stdout
    assert "connected False" in found.stdout, "a call of Ray without a connection makes one"
    assert "watching False" in found.stdout, "a client that was not closed still calls Ray after its connection ended"


def test_runs_and_snapshots_of_a_client_that_was_killed_are_adopted(service: rlsys.ServiceClient, base: str) -> None:
    code = f"""
import os, signal
from actors.service.deployment import RayBackend
from rlsys.client.requests import Skip, TakeSnapshot
from rlsys.config import ClusterSection, LoraSection
from rlsys.client.config import ServiceConfig

address = {ray.get_runtime_context().gcs_address!r}
deployment = RayBackend(ServiceConfig(cluster=ClusterSection(address=address))).deployment({base!r})
deployment.create_model(LoraSection(rank=2), 0, "left").result(1e5)
deployment.submit("left", 1, Skip()).result(1e5)
print("key", deployment.submit("left", 2, TakeSnapshot()).result(1e5).key, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    found = run([sys.executable, "-c", code], signs=[cpu_of(os.getpid())])
    key = found.stdout.partition("key ")[2].split()[0]
    deployment = RayBackend(rlsys.ServiceConfig()).deployment(base)
    assert deployment.progress().result(FAR_S)["left"] == RunProgress(3)
    adopted = deployment.adopt(["left", "never was"], [key, "never was"]).result(FAR_S)
    assert adopted == Adopted({"left": RunProgress(3)}, (key,))
    again = deployment.submit("left", 2, TakeSnapshot()).result(FAR_S)
    assert again.key == key, "call 2 ran once, and its answer is kept"
    tokens = np.array([5, 900, 31_000], np.int32)
    assert len(deployment.logprobs(again, tokens).result(FAR_S)) == 3
    deployment.submit("left", adopted.runs["left"].unused, Drop()).result(FAR_S)
    assert "left" not in deployment.progress().result(FAR_S)
    deployment.close()


def test_clients_of_a_closed_service_say_so(service: rlsys.ServiceClient, base: str, datum: types.Datum) -> None:
    closed = rlsys.ServiceClient()
    trainer = closed.create_lora_training_client(base, rank=1)
    sampler = closed.create_sampling_client(base_model=base)
    closed.close()
    closed.close()
    for call in (
        lambda: closed.create_sampling_client(base_model=base),
        lambda: trainer.forward([datum], "cross_entropy"),
        lambda: trainer.optim_step(types.AdamParams()),
        lambda: sampler.compute_logprobs(types.ModelInput.from_ints([1, 2])),
    ):
        with pytest.raises(ClusterError, match="this ServiceClient and its clients are closed") as raised:
            call()
    print(f"\nclosed client: {type(raised.value).__name__}: {raised.value}")


def test_too_few_resources_are_refused_at_once_with_the_shortfall(
    service: rlsys.ServiceClient, base: str, tmp_path: Path
) -> None:
    another = shutil.copytree(base, tmp_path / "another")
    greedy = rlsys.ServiceClient(rlsys.ServiceConfig(learner=LearnerSection(num_cpus=64), start_timeout_s=FAR_S))
    with pytest.raises(ClusterError, match=r"needs 65 CPUs.* too few") as raised:
        greedy.create_sampling_client(base_model=str(another))
    print(f"\ntoo few resources: {raised.value}")


def test_capabilities_name_what_runs_and_what_could(service: rlsys.ServiceClient, base: str) -> None:
    client = rlsys.ServiceClient(models={"elsewhere": "/none", "tiny-too": base})
    found = {model.model_name: model for model in client.get_server_capabilities().supported_models}
    assert found["tiny"].running and found["tiny"].max_context_length == 128
    assert not found["elsewhere"].running and "tiny-too" not in found
    with pytest.raises(ConfigError, match="'elsewhere', which is not a folder on this node"):
        client.create_sampling_client(base_model="elsewhere")


def test_info_and_tokenizer_are_those_of_the_base(service: rlsys.ServiceClient) -> None:
    client = service.create_lora_training_client("tiny", rank=4)
    info = client.get_info()
    assert (info.model_name, info.lora_rank, info.model_data.arch) == ("tiny", 4, "Qwen3ForCausalLM")
    tokenizer = client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("The capital of France is")) == "The capital of France is"
    assert service.create_sampling_client(base_model="tiny").get_tokenizer() is tokenizer
