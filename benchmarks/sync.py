"""Seconds to transfer an adapter from the learner to its samplers, against a memory copy of the same bytes.

    python -m benchmarks.sync --out sync.json      # from the repository's root; under 3 minutes

The transfer is that of a job: `publish` of an actor returns a WeightUpdate, whose reference is passed to `load` of each
sampler. Time is measured from the start of `publish` until the last sampler has read every byte, on the machine's
clock. It does not include the engine's processing of the bytes or the learner's hashing. The memory copy is between two
arrays that were written before, in the publishing actor.

Measured on one node; on two nodes with one address (Ray's Cluster utility); and, as root, on two machines simulated
with network namespaces and a virtual link (tests/nodes/machines.py). Repetitions alternate between all sizes and
numbers of samplers, with a copy timed beside each, so that other load affects all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster

from actors.cluster.ray_cluster import threads_env
from actors.faults.actor_calls import wait
from rlsys.weight_sync.tensors import digest_tensors, snapshot_of, tensors_of
from rlsys.weight_sync.update import WeightUpdate
from tests.nodes.machines import ROOT, best

LIMIT_S = 60.0
STORE_MB = 1500
RANK = 8
LAYERS, MODULES = 28, 7  # as many tensors as a rank-8 adapter of Qwen3-0.6B has: 392


class Publisher:
    """Publishes an update as the learner does."""

    def __init__(self, megabytes: float) -> None:
        columns = max(1, round(megabytes * 1e6 / 4 / RANK / (2 * LAYERS * MODULES)))
        tensors = {
            f"layers.{layer}.module_{module}.lora_{side}": torch.randn(
                (RANK, columns) if side == "A" else (columns, RANK)
            )
            for layer, module, side in product(range(LAYERS), range(MODULES), "AB")
        }
        nothing = np.zeros(63, np.float32)
        snapshot = snapshot_of("bench", 0, RANK, tensors, "float32")
        self.update = WeightUpdate(snapshot, np.zeros(64, np.int32), nothing, nothing, 1.0)
        self.target = np.ones_like(snapshot.buffer)

    @ray.method(num_returns=2)
    def publish(self) -> tuple[WeightUpdate, dict[str, Any]]:
        buffer = self.update.snapshot.buffer
        return self.update, {"began": time.monotonic(), "nbytes": buffer.nbytes, "digest": self.update.snapshot.digest}

    def copy(self) -> float:
        """Seconds of one copy."""
        began = time.perf_counter()
        np.copyto(self.target, self.update.snapshot.buffer)
        return time.perf_counter() - began


class Receiver:
    """Receives an update as a sampler actor does, and reads it."""

    async def load(self, update: WeightUpdate) -> tuple[float, int]:
        """When every byte had been read, and their sum as 64-bit numbers."""
        total = int(update.snapshot.buffer.view(np.uint64).sum())
        return time.monotonic(), total

    async def digest(self, update: WeightUpdate) -> str:
        return digest_tensors(sorted(tensors_of(update.snapshot).items()))


def measure(where: str, sizes: Sequence[float], counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row per size and number of samplers, on the cluster that is connected: publisher on "a", samplers on "b"."""
    options = {"num_cpus": 0, "runtime_env": threads_env(1)}
    publishers = {size: ray.remote(Publisher).options(**options, resources={"a": 0.01}).remote(size) for size in sizes}
    there = ray.remote(Receiver).options(**options, resources={"b": 0.01}, max_concurrency=1000)
    receivers = [there.remote() for _ in range(max(counts))]
    seconds: dict[tuple[float, int], list[float]] = {combination: [] for combination in product(sizes, counts)}
    copies: dict[tuple[float, int], list[float]] = {combination: [] for combination in seconds}
    for size in sizes:
        verify(publishers[size], receivers, size)
    for repeat in range(repeats + 1):
        for size, count in seconds:
            took = once(publishers[size], receivers[:count])
            copied = wait(publishers[size].copy.remote(), LIMIT_S, "publisher: copying")
            if repeat:  # the first warms up
                seconds[size, count].append(took)
                copies[size, count].append(copied)
    for actor in (*publishers.values(), *receivers):
        ray.kill(actor)
    return [
        {"where": where, "megabytes": size, "samplers": count, "seconds": took, "copy_seconds": copies[size, count]}
        for (size, count), took in seconds.items()
    ]


def once(publisher: Any, receivers: Sequence[Any]) -> float:
    """Seconds from put to last receipt."""
    update, label = publisher.publish.remote()
    began = wait(label, LIMIT_S, "publisher: publishing")["began"]
    receipts = [receiver.load.remote(update) for receiver in receivers]
    answers = [wait(receipt, LIMIT_S, "receiver: loading") for receipt in receipts]
    if len({total for _, total in answers}) != 1:
        raise SystemExit(f"receivers read different bytes: {answers}")
    return max(at for at, _ in answers) - began


def verify(publisher: Any, receivers: Sequence[Any], size: float) -> None:
    update, label = publisher.publish.remote()
    metrics = wait(label, LIMIT_S, "publisher: publishing")
    for receiver in receivers:
        found = wait(receiver.digest.remote(update), LIMIT_S, "receiver: hashing")
        if found != metrics["digest"]:
            raise SystemExit(f"{size} MB arrived with hash {found}; wanted {metrics['digest']}")


def on_ray_nodes(where: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """On nodes of this process's making, which share an address."""
    two = where == "two nodes, one address"
    node = {"num_cpus": 1, "object_store_memory": STORE_MB * 2**20}
    resources = {"a": 1} if two else {"a": 1, "b": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "resources": resources, "include_dashboard": False})
    try:
        if two:
            cluster.add_node(**node, resources={"b": 1})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        return measure(where, options.megabytes, options.samplers, options.repeats)
    finally:
        ray.shutdown()
        cluster.shutdown()


def on_machines(where: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    kind, refused = best()
    if not kind.own_files:
        print(f"not measured: {where}: {refused}", file=sys.stderr)
        return []
    with kind() as machines:
        machines.add("a", num_cpus=1, object_store_mb=STORE_MB)
        machines.add("b", num_cpus=1, object_store_mb=STORE_MB)
        sizes, counts = (",".join(map(str, values)) for values in (options.megabytes, options.samplers))
        driver = machines.drive(
            sys.executable, "-m", "benchmarks.sync", "--inside", where, "--megabytes", sizes, "--samplers", counts,
            "--repeats", str(options.repeats), "--out", "/tmp/rows.json",
        )  # fmt: skip
        if driver.wait():  # which fails once nothing has advanced for minutes
            raise SystemExit(driver.output())
        rows: list[dict[str, Any]] = json.loads(machines.head.sees("/tmp/rows.json").read_text())["rows"]
        return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Table of medians with their range."""
    lines = [
        f"{'where':<24}{'MB':>5}{'samplers':>9}{'ms from put to last receipt':>32}{'ms of a copy':>22}{'ratio':>8}"
    ]
    for row in rows:
        took, copied = ([1000 * each for each in row[name]] for name in ("seconds", "copy_seconds"))
        shown = [f"{statistics.median(each):.1f} ({min(each):.1f}-{max(each):.1f})" for each in (took, copied)]
        ratio = statistics.median(took) / statistics.median(copied)
        lines.append(
            f"{row['where']:<24}{row['megabytes']:>5g}{row['samplers']:>9}{shown[0]:>32}{shown[1]:>22}{ratio:>8.1f}"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=lambda text: [float(part) for part in text.split(",")], default=[1, 10, 100]
    )
    parser.add_argument("--samplers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file of all times")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # what it measures on the cluster of RAY_ADDRESS
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.inside:
        ray.init(log_to_driver=False, logging_level="warning")
        rows = measure(options.inside, options.megabytes, options.samplers, options.repeats)
    else:
        os.environ.pop("RAY_ADDRESS", None)
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        # Workers import this module by name.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        rows = []
        for where in ("one node", "two nodes, one address"):
            rows += on_ray_nodes(where, options)
        rows += on_machines("two machines", options)
        print(table(rows))
    if options.out:
        machine = {"cores": os.cpu_count(), "load_average_1m": round(os.getloadavg()[0], 2)}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
