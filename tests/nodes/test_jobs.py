"""Whole jobs over several machines: what goes by the network only, and what becomes of a job that loses a machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from rlsys.data.problems import Epochs
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.ledger import Ledger
from tests.nodes.conftest import FORM, KIND, write_job
from tests.nodes.machines import Driver, Machine, Machines
from tests.waiting import USUAL_PRIORITY

pytestmark = pytest.mark.timeout(5400)
Job = Callable[..., Path]
SLOW = {"function": "tests.nodes.graders:slow_variety"}
WAIT_S = 120  # for a place: longer than a new machine takes to join, on cores that all machines share
MAKE = {
    "vocab_size": 160, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32,
    "intermediate_size": 64,
    "supervised": {
        "problems": 64, "batch_size": 8, "first_check_step": 2, "check_every_steps": 2, "gate_accuracy": 0,
        "gate_problems": 2, "decay_steps": 2, "max_steps": 20,
    },
}  # fmt: skip


def actors_on(machine: Machine) -> set[str]:
    """Names of the classes of Ray actors that are alive there, as the list of processes has them."""
    titles = [title for process in machine.family() for title in _title(process)]
    return {title.removeprefix("ray::").split(".")[0].split(":")[0] for title in titles if "Actor" in title}


def priorities_on(machine: Machine) -> set[int]:
    """Of the actors there."""
    return {process.nice() for process in machine.family() if any("Actor" in title for title in _title(process))}


def _title(process: psutil.Process) -> list[str]:
    try:
        return [part for part in process.cmdline()[:1] if part.startswith("ray::")]
    except psutil.Error:
        return []


class Run:
    """A driver with its run directory."""

    def __init__(self, machines: Machines, config: Path) -> None:
        self.runs = f"{machines.head.tmp}/runs"
        self.driver: Driver = machines.train(config, f"run.dir={self.runs}")
        self.dir = machines.head.sees(self.runs) / "micro"

    @property
    def steps(self) -> list[dict[str, Any]]:
        if not (self.dir / "metrics.jsonl").exists():
            return []
        return [line for line in read_metrics(self.dir) if "reward/mean" in line]

    def until_step(self, step: int) -> None:
        self.driver.until(lambda: bool(self.steps) and self.steps[-1]["step"] >= step, f"step {step}")

    def finish(self) -> None:
        assert self.driver.wait() == 0, self.driver.output()

    def check_whole(self, steps: int) -> None:
        """All steps, and an adapter."""
        self.check_so_far()
        assert len(self.steps) == steps, self.driver.output()
        assert self.ledger().step == steps
        adapter = load_file(self.dir / "adapter" / "adapter_model.safetensors")
        assert adapter and all(np.isfinite(tensor).all() for tensor in adapter.values())
        assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)

    def check_so_far(self) -> None:
        """Every step once, every problem accounted for once, and the samplers always the learner's equals."""
        assert [line["step"] for line in self.steps] == list(range(1, len(self.steps) + 1)), self.driver.output()
        assert all(line["policy/logprob_diff_max"] < 1e-3 for line in self.steps), self.steps
        ledger = self.ledger()
        counts = ledger.counts()
        assert len(self.steps) - 1 <= ledger.step <= len(self.steps)
        assert counts["trained"] + counts["filtered"] + counts["dropped"] == 4 * ledger.step, counts

    def ledger(self) -> Ledger:
        """Of the newest checkpoint; reading it is an audit."""
        newest = max((self.dir / "checkpoints").glob("step-*"))
        return Ledger.from_bytes((newest / "ledger.npz").read_bytes(), Epochs(32, 4, seed=5))


@dataclass(frozen=True, slots=True)
class Story:
    """What became of a job."""

    run: Run
    lost_at: int  # the step that was written last when its sampler's machine was killed
    back_s: float
    on_new_machine: set[str]
    code: int
    end_s: float  # after the second machine was killed


def test_a_sampler_on_another_machine_gets_base_and_adapters_through_ray_alone(machines: Machines, job: Job) -> None:
    a, b = machines.add("a"), machines.add("b")
    there = {*b.sees("/tmp").rglob("*.safetensors")}  # such as a clone of this project with its models
    by_address = {"learner": {"nodes": [a.address]}, "sampler": {"nodes": [b.address]}}
    by_resource = {"learner": {"resources": {"a": 0.1}}, "sampler": {"resources": {"b": 0.1}}}
    run = Run(machines, job(model={"make": MAKE}, **(by_address if machines.own_files else by_resource)))
    run.driver.until(lambda: "SamplerActor" in actors_on(b) and "LearnerActor" in actors_on(a), "its actors")
    assert "LearnerActor" not in actors_on(b) and "SamplerActor" not in actors_on(a)
    usual = {psutil.Process().nice() + int(USUAL_PRIORITY["RAY_worker_niceness"])}
    assert priorities_on(a) == priorities_on(b) == usual, "beside the work of others they would hardly run"
    run.finish()
    run.check_whole(steps=3)
    assert [line["policy/version"] for line in run.steps] == [1, 2, 3]
    assert all(line["sync/bytes"] > 0 and line["sync/no_power"] == 0 for line in run.steps), run.steps
    if machines.own_files:
        weights = {"model.safetensors", "adapter_model.safetensors"}
        assert weights <= {path.name for path in a.sees(run.runs).rglob("*")}
        assert not b.sees(run.runs).exists()
        assert not weights & {path.name for path in {*b.sees("/tmp").rglob("*.safetensors")} - there}


@pytest.fixture(scope="module", params=[pytest.param(KIND, id=FORM)])
def story(
    request: pytest.FixtureRequest, micro_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """One job that loses its sampler's machine twice: once another one comes, once none does."""
    with request.param() as machines:
        machines.add("a")
        machines.add("b", resources={"engines": 1})
        config = write_job(
            tmp_path_factory.mktemp("story") / "job.yaml",
            model={"path": machines.put(micro_base, "base")},
            learner={"resources": {"a": 0.1}},
            sampler={"resources": {"engines": 1}},
            rewards=SLOW,
            rl={"steps": 200},
            watchdog={"stages": {"sample": WAIT_S}},
        )
        run = Run(machines, config)
        run.until_step(2)
        killed = machines.kill("b")
        c = machines.add("c", resources={"engines": 1})
        at = run.steps[-1]["step"]
        run.until_step(at + 1)
        back_s, on_c = time.monotonic() - killed, actors_on(c)
        run.until_step(at + 3)
        killed = machines.kill("c")
        code = run.driver.wait()
        story = Story(run, at, back_s, on_c, code, time.monotonic() - killed)
        print(f"killed at step {at}; the next step {back_s:.1f} s later; the end {story.end_s:.1f} s after the second")
        print(run.driver.output())
        yield story


@pytest.mark.soak
def test_a_machine_that_dies_in_mid_run_is_replaced_by_one_that_is_added(story: Story) -> None:
    assert "sampler 0 died and is replaced" in story.run.driver.output()
    assert "SamplerActor" in story.on_new_machine
    story.run.check_so_far()
    assert len(story.run.steps) >= story.lost_at + 3


@pytest.mark.soak
def test_a_job_whose_last_sampler_has_nowhere_to_go_ends_with_the_reason(story: Story) -> None:
    said = story.run.driver.output()
    message = said[said.rindex("StalledError") :]
    waited = re.search(
        r"sampler 0 has waited (\d+) s \(watchdog\.stages\.sample\) for a place: (.*) on one node", message
    )
    assert waited and int(waited[1]) >= WAIT_S and "1 engines" in waited[2], message
    assert story.code == 1
    assert "Traceback" not in said


@pytest.mark.soak
def test_a_job_that_ended_for_want_of_a_machine_goes_on_once_there_is_one(
    machines: Machines, job: Job, micro_base: Path
) -> None:
    machines.add("a")
    machines.add("b", resources={"engines": 1})
    config = job(
        model={"path": machines.put(micro_base, "base")},
        learner={"resources": {"a": 0.1}},
        sampler={"resources": {"engines": 1}},
        rewards=SLOW,
        rl={"steps": 12},
        watchdog={"stages": {"sample": 60}},
    )
    run = Run(machines, config)
    run.until_step(3)
    machines.kill("b")
    assert run.driver.wait() == 1, run.driver.output()
    run.check_so_far()
    machines.add("c", resources={"engines": 1})
    again = Run(machines, config)
    again.finish()
    again.check_whole(steps=12)


@pytest.mark.soak
def test_the_samplers_that_are_left_do_the_work_of_a_lost_one_until_it_is_back(
    machines: Machines, job: Job, micro_base: Path
) -> None:
    a = machines.add("a", num_cpus=3)
    machines.add("b", num_cpus=1)
    base = machines.put(micro_base, "base")
    config = job(
        model={"path": base},
        learner={"resources": {"a": 0.1}},
        sampler={"num_workers": 2, "placement": "SPREAD"},
        rewards=SLOW,
        rl={"steps": 60},
    )
    run = Run(machines, config)
    run.until_step(3)
    assert "SamplerActor" in actors_on(a)
    killed = machines.kill("b")
    run.driver.until(lambda: "sampler 1 serves version" in run.driver.output(), "another sampler 1")
    print(f"the lost sampler serves again {time.monotonic() - killed:.1f} s later, after step {run.steps[-1]['step']}")
    run.finish()
    run.check_whole(steps=60)
    assert {line["sampler/workers"] for line in run.steps} == {1.0, 2.0}


@pytest.mark.soak
@pytest.mark.parametrize("delay_s", [0.0, 0.15, 0.3, 0.45, 0.6])
def test_no_problem_is_lost_or_doubled_whenever_in_a_step_the_machine_dies(
    machines: Machines, job: Job, micro_base: Path, delay_s: float
) -> None:
    machines.add("a", resources={"engines": 1})
    machines.add("b", resources={"engines": 2})
    base = machines.put(micro_base, "base")
    config = job(
        model={"path": base},
        learner={"resources": {"a": 0.1}},
        sampler={"num_workers": 2, "resources": {"engines": 1}, "placement": "PACK"},
        rewards=SLOW,
        rl={"steps": 10},
    )
    run = Run(machines, config)
    run.until_step(2)
    time.sleep(delay_s)
    machines.kill("b")
    machines.add("c", resources={"engines": 2})
    run.finish()
    run.check_whole(steps=10)


@pytest.mark.soak
def test_a_job_goes_on_with_the_samplers_left_while_a_lost_one_has_no_place(
    machines: Machines, job: Job, micro_base: Path
) -> None:
    machines.add("a", resources={"engines": 1})
    machines.add("b", resources={"engines": 1})
    start_s = 60
    config = job(
        model={"path": machines.put(micro_base, "base")},
        learner={"resources": {"a": 0.1}},
        sampler={"num_workers": 2, "resources": {"engines": 1}},
        rewards=SLOW,
        rl={"steps": 10_000},
        watchdog={"stages": {"start": start_s}},
    )
    run = Run(machines, config)
    run.until_step(2)
    killed = machines.kill("b")
    run.driver.until(lambda: time.monotonic() - killed > start_s + 20, "a long time without a second sampler")
    run.until_step(run.steps[-1]["step"] + 2)
    run.check_so_far()


@pytest.mark.soak
def test_a_machine_whose_cable_is_cut_counts_as_lost(machines: Machines, job: Job, micro_base: Path) -> None:
    if not machines.own_files:
        pytest.skip("namespaces are refused here, so machines have no cable")
    machines.add("a")
    machines.add("b", resources={"engines": 1})
    config = job(
        model={"path": machines.put(micro_base, "base")},
        learner={"resources": {"a": 0.1}},
        sampler={"resources": {"engines": 1}},
        rewards=SLOW,
        rl={"steps": 10},
    )
    run = Run(machines, config)
    run.until_step(2)
    machines.cut_off("b")
    cut, at = time.monotonic(), run.steps[-1]["step"]
    machines.add("c", resources={"engines": 1})
    run.until_step(at + 1)
    print(f"cut off at step {at}; the next step {time.monotonic() - cut:.1f} s later")
    run.finish()
    run.check_whole(steps=10)


@pytest.mark.soak
def test_a_learner_whose_machine_dies_comes_back_on_another_one_from_the_last_checkpoint(
    machines: Machines, job: Job, micro_base: Path
) -> None:
    machines.add("a")
    machines.add("b", resources={"learning": 1})
    config = job(
        model={"path": machines.put(micro_base, "base")},
        learner={"resources": {"learning": 1}},
        sampler={"resources": {"a": 0.1}},
        rewards=SLOW,
        rl={"steps": 10},
    )
    run = Run(machines, config)
    run.until_step(3)
    killed, at = machines.kill("b"), run.steps[-1]["step"]
    c = machines.add("c", resources={"learning": 1})
    run.until_step(at + 1)
    print(f"killed at step {at}; the next step {time.monotonic() - killed:.1f} s later")
    assert "LearnerActor" in actors_on(c)
    run.finish()
    run.check_whole(steps=10)
