"""Ray workers that `rlsys warm`'s processes fork: Ray starts, watches and ends them like its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import ActorDiedError, RayActorError

from actors.cluster.placement import Placement
from actors.cluster.ray_cluster import threads_env
from actors.evaluation import Loaded
from actors.faults import actor_logs
from actors.faults.actor_logs import Failures
from actors.forking import model_check, warm
from actors.forking.servers import fork_servers, with_runtime
from actors.job_actors import policy_actors
from actors.stages.learner_group import LearnerGroup
from rlsys.config import parse_config
from rlsys.planning.model_folder import check_job
from tests.ray.conftest import JOB, WarmCluster, rlsys
from tests.waiting import until_gone


class Watched:
    """An actor that tells about its process."""

    def facts(self) -> dict[str, Any]:
        import torch

        blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        with open("/proc/self/oom_score_adj") as file:
            oom = file.read()
        return {
            "pid": os.getpid(),
            "by": os.environ.get("RLSYS_FORKED_BY"),
            "not forked": os.environ.get("RLSYS_NOT_FORKED"),
            "same": {
                "folder": os.getcwd(),
                "path": sys.path,
                "blocked": blocked,
                "terminate": repr(signal.getsignal(signal.SIGTERM)).partition(" at ")[0],
                "interrupt": repr(signal.getsignal(signal.SIGINT)),
                "nice": os.nice(0),
                "cores": sorted(os.sched_getaffinity(0)),
                "oom": oom,
                "leads": os.getpgrp() == os.getpid(),
                "threads": torch.get_num_threads(),
                "temporary": os.environ.get("TMPDIR"),
                "title": psutil.Process().cmdline()[0],
                "variables": sorted(set(os.environ) - {"RLSYS_FORKED_BY", "TORCHINDUCTOR_CACHE_DIR"}),
            },
        }

    def die(self) -> None:
        print("these were my last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def options(ray_cluster: str) -> Iterator[dict[str, Any]]:
    ray.init(address=ray_cluster, log_to_driver=False)
    found = warm.running(print)
    assert [threads for _, threads in found] == [1]
    [server] = found.values()
    plain = {"num_cpus": 0.1, "runtime_env": threads_env(1)}
    yield with_runtime(plain, py_executable=server.worker_command("learner"))
    ray.shutdown()


def test_a_forked_worker_is_one_that_ray_starts(options: dict[str, Any], warm_cluster: WarmCluster) -> None:
    plain = {**options, "runtime_env": threads_env(1)}
    forked, own = (ray.remote(Watched).options(**each).remote() for each in (options, plain))
    facts, expected = ray.get([forked.facts.remote(), own.facts.remote()])
    assert facts["by"] in warm_cluster.said and facts["not forked"] is None and expected["by"] is None
    assert facts["same"] == expected["same"] and facts["same"]["title"].startswith("ray::Watched")
    process = actor_logs.process_of(forked)
    assert process is not None and process.pid == facts["pid"]
    for actor, pid in ((forked, facts["pid"]), (own, expected["pid"])):
        ray.kill(actor)
        until_gone([pid], "the worker")


def test_the_model_of_a_job_that_joins_is_checked_by_the_clusters_server(
    warm_cluster: WarmCluster, micro_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = parse_config(JOB, [f"model.path={micro_base}", f"cluster.address={warm_cluster.address}"])
    notes = check_job(job)
    assert notes
    # pytest's variable, which an import may read, is in the server that of the test that started it
    of_server = psutil.Process(int(warm_cluster.said.split()[-1])).environ()
    monkeypatch.setenv("PYTEST_CURRENT_TEST", of_server.get("PYTEST_CURRENT_TEST", ""))
    monkeypatch.setattr(model_check, "check_job", lambda _: pytest.fail("the driver checks"))
    assert model_check.model_check(job, None)() == notes


def first_processes() -> set[psutil.Process]:
    """Processes that Ray started for forked workers of this test's cluster."""
    every = psutil.process_iter(["cmdline"])
    found = {each for each in every if any(part.endswith("forking/client.py") for part in each.info["cmdline"] or [])}
    return {each for each in found if f"--gcs-address={os.environ['RAY_ADDRESS']}" in each.cmdline()}


@pytest.mark.parametrize("how", ["die", "leave"])
def test_the_death_of_a_forked_worker_is_reported_with_its_log(options: dict[str, Any], how: str) -> None:
    actor = ray.remote(Watched).options(**options).remote()
    facts = ray.get(actor.facts.remote())
    assert facts["by"]
    with pytest.raises(ActorDiedError):
        ray.get(getattr(actor, how).remote(), timeout=60)
    until_gone([facts["pid"]], "the worker")
    if how == "die":
        assert "these were my last words" in actor_logs.tail(actor)


def test_a_forked_worker_whose_first_process_is_killed_ends_and_ray_sees_it(options: dict[str, Any]) -> None:
    before = first_processes()
    actor = ray.remote(Watched).options(**options).remote()
    facts = ray.get(actor.facts.remote())
    [first] = first_processes() - before
    first.kill()
    until_gone([facts["pid"]], "the worker")
    with pytest.raises(RayActorError):
        ray.get(actor.facts.remote(), timeout=60)


def test_a_job_has_a_server_of_its_own_where_two_of_its_actors_start_and_none_is_warm(options: dict[str, Any]) -> None:
    config = parse_config(JOB, ["model.path=x", "learner.threads=2", "sampler.threads=2"])
    servers = fork_servers(None, config, print)
    placement = Placement(config, print)
    try:
        [rank], [sampler] = placement.reserve()
        with servers.for_slots([rank], print):
            assert "py_executable" not in servers.learner_options(rank)["runtime_env"]
        with servers.for_slots([rank, sampler], print):
            actor = ray.remote(Watched).options(**servers.learner_options(rank)).remote()
            facts = ray.get(actor.facts.remote())
            assert facts["by"] and facts["not forked"] is None and facts["same"]["threads"] == 2
        until_gone([int(facts["by"])], "the server")
        assert ray.get(actor.facts.remote())["pid"] == facts["pid"], "what it forked lives on"
        assert "py_executable" not in servers.learner_options(rank)["runtime_env"]
    finally:
        placement.release()


def test_the_actors_of_a_job_are_launched_where_it_has_its_own_server(
    options: dict[str, Any], micro_base: Path
) -> None:
    config = parse_config(JOB, [f"model.path={micro_base}", "learner.threads=2", "sampler.threads=2"])
    servers = fork_servers(None, config, print)
    learner = LearnerGroup(config, Loaded(None), Failures(), print, servers)
    with policy_actors(config, learner, Failures(), print, servers=servers):
        assert [threads for _, threads in servers.servers] == [1, 2]  # the first is the cluster's
    assert [threads for _, threads in servers.servers] == [1]


def test_a_cluster_that_is_warm_is_left_as_it_is(warm_cluster: WarmCluster) -> None:
    before, again = warm_cluster.said, rlsys("warm")
    assert again.replace("was warm already", "is warm").partition(":")[0] == before.partition(":")[0]
    assert again.rpartition("processes ")[2] == before.rpartition("processes ")[2]
