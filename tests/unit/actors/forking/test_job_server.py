"""Which jobs have a fork server of their own, and for how many threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from actors.cluster.threads import with_chosen_threads
from actors.forking.job_server import job_server
from rlsys.config import JobConfig, parse_config
from rlsys.utils.free_cores import Cores


def never() -> NoReturn:
    raise AssertionError("the cores were measured, although nothing depends on them")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 1024}')
    return lambda *given: parse_config("run: {name: one}", [f"model.path={tmp_path}", *given])


def test_server_and_run_have_as_many_threads_as_the_cores_that_were_free_before_the_server_started(
    job: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls: list[Cores] = []

    @functools.cache  # as the command's
    def sample() -> Cores:
        calls.append(Cores(frozenset(range(3)), {0: 1.0}))
        return calls[-1]

    with job_server(job(), sample) as server:
        assert server is not None and server.address.threads == 2
        run = with_chosen_threads(job(), lambda _: None, sample)
        assert (run.learner.threads, run.sampler.threads) == (2, 2)
    assert len(calls) == 1
    with job_server(job("learner.threads=3", "sampler.threads=3"), never) as server:
        assert server is not None and server.address.threads == 3


@pytest.mark.parametrize(
    "given",
    [
        ["cluster.address=127.0.0.1:6379"],
        ["learner.num_gpus=1", "sampler.num_gpus=1", "model.dtype=bfloat16"],
        ["learner.threads=1", "sampler.threads=2"],
    ],
)
def test_a_job_that_cannot_use_a_server_measures_nothing(job: Callable[..., JobConfig], given: list[str]) -> None:
    with job_server(job(*given), never) as server:
        assert server is None
