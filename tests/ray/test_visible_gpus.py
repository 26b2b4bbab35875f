"""CUDA_VISIBLE_DEVICES in a job: the Ray that a job starts hands out the visible GPUs, and no others."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.unit.actors.machine.nvml_standin import Card, Machine, Part, cards, install, needs_gcc
from tests.waiting import run

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, ray
from actors.machine import gpus
from actors.cluster.ray_cluster import cluster
from rlsys.config import ClusterSection

gpus.NVML = os.environ["STANDIN"]

@ray.remote(num_gpus=1, num_cpus=0)
class Holder:
    def shown(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

with cluster(ClusterSection(num_cpus=1)):
    count = int(ray.cluster_resources().get("GPU", 0))
    holders = [Holder.remote() for _ in range(count)]
    print(json.dumps(sorted(ray.get([holder.shown.remote() for holder in holders]))))
"""


@needs_gcc
@pytest.mark.parametrize(
    ("value", "shown"),
    [("2,0", ["0", "2"]), ("MIG-a,MIG-b", ["MIG-a", "MIG-b"])],
    ids=["by index", "MIG instances of one GPU"],
)
def test_each_actor_gets_a_visible_gpu(
    value: str, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Card(Part("GPU-2"), mig=1, instances=[Part("MIG-a"), Part("MIG-b")])
    library = install(Machine([*cards(2), split]), tmp_path, monkeypatch)
    names = {"STANDIN": str(library), "PYTHONPATH": str(ROOT)} | (
        {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    )
    kept = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    done = run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env={**kept, **names})
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == shown
