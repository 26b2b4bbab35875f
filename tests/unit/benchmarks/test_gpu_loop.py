"""`make gpu-loop`: every part ends in time and says why it failed, and its jobs are jobs that rlsys takes."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu_loop, gpu_loop_engine, gpu_loop_job, gpu_processes
from benchmarks.gpu_journal import CUT_OFF, DONE, FAILED, LEFT_OUT, Journal, Notes, new_journal, read_facts
from benchmarks.gpu_parts import QUICK, QWEN3_0_6B
from rlsys.architectures.model_shape import model_shape
from rlsys.config import load_config
from rlsys.planning.fit import Node
from rlsys.planning.plan import plan
from tests.waiting import run, times, until, until_gone

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
GIB = 2**30


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return new_journal(tmp_path / "out", time.time())


def facts(journal: Journal) -> dict[str, object]:
    return {fact["fact"]: fact["value"] for fact in read_facts(journal.folder)}


def behaving(journal: Journal, how: str, limit_s: float = 120.0) -> str:
    arguments = ["--device=cpu", f"--set={how}"]
    environment = gpu_processes.part_environment("cpu")
    return gpu_processes.run_part(journal, "a part", "tests.unit.sample_parts", arguments, limit_s, environment)


def test_a_part_s_facts_are_printed_as_it_writes_them(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    assert behaving(journal, "ends well") == DONE
    assert "a part: began: ends well" in capsys.readouterr().out
    assert (journal.folder / "a-part.log").is_file() and facts(journal) == {"began": "ends well"}


@pytest.mark.parametrize(
    ("how", "fact", "told"),
    [
        ("raises", "error", "ValueError: no such kernel image"),
        ("is killed", "last error in its log", "RuntimeError: out of memory on device 0"),
        ("misses a bound", "a figure", 2.0),
    ],
)
def test_a_part_that_fails_leaves_the_reason_as_a_fact(journal: Journal, how: str, fact: str, told: object) -> None:
    assert behaving(journal, how) == FAILED
    assert facts(journal)[fact] == told


def test_a_part_that_hangs_is_cut_off_with_all_that_it_started(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_processes, "GRACE_S", 1.0)
    assert behaving(journal, "hangs", limit_s=5.0 * times()) == CUT_OFF
    found = facts(journal)
    assert found["last error in its log"] == "ValueError: waits for a GPU"
    until_gone([int(str(found["child"]))], "the child of the part")


def test_parts_begin_whatever_became_of_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = "tests.unit.sample_parts"
    parts = {"first": (sample, ("--set=raises",), 1.0, 60.0), "second": (sample, ("--set=ends well",), 1.0, 60.0)}
    monkeypatch.setattr(gpu_loop, "PARTS", parts)
    assert gpu_loop.main([str(tmp_path / "out"), "--device", "cpu"]) == 1
    ended = [(fact["part"], fact["value"]) for fact in read_facts(tmp_path / "out") if fact["fact"] == "part"]
    assert ended == [("first", FAILED), ("second", DONE)]


def test_parts_for_which_there_is_no_time_are_left_out_by_name(tmp_path: Path) -> None:
    assert gpu_loop.main([str(tmp_path), "--device", "cpu", "--minutes", "0.001"]) == gpu_loop.MISSING
    ended = [fact["part"] for fact in read_facts(tmp_path) if fact["value"] == LEFT_OUT]
    assert ended == list(gpu_loop.PARTS)


def test_on_a_cpu_the_part_with_cuda_graphs_says_that_there_are_none(tmp_path: Path) -> None:
    assert gpu_loop.main([str(tmp_path), "--device", "cpu", "--part", gpu_loop.GRAPHS]) == 0
    assert any(fact["value"] == "not on cpu" for fact in read_facts(tmp_path))


def test_every_part_may_begin_within_six_minutes_if_those_before_are_no_slower_than_expected() -> None:
    assert sum(needs_s for *_, needs_s, _ in gpu_loop.PARTS.values()) < 60 * gpu_loop.MINUTES["cuda"]
    assert all(needs_s < limit_s for *_, needs_s, limit_s in gpu_loop.PARTS.values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "found no folder for the results; wanted make gpu-loop OUT=FOLDER"),
        (["{out}", "--set", "sampler.kv_cach_gb=3"], "did you mean 'kv_cache_gb'?"),
        (["{out}", "--minutes", "-1"], "--minutes: found -1; wanted more than 0"),
        (["{out}", "--part", "engines"], "invalid choice: 'engines'"),
        (["{file}"], "wanted a folder that can be written to"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "file").touch()
    given = [one.format(out=tmp_path / "out", file=tmp_path / "file") for one in arguments]
    command = [sys.executable, "-m", "benchmarks.gpu_loop", "--device", "cpu", *given]
    ran = run(command, env=ENVIRONMENT, cwd=tmp_path)
    assert ran.returncode == 2 and told in ran.stderr and "usage:" in ran.stderr
    assert read_facts(tmp_path / "out") == []


def test_a_machine_without_vllm_is_told_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_loop", str(tmp_path / "out")]
    ran = run(command, env=ENVIRONMENT, cwd=tmp_path)
    assert ran.returncode == 2 and "found no torch, transformers, peft, pydantic, psutil, ray, vllm" in ran.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("colocate", [True, False])
def test_the_jobs_are_jobs_that_rlsys_takes(tmp_path: Path, device: str, colocate: bool) -> None:
    keys = gpu_loop_job.overrides(tmp_path, "a-job", device, colocate, [])
    config = load_config(gpu_loop_job.CONFIG, keys)
    assert config.sampler.colocate == colocate and config.model.make is not None
    assert config.tracking.wandb == "disabled" and config.cluster.max_restarts > 0
    assert (config.learner.device, config.sampler_device) == (device, device)
    assert config.model.dtype == ("bfloat16" if device == "cuda" else "float32")
    assert config.rl.steps > gpu_loop_job.KILL_AFTER
    gpus = {"GPU": 1.0} if device == "cuda" else {}
    h200 = Node("h200", {"CPU": 16.0, **gpus}, 128 * GIB, 140 * GIB if gpus else None)
    assert plan(config, model_shape(config.model), [h200]).shortfalls == ()


def test_a_job_takes_the_base_that_an_earlier_one_made_and_keys_that_are_asked_for_win(tmp_path: Path) -> None:
    for name in ("a-job", "earlier"):  # its own base goes with --fresh
        (tmp_path / "runs" / name / "base").mkdir(parents=True)
    keys = gpu_loop_job.overrides(tmp_path, "a-job", "cpu", False, ["rl.steps=9"])
    config = load_config(gpu_loop_job.CONFIG, keys)
    assert (
        config.model.path == str(tmp_path / "runs" / "earlier" / "base")
        and config.model.make is None
        and config.rl.steps == 9
    )


@pytest.mark.parametrize(("device", "shape"), [("cpu", QUICK), ("cuda", QWEN3_0_6B)])
@pytest.mark.parametrize("graphs", [True, False])
def test_the_engine_s_job_holds_its_prompts(tmp_path: Path, device: str, shape: dict[str, int], graphs: bool) -> None:
    config = gpu_loop_engine.engine_job(tmp_path, device, graphs, ["rl.problems_per_step=5"])
    tokens, offsets = gpu_loop_engine.draw_prompts(config, shape["vocab_size"], device)
    lengths = [int(b - a) for a, b in itertools.pairwise(offsets)]
    assert len(lengths) == 5 == config.rl.problems_per_step and tokens.max() < shape["vocab_size"]
    assert max(lengths) + config.rl.sampling.max_tokens <= config.model.max_length
    assert config.sampler.enforce_eager == (device == "cuda" and not graphs)


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("", "it wrote nothing"),
        ("loading\n\n", "loading"),
        ("a\ntorch.OutOfMemoryError: CUDA out of memory\n  at line 3\n", "torch.OutOfMemoryError: CUDA out of memory"),
        ("ValueError: first\nRuntimeError: last\nbye\n", "RuntimeError: last"),
    ],
)
def test_the_last_error_of_a_log_is_told(tmp_path: Path, log: str, told: str) -> None:
    (tmp_path / "log").write_text(log)
    assert gpu_processes.last_error(tmp_path / "log") == told


@pytest.fixture
def driver() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child that looks like vLLM's."""
    script = "bash -c 'exec -a VLLM::EngineCore sleep 1000' & wait; sleep 1000"
    process = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    until(lambda: len(gpu_processes.engines(process.pid)) == 1, "the engine's process")
    yield process
    gpu_processes.end_process(process)


def test_what_a_job_writes_becomes_facts_once_and_its_engine_is_killed_after_the_second_step(
    journal: Journal, driver: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    keys = gpu_loop_job.overrides(tmp_path, "a-job", "cpu", True, [])
    config = load_config(gpu_loop_job.CONFIG, keys)
    config.run_dir.mkdir(parents=True)
    log = tmp_path / "log"
    log.write_text("starting engines: started\nrlsys: a note\nstarting engines: done after 3:16\nreinforcement learn")
    watch = gpu_loop_job.Watch(Notes(journal, "job"), config, driver, True, log)
    for step in (1, 2, 3):
        line = {
            "step": step, "time": 0.0, "stage": "rl", "row": step, "reward/mean": 0.5, "policy/tokens": 100.0,
            "policy/logprob_diff_mean": 1e-7, "policy/logprob_diff_0_64_max": 2e-7, "time/learn_s": 0.5,
            "time/step_s": 2.0, "sampler/tokens_per_s": 400.0, "sampler/completion_tokens": 120.0,
            "sampler/resampled_groups": 8.0 * (step == 3), "sync/canary_new": 1e-7, "sync/separation": 1e-2,
            "sync/bytes": 1000.0,
        }  # fmt: skip
        with (config.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        watch.look()
        watch.look()
        assert (watch.killed is not None) == (step >= gpu_loop_job.KILL_AFTER)
    found = read_facts(journal.folder)
    stages = [fact["value"] for fact in found if fact["fact"] == "stage: starting engines"]
    assert stages == ["started", "done after 3:16"]
    names = [fact["fact"] for fact in found if not fact["fact"].startswith("stage")]
    assert len(names) == len(set(names)) and watch.steps == {1, 2, 3} and watch.recovered
    values = facts(journal)
    assert values["step 2: learner"] == 200.0 and values["step 3: logprob_diff_0_64_max"] == 2e-7
    (again,) = [fact for fact in found if fact["fact"].startswith("from the engine's death")]
    assert (again["step"], again["groups_sampled_again"]) == (3, 8.0)
    until(lambda: gpu_processes.engines(driver.pid) == [], "the end of the engine's process")


def test_a_part_gets_its_own_arguments_and_those_of_all() -> None:
    options = argparse.Namespace(device="cpu", minutes=6.0, set=["a.b=c d"], part=[gpu_loop.COLOCATED])
    (part,) = gpu_loop.parts_of(Journal(Path(), 0.0), options)
    _, name, _, arguments, device = part.work.args  # type: ignore[attr-defined]
    assert (name, device) == (gpu_loop.COLOCATED, "cpu")
    assert arguments == ["--device=cpu", "--set=a.b=c d", "--colocate", "--kill"]


SESSION = ROOT / "benchmarks" / "gpu_session.sh"


def test_the_script_for_a_session_unpacks_what_the_machine_lacks_and_runs_the_loop(tmp_path: Path) -> None:
    (tmp_path / "packed" / "vllm").mkdir(parents=True)
    subprocess.run(["tar", "-cJf", "archive.tar.xz", "-C", "packed", "vllm"], cwd=tmp_path, check=True)
    mine = {"PYTHON": sys.executable, "MINUTES": "0.001", "SITE": str(tmp_path / "site"), "ARGS": "--device cpu"}
    ran = run([str(SESSION), "loop", "out", "archive.tar.xz"], env={**ENVIRONMENT, **mine}, cwd=tmp_path)
    assert ran.returncode == gpu_loop.MISSING, ran.stdout + ran.stderr
    assert (tmp_path / "site" / "vllm").is_dir() and (tmp_path / "out" / "machine.txt").is_file()
    ended = [fact["part"] for fact in read_facts(tmp_path / "out") if fact["value"] == LEFT_OUT]
    assert ended == list(gpu_loop.PARTS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "found ''; wanted check or loop"),
        (["chek", "out"], "found 'chek'; wanted check or loop"),
        (["loop"], "found no folder for the results"),
        (["loop", "out", "nothing.tar.xz"], "nothing.tar.xz cannot be read"),
        (["check", "file"], "file cannot be made"),
    ],
)
def test_the_script_for_a_session_refuses_wrong_arguments(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "file").touch()
    ran = run([str(SESSION), *arguments], env=ENVIRONMENT, cwd=tmp_path)
    assert ran.returncode == 2 and told in ran.stderr and "gpu_session.sh loop OUT" in ran.stderr


def test_the_script_for_a_session_passes_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([str(shellcheck), str(SESSION)], capture_output=True, text=True).stdout == ""
