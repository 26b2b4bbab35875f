"""Seconds from a command to its first result: `rlsys --help`, a refused config, a job alone, on a Ray cluster and on
one after `rlsys warm`, an evaluation there, and a client of a running deployment.

    python -m benchmarks.startup [--repeats 5] [--only help refused job joined warm eval client smollm2]

Each repetition starts new processes; the files are in the page cache after a first round that is not counted. A job is
the quickstart's model with random weights and 8 problems of 8 completions in a step; its first step is read from
metrics.jsonl, which has the time at which a step ended. `smollm2` (only where it is named, after `make real-model`): a
job on SmolLM2-135M-Instruct in bfloat16 with 2 problems of 4 completions and the threads that a run chooses.

Phases: until Ray runs (`ray`), until the engines start (`actors`), until they have proved that adapters reach their
forward pass (`engines`), first evaluation and first step (`step`), and from the end of the last step to the exit
(`close`). `cpu`: CPU seconds of the driver, of Ray and of all actors from the command to its exit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.overhead import quickstart_shape
from benchmarks.real import real_model
from benchmarks.rows import Row, Target, finish

ROOT = Path(__file__).parents[1]
RLSYS = [sys.executable, "-m", "rlsys"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
JOB = """
run: {{name: job, seed: 5, dir: {where}}}
model: {{path: {base}, dtype: float32, max_length: 128}}
task: {{min_operations: 4, max_operations: 5, supervised_max_operations: 5, eval_problems: 32}}
learner: {{logprob_chunk_tokens: 4096}}
rl: {{steps: 2, problems_per_step: 8, samples_per_problem: 8, sampling: {{max_tokens: 56}}}}
eval: {{every_steps: 0, max_tokens: 56}}
tracking: {{wandb: disabled}}
"""
REAL = (
    *("model.dtype=bfloat16", "model.max_length=384", "learner.logprob_chunk_tokens=1024", "task.eval_problems=2"),
    *("rl.problems_per_step=2", "rl.samples_per_problem=4", "rl.sampling.max_tokens=24", "eval.max_tokens=24"),
)
CLIENT = """
import sys
from rlsys import Datum, ModelInput, SamplingParams, ServiceClient
from rlsys.client.config import ServiceConfig

service = ServiceClient(ServiceConfig(detached="startup"), models={"base": sys.argv[1]})
training = service.create_lora_training_client("base", rank=8)
tokens = list(range(8, 40))
datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * 31})
training.forward_backward([datum], "cross_entropy").result()
sampling = training.save_weights_and_get_sampling_client()
print(sampling.sample(ModelInput.from_ints(tokens), 1, SamplingParams(max_tokens=4)).result().sequences[0].tokens)
"""
PHASES = {"on a Ray cluster on": "ray", "on the Ray cluster at": "ray", "starting engines: started": "actors"}
LOOK_S = 0.25  # between two readings of the process table
LIMITS = {"help": 0.3, "refused": 0.3, "job": 12.0, "joined": 12.0, "warm": 5.0, "eval": 5.0, "client": 5.0}


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds of one start, and of its phases."""

    first_step: float
    phases: dict[str, float]
    cpu: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(TITLES), default=list(LIMITS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as scratch:
        folder = Path(scratch)
        base = quickstart_shape(folder)
        for name in options.only:
            measure(name, folder, base, options.repeats)


def measure(name: str, folder: Path, base: Path, repeats: int) -> None:
    side: Callable[[], Start]
    with cluster() if name in ("joined", "warm", "eval", "client") else nothing() as environment:
        if name in ("warm", "eval"):
            timed([*RLSYS, "warm"], 0, environment)
        match name:
            case "help":
                side = lambda: timed([*RLSYS, "--help"], 0)  # noqa: E731
            case "refused":
                bad = folder / "bad.yaml"
                bad.write_text(JOB.format(where=folder, base=base) + "rll: {}\n")
                side = lambda: timed([*RLSYS, "train", str(bad)], 1)  # noqa: E731
            case "eval":
                trained = folder / "trained.yaml"
                trained.write_text(JOB.format(where=folder, base=base))
                timed([*RLSYS, "train", str(trained)], 0, environment)
                command = [*RLSYS, "eval", str(trained), "--checkpoint", str(folder / "job")]
                side = lambda: timed(command, 0, environment)  # noqa: E731
            case "client":
                side = lambda: timed([sys.executable, "-c", CLIENT, str(base)], 0, environment)  # noqa: E731
            case "smollm2":
                side = lambda: job(folder, real_model(), environment, REAL)  # noqa: E731
            case _:
                side = lambda: job(folder, base, environment)  # noqa: E731
        side()  # page cache
        starts = []
        for repeat in range(repeats):
            starts.append(side())
            print(f"{repeat + 1:>8}  {name}: {starts[-1]}", file=sys.stderr, flush=True)
    names, cpu = starts[0].phases, [start.cpu for start in starts]
    limit = {"limit": [LIMITS[name]] * repeats} if name in LIMITS else {}
    finish(
        Row(
            name=f"startup-{name}",
            title=TITLES[name],
            command=f"startup --repeats {repeats} --only {name}",
            unit="s",
            sides={"start": [start.first_step for start in starts], **limit},
            targets=[Target("start", each, 1.0, "<=") for each in limit],
            more={"phases, median": {each: statistics.median(s.phases[each] for s in starts) for each in names}}
            | ({"cpu s": cpu} if any(cpu) else {}),
        )
    )


TITLES = {
    "help": "start: `rlsys --help`",
    "refused": "start: `rlsys train` with a misspelled section, to its refusal",
    "job": "start: `rlsys train` on an existing base of 0.4M parameters, command to the end of the first RL step",
    "joined": "start: the same on a Ray cluster that is up",
    "warm": "start: the same on such a cluster after `rlsys warm`",
    "eval": "start: `rlsys eval` of 32 problems on such a cluster, command to exit",
    "client": "start: a second client of a detached deployment, to its first update and its first completion",
    "smollm2": "start: `rlsys train` on SmolLM2-135M-Instruct, command to the end of the first RL step",
}


def timed(command: list[str], expected: int, environment: dict[str, str] | None = None) -> Start:
    began = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    assert done.returncode == expected, done.stdout + done.stderr
    return Start(took, {})


def job(folder: Path, base: Path, environment: dict[str, str], overrides: Sequence[str] = ()) -> Start:
    with tempfile.TemporaryDirectory(dir=folder) as where:
        config = Path(where) / "job.yaml"
        config.write_text(JOB.format(where=where, base=base))
        began, at = time.time(), dict[str, float]()
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | environment
        process = subprocess.Popen(
            [*RLSYS, "train", str(config), *overrides],
            cwd=ROOT,
            env=env | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        used = CpuSeconds()  # of this benchmark's processes: the cluster is one of them
        said = []
        for line in process.stdout:
            said.append(line)
            for sign, phase in PHASES.items():
                if sign in line:
                    at.setdefault(phase, time.time() - began)
            if "starting engines: done" in line:
                at["engines"] = time.time() - began
        assert process.wait() == 0, "".join(said)
        if any("was not forked" in line for line in said):
            raise SystemExit("".join(said))
        ended, cpu = time.time() - began, used.stop()
        lines = [json.loads(line) for line in (Path(where) / "job" / "metrics.jsonl").read_text().splitlines()]
        ends = [line["time"] - began for line in lines if "time/step_s" in line]
    marks = [*at.items(), ("step", ends[0])]
    phases = {name: end - before for (name, end), before in zip(marks, [0.0, *(end for _, end in marks)], strict=False)}
    return Start(ends[0], phases | {"close": ended - ends[-1]}, cpu)


class CpuSeconds:
    """CPU time of this process's descendants since the construction; those that ended count as last seen."""

    def __init__(self) -> None:
        self._before = self._read()
        self._used = dict(self._before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return sum(used - self._before.get(which, 0.0) for which, used in self._used.items())

    def _follow(self) -> None:
        while not self._over.wait(LOOK_S):
            self._used |= self._read()

    def _read(self) -> dict[tuple[int, float], float]:
        found = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
        return found


@contextmanager
def nothing() -> Iterator[dict[str, str]]:
    yield {}


def address(log: Path, ray: subprocess.Popen[str]) -> str:
    """Of the cluster that `ray` starts, as its log has it."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends and ray.poll() is None:
        found = re.search(r"--address='([^']+)'", log.read_text())
        if found:
            return found[1]
        time.sleep(0.2)
    raise SystemExit(f"Ray has not started: {log.read_text()}")


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of this machine, started for the block."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    start = [*RAY, "start", "--head", "--port", "0", "--include-dashboard", "false", "--num-cpus", "4", "--block"]
    with (
        tempfile.NamedTemporaryFile("w") as log,
        subprocess.Popen(start, env=env, stdout=log, stderr=log, text=True) as ray,
    ):
        try:
            yield {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address(Path(log.name), ray)}
        finally:
            ray.terminate()
            ray.wait(60)


if __name__ == "__main__":
    main()
