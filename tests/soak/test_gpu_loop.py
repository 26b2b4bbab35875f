"""`make gpu-loop` on a CPU: every part of it, with real engines and jobs. About five minutes on a quiet machine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_journal import read_facts
from tests.waiting import run

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.gpu_loop", "--device", "cpu", "--minutes", "120"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def facts_of(folder: Path, part: str) -> dict[str, Any]:
    return {fact["fact"]: fact for fact in read_facts(folder) if fact["part"] == part}


def test_the_loop_runs_on_a_cpu_and_every_fact_of_it_comes_out_right(tmp_path: Path) -> None:
    ran = run([*COMMAND, str(tmp_path)], env=ENVIRONMENT, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    facts = read_facts(tmp_path)
    assert [fact["fact"] for fact in facts if fact.get("passed") is False] == []
    ended = [(fact["part"], fact["value"]) for fact in facts if fact["fact"] == "part"]
    parts = ["engine", "job colocated", "job half and half", "engine with CUDA graphs"]
    assert ended == [(part, "done") for part in parts]

    engine = facts_of(tmp_path, "engine")
    assert engine["version 0: canary, sampler to learner"]["separation"] == 0  # B is 0: it is the base
    assert engine["version 2: canary, sampler to learner"]["separation"] > 0
    assert all(engine[f"step {step}: mean |p - q|"]["value"] < 1e-3 for step in (1, 2, 3))
    assert engine["step 1: logprob_diff_64_256_mean"]["value"] < 1e-3
    assert engine["GPU memory that sleep gave back"]["value"] == "not on cpu"

    first, second = facts_of(tmp_path, "job colocated"), facts_of(tmp_path, "job half and half")
    assert first["engine killed (SIGKILL)"]["after_step"] == 2
    assert first["from the engine's death to the end of the next step"]["step"] == 3
    assert any(name.startswith("base, step") for name in first) and not any(n.startswith("base, step") for n in second)
    for job in (first, second):
        assert job["steps made"]["value"] == 4
        assert 0.3 < job["resident memory of the sampler, at most"]["ratio"] < 1.5
        assert all(job[f"step {step}: sampler"]["value"] > 0 for step in (1, 2, 3, 4))


def test_an_engine_that_never_starts_is_told_by_its_own_error_and_the_next_part_begins(tmp_path: Path) -> None:
    parts = ["--part", "engine", "--part", "engine with CUDA graphs"]
    ran = run([*COMMAND, str(tmp_path), *parts, "--set", "sampler.kv_cache_gb=0.00001"], env=ENVIRONMENT, cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout[-3000:] + ran.stderr[-3000:]
    error = facts_of(tmp_path, "engine")["error"]["value"]
    assert "the vLLM engine did not start" in error and "cache" in error, error
    ended = [(fact["part"], fact["value"]) for fact in read_facts(tmp_path) if fact["fact"] == "part"]
    assert ended == [("engine", "failed"), ("engine with CUDA graphs", "done")]
    assert json.loads((tmp_path / "facts.jsonl").read_text().splitlines()[0])["part"] == "machine"
