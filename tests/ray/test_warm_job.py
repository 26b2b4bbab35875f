"""A job whose learner and sampler are forked computes what it computes otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import JobConfig, dump_config
from tests.ray.conftest import rlsys
from tests.waiting import run as run_to_end

FORKED = "by itself"  # of the note about a process that was not forked
UNEQUAL = ("time", "system/")  # what a run measures of itself


RLSYS = "import runpy; runpy.run_module('rlsys', run_name='__main__')"
UNFORKED = """
import actors.job
from actors.forking.servers import NO_SERVERS

actors.job.fork_servers = lambda *_: NO_SERVERS
"""


def trained(config: JobConfig, folder: Path, unforked: bool = False) -> tuple[list[dict[str, Any]], bytes, str]:
    """Metrics, adapter and output of `rlsys train`."""
    file = folder / f"{config.run.name}.yaml"
    file.write_text(dump_config(config))
    code = UNFORKED + RLSYS if unforked else RLSYS
    done = run_to_end([sys.executable, "-c", code, "train", str(file)], merged=True)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    equal = [
        {key: at for key, at in line.items() if not key.startswith(UNEQUAL) and "_per_s" not in key} for line in lines
    ]
    return equal, (config.run_dir / "adapter" / "adapter_model.safetensors").read_bytes(), done.stdout


@pytest.mark.soak
def test_jobs_forked_from_a_warm_server_from_their_own_and_not_at_all_end_with_the_same_bits(
    ray_cluster: str, job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    warm, adapter, output = trained(job("run.name=warm"), tmp_path)
    rlsys("warm", "--stop")
    own, adapter_of_own, output_of_own = trained(job("run.name=own"), tmp_path)
    plain, adapter_of_plain, _ = trained(job("run.name=plain"), tmp_path, unforked=True)
    assert "is warm for 1 thread" in rlsys("warm")
    assert FORKED not in output + output_of_own
    assert warm == own == plain and adapter == adapter_of_own == adapter_of_plain
