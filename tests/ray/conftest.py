"""One warm Ray cluster, one micro base and one undisturbed run for all tests that need them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from actors import job as jobs
from actors.cluster import setup_worker
from rlsys import tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import JobConfig, MakeSection, parse_config
from rlsys.modeling.base_model import initial_model
from rlsys.tracking.progress import Progress
from tests.waiting import run

MICRO = MakeSection(
    vocab_size=160, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64
)

JOB = """
run: {name: micro, seed: 5}
watchdog: {stages: {start: 1200}}
model: {dtype: float32, max_length: 96}
task: {train_problems: 32, eval_problems: 8}
lora: {rank: 4, alpha: 8}
sampler: {num_cpus: 0.5, max_num_seqs: 64, max_num_batched_tokens: 512, kv_cache_gb: 0.25}
rewards: {function: "tests.ray.graders:variety"}
rl: {steps: 2, problems_per_step: 4, samples_per_problem: 4, sampling: {max_tokens: 12}, optim: {learning_rate: 1.0e-2}}
eval: {every_steps: 0, max_tokens: 12}
tracking: {wandb: disabled}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


DASHBOARD_PORT = free_port()


@dataclass(frozen=True, slots=True)
class WarmCluster:
    address: str
    said: str  # by `rlsys warm`


@pytest.fixture(scope="package")  # gone before other folders' tests use Ray
def warm_cluster() -> Iterator[WarmCluster]:
    """A cluster that jobs of these tests join and leave: RAY_ADDRESS is set while it lives. It is warm, so a job forks
    its learner and its samplers' hosts instead of importing torch and vLLM for each."""
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for submitted jobs
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "object_store_memory": 300 * 2**20,
            "include_dashboard": True,
            "include_log_monitor": False,  # copies workers' output to drivers that ask for it, which no job does
            "dashboard_host": "127.0.0.1",
            "dashboard_port": DASHBOARD_PORT,
            "dashboard_agent_listen_port": free_port(),  # another Ray on this machine may hold the usual one
            "no_monitor": True,  # of an autoscaler
            # As in a Ray of rlsys's own; tests/nodes and tests/deploy have that of Ray.
            "setup_worker_path": setup_worker.__file__,
        },
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    yield WarmCluster(cluster.address, rlsys("warm"))
    assert rlsys("warm", "--stop") == "stopped: 1 warm server\n"
    cluster.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def rlsys(*arguments: str) -> str:
    """What the command says, which has to succeed."""
    done = run([sys.executable, "-m", "rlsys", *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="package")
def ray_cluster(warm_cluster: WarmCluster) -> str:
    return warm_cluster.address


@pytest.fixture(scope="package")
def dashboard(ray_cluster: str) -> str:
    """Where jobs are submitted."""
    return f"http://127.0.0.1:{DASHBOARD_PORT}"


@pytest.fixture(scope="session")
def micro_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 2 layers with the arithmetic task's tokenizer."""
    folder = tmp_path_factory.mktemp("micro") / "base"
    task = tasks.build(parse_config(JOB, ["model.path=x"]).task, 0)
    tokenizer = build_tokenizer([problem.prompt for problem in task.problems("train")], MICRO.vocab_size)
    initial_model(MICRO, tokenizer, max_length=96, seed=3, out=folder)
    return folder


@pytest.fixture
def job(micro_base: Path, tmp_path: Path) -> Callable[..., JobConfig]:
    """The micro job, with overrides."""

    def make(*overrides: str) -> JobConfig:
        return parse_config(JOB, [f"model.path={micro_base}", f"run.dir={tmp_path}", *overrides])

    return make


UNDISTURBED_STEPS = 8


@pytest.fixture(scope="package")
def undisturbed(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """A finished run of the micro job, with all its checkpoints; what runs otherwise has to end with its weights."""
    where = [f"model.path={micro_base}", f"run.dir={tmp_path_factory.mktemp('undisturbed')}"]
    config = parse_config(JOB, [*where, f"rl.steps={UNDISTURBED_STEPS}", f"checkpoint.keep={UNDISTURBED_STEPS}"])
    jobs.train(config, Progress())
    return config
