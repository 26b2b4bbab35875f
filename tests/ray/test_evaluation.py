"""A run's policy evaluated through Ray and vLLM, by the command: its adapter, and merged into the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors import job as jobs
from actors.cli import app
from actors.evaluation import evaluate
from actors.stages.learner_group import LearnerGroup
from actors.stages.restarting_actors import GraderActors
from actors.stages.sampler_pool.membership import Membership
from actors.stages.sampler_pool.pool import SamplerPool
from rlsys.config import JobConfig, dump_config, parse_config
from rlsys.errors import CheckpointError, ConfigError
from rlsys.evaluation.policy_source import find_policy
from rlsys.evaluation.record import EvalRecord, read
from rlsys.learner.checkpoint_files import MANIFEST
from rlsys.learner.export import export_merged
from rlsys.modeling.base_model import initial_model
from rlsys.run_state.jsonl import read_metrics, write_problems
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB, MICRO

STEPS = 2
Files = Mapping[Path, bytes]


def contents(folder: Path) -> Files:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def trained(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """A run whose grades tell any two completions apart, trained so hard that it says other things than its base."""
    overrides = [
        f"model.path={micro_base}",
        f"run.dir={tmp_path_factory.mktemp('runs')}",
        f"rl.steps={STEPS}",
        "rl.optim.learning_rate=0.1",
        "rl.optim.warmup_steps=0",
        "learner.num_cpus=0.5",
        "rewards.function=tests.ray.graders:fingerprint",
    ]
    config = parse_config(JOB, overrides)
    jobs.train(config, Progress())
    return config


@pytest.fixture(scope="module")
def before(trained: JobConfig) -> Files:
    """The run's directory before anything was evaluated."""
    return contents(trained.run_dir)


@pytest.fixture(scope="module")
def starts() -> Iterator[list[str]]:
    """Who is asked to start in the evaluations of `records`, in order."""
    asked: list[str] = []

    def telling(who: str, method: Callable[..., object]) -> Callable[..., object]:
        def told(*arguments: object) -> object:
            asked.append(who)
            return method(*arguments)

        return told

    with pytest.MonkeyPatch.context() as patch:
        for stage, method in ((LearnerGroup, "_load"), (Membership, "begin"), (GraderActors, "start")):
            patch.setattr(stage, method, telling(stage.__name__, getattr(stage, method)))
        yield asked


@pytest.fixture(scope="module")
def records(
    trained: JobConfig, before: Files, micro_base: Path, tmp_path_factory: pytest.TempPathFactory, starts: list[str]
) -> Mapping[str, EvalRecord]:
    """Of the command, once for each."""
    out = tmp_path_factory.mktemp("out")
    export_merged(micro_base, trained.run_dir / "checkpoints" / f"step-{STEPS:06d}", out / "model")
    (out / "job.yaml").write_text(dump_config(trained))
    command = ["eval", str(out / "job.yaml"), "--checkpoint"]
    app([*command, str(trained.run_dir)], standalone_mode=False)
    app([*command, str(out / "model"), "--samples", "2", "--out", str(out)], standalone_mode=False)
    found = trained.run_dir / "eval" / f"step-{STEPS:06d}.json", out / "merged-model.json"
    return dict(zip(("adapter", "merged"), map(read, found), strict=True))


def grades(record: EvalRecord) -> list[float]:
    return [problem.grade for problem in record.problems]


def test_the_adapter_and_the_merged_model_say_the_same_to_every_problem(records: Mapping[str, EvalRecord]) -> None:
    assert grades(records["adapter"]) == grades(records["merged"])
    assert (records["adapter"].version, records["merged"].version) == (STEPS, None)


def test_learner_and_engines_are_asked_to_start_before_anyone_waits_for_the_graders(
    records: Mapping[str, EvalRecord], starts: list[str]
) -> None:
    assert starts[:3] == ["LearnerGroup", "Membership", "GraderActors"]
    assert starts.count("LearnerGroup") == len(records), "the base is loaded once in each"


def test_the_command_finds_what_the_run_itself_found_and_not_what_its_base_did(
    trained: JobConfig, records: Mapping[str, EvalRecord]
) -> None:
    """Figure by figure, intervals included."""
    evaluated = {line["step"]: line for line in read_metrics(trained.run_dir) if "eval/accuracy" in line}
    found = {name: value for name, value in records["adapter"].facts.items() if name.startswith("eval/")}
    assert found == {name: evaluated[STEPS][name] for name in found}
    assert found["eval/accuracy"] != evaluated[0]["eval/accuracy"]


def test_pass_at_k_comes_with_samples(records: Mapping[str, EvalRecord]) -> None:
    assert "eval/pass_at_1" in records["merged"].facts and records["merged"].facts["eval/samples"] == 2
    assert "eval/pass_at_1" not in records["adapter"].facts


def test_every_held_out_problem_is_there_and_none_that_was_trained_on(
    trained: JobConfig, records: Mapping[str, EvalRecord]
) -> None:
    problems = records["adapter"].problems
    assert [problem.id for problem in problems] == list(range(8))
    assert all("How many" in problem.prompt for problem in problems)
    assert records["adapter"].versions["torch"] and records["adapter"].config == trained.model_dump(mode="json")


def test_a_run_is_as_it_was_but_for_its_evaluations(
    trained: JobConfig, before: Files, records: Mapping[str, EvalRecord]
) -> None:
    after = contents(trained.run_dir)
    assert {path: content for path, content in after.items() if path.parts[0] != "eval"} == before
    assert {path.name for path in after if path.parts[0] == "eval"} == {
        f"step-{STEPS:06d}.json",
        f"step-{STEPS:06d}.txt",
    }


def test_an_adapter_of_another_base_is_refused_before_anything_is_sampled(
    trained: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        pytest.fail("a sampler was given the adapter")

    monkeypatch.setattr(SamplerPool, "load", load)
    other = tmp_path / "other"
    initial_model(MICRO, AutoTokenizer.from_pretrained(trained.model.path), max_length=96, seed=4, out=other)
    config = trained.model_copy(update={"model": trained.model.model_copy(update={"path": str(other)})})
    with pytest.raises(CheckpointError, match=r"it is of a base of the same shape .* with other weights"):
        evaluate(config, find_policy(config, trained.run_dir), Progress())


def test_a_policy_is_not_evaluated_on_what_its_run_trained_on(
    trained: JobConfig, records: Mapping[str, EvalRecord], tmp_path: Path
) -> None:
    prompt = records["merged"].problems[3].prompt
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(trained))
    adapter = run / "adapter"
    adapter.mkdir()
    for path, content in contents(trained.run_dir / "checkpoints" / f"step-{STEPS:06d}").items():
        (adapter / path).write_bytes(content)
    assert (adapter / MANIFEST).is_file()
    write_problems(run, ["another", f" {prompt.upper()} "], ["1", "2"])
    with pytest.raises(ConfigError, match=r"1 of 8 held-out problems are .*training problem 1 "):
        evaluate(trained, find_policy(trained, adapter), Progress())
