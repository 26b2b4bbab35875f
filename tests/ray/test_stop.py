"""A detached deployment outlives the program that started it, until `rlsys stop`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.service.supervisor import CHECK_S
from rlsys.architectures.precision import multiplies_bfloat16
from tests.waiting import cpu_of, run

PROGRAM = """
import sys
import rlsys
from rlsys.config import ClusterSection, SamplerSection
from rlsys.errors import RlsysError

if __name__ == "__main__":
    address, base, *stays = sys.argv[1:]
    config = rlsys.ServiceConfig(
        detached="mine",
        models={"micro": base},
        dtype="bfloat16",
        max_length=96,
        cluster=ClusterSection(address=address),
        sampler=SamplerSection(num_cpus=0.5, kv_cache_gb=0.1, max_num_batched_tokens=512, max_num_seqs=16),
    )
    client = rlsys.ServiceClient(config)
    print(client.create_lora_training_client("micro", rank=2).get_info().model_data.model_name, flush=True)
    if stays:
        sys.stdin.read()
        sampler = client.create_sampling_client(base_model="micro")
        try:
            sampler.compute_logprobs(rlsys.ModelInput.from_ints([1])).result(60)
        except RlsysError as error:
            print(error)
"""


def test_a_detached_deployment_lives_until_rlsys_stop_and_then_gives_its_resources_back(
    ray_cluster: str, micro_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    started = _run(sys.executable, str(tmp_path / "program.py"), ray_cluster, str(micro_base))
    assert started.returncode == 0, started.stderr
    for cpu in ("the learner's CPU", "the CPU of sampler 0"):  # whoever starts it is told what it computes with
        assert (f"{cpu} has no kernels for bfloat16: float32" in started.stderr) is not multiplies_bfloat16()
    wrong = _run(sys.executable, "-m", "rlsys", "stop", "yours")
    assert wrong.returncode == 1 and "no running job or deployment is named 'yours'" in wrong.stderr
    stopped = _run(sys.executable, "-m", "rlsys", "stop", "mine")
    assert stopped.returncode == 0 and stopped.stdout.strip() == "stopped: micro", stopped.stdout + stopped.stderr
    again = _run(sys.executable, "-m", "rlsys", "stop")
    assert again.stdout.strip() == "no deployment was running"


@pytest.mark.soak
def test_a_client_that_uses_a_deployment_does_not_start_it_again_after_rlsys_stop(
    ray_cluster: str, micro_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), ray_cluster, str(micro_base), "stays"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None and "micro" in client.stdout.readline()
    assert _run(sys.executable, "-m", "rlsys", "stop", "mine").stdout.strip() == "stopped: micro"
    time.sleep(3 * CHECK_S)
    assert _run(sys.executable, "-m", "rlsys", "stop").stdout.strip() == "no deployment was running"
    said, _ = client.communicate("", 300)
    assert client.returncode == 0 and "the deployment was stopped" in said, said


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return run(command, signs=[cpu_of(os.getpid())])
