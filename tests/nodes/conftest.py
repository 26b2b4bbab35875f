"""Clusters of several machines for jobs that must survive on what a cluster gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from rlsys import tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection, parse_config
from rlsys.modeling.base_model import initial_model
from tests.nodes.machines import Machines, best

# Says in every test's name what it ran on.
KIND, REFUSED = best()
FORM = "namespaces" if KIND.own_files else "one_host_as_namespaces_are_refused"

MICRO = MakeSection(
    vocab_size=160, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=64
)

JOB = """
run: {name: micro, seed: 5}
watchdog: {stages: {start: 1200}}
model: {dtype: float32, max_length: 96}
task: {train_problems: 32, eval_problems: 8}
lora: {rank: 4, alpha: 8}
learner: {num_cpus: 0.5}
sampler: {num_cpus: 0.5, max_num_seqs: 64, max_num_batched_tokens: 512, kv_cache_gb: 0.25}
rewards: {function: "tests.ray.graders:variety"}
rl: {steps: 3, problems_per_step: 4, samples_per_problem: 4, sampling: {max_tokens: 12}, optim: {learning_rate: 1.0e-2}}
eval: {every_steps: 0, max_tokens: 12}
tracking: {wandb: disabled}
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REFUSED:
        terminalreporter.write_line(f"tests/nodes ran on one address and one file system: {REFUSED}")


@pytest.fixture(params=[pytest.param(KIND, id=FORM)])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """No machine yet; all that a test adds are gone after it."""
    kind: type[Machines] = request.param
    with kind() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def micro_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 2 layers with the arithmetic task's tokenizer."""
    folder = tmp_path_factory.mktemp("micro") / "base"
    task = tasks.build(parse_config(JOB, ["model.path=x"]).task, 0)
    tokenizer = build_tokenizer([problem.prompt for problem in task.problems("train")], MICRO.vocab_size)
    initial_model(MICRO, tokenizer, max_length=96, seed=3, out=folder)
    return folder


def write_job(path: Path, **sections: Mapping[str, object]) -> Path:
    """The micro job with keys added: write_job(path, sampler={"num_workers": 2})."""
    tree = yaml.safe_load(JOB)
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """As `write_job`, to a file of this test's."""
    return functools.partial(write_job, tmp_path / "job.yaml")
