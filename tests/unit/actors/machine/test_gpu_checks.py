"""The doctor on GPUs: real NVML bindings on a stand-in library, real torch, and device code read from real bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from actors.machine.checks import Check, apart
from actors.machine.device_code import architectures, covers, told, vllm_extensions
from actors.machine.gpu_checks import (
    TORCH,
    TorchFacts,
    examine_gpus,
    examine_nvml,
    examine_torch,
    kernels,
    serving_device,
    torch_and_driver,
)
from actors.machine.gpus import Gpu, Gpus, gpus
from rlsys.config import JobConfig, parse_config
from rlsys.planning.plan import GB
from tests.unit.actors.machine.nvml_standin import MIB, Card, Machine, Part, cards, install, needs_gcc

ON_GPU = "run: {name: a}\nmodel: {path: x, dtype: bfloat16}\nlearner: {num_gpus: 1}\nsampler: {num_gpus: 1}\n"
T4 = Card(Part("GPU-t", "Tesla T4", 15_360 * MIB, 15_000 * MIB), capability=(7, 5), mig=-1)
H200 = Gpus(driver="580.1", cuda=(13, 0), gpus=(Gpu(0, "GPU-h", "NVIDIA H200", (9, 0), 141 * GB, 140 * GB),))
TORCH_FACTS: TorchFacts = {
    "version": "2.13.0+cu130", "cuda": "13.0", "nccl": [2, 29, 7], "architectures": ["sm_80", "sm_90"], "tried": [],
}  # fmt: skip


def named(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def nvml(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch, value: str | None = None) -> dict[str, Check]:
    """What NVML tells the doctor of a machine, with that CUDA_VISIBLE_DEVICES."""
    install(machine, folder, monkeypatch)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    found = gpus()
    assert found is not None
    return named(list(examine_nvml(found, None)))


def test_without_a_driver_one_line_says_so_and_a_job_on_gpus_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.machine.gpus.NVML", "libnvidia-ml-that-is-not-there.so.1")
    (check,) = examine_gpus(None, elsewhere=False)
    assert check.status == "ok" and check.found.startswith("none: no NVIDIA driver here")
    job = parse_config(ON_GPU)
    (check,) = examine_gpus(job, elsewhere=False)
    assert check.status == "fail" and "learner.num_gpus" in check.found and check.remedy
    (check,) = examine_gpus(job, elsewhere=True)
    assert check.status == "warn", "the cluster's nodes may have GPUs"
    assert serving_device() == "cpu"


@needs_gcc
@pytest.mark.parametrize(
    ("machine", "value", "status", "said"),
    [
        (Machine([], init=18), None, "fail", "version mismatch"),
        (Machine([], init=9), None, "fail", "Driver Not Loaded"),
        (Machine([]), None, "ok", "knows no GPU"),
        (Machine(cards(2)), "", "ok", "every GPU is hidden"),
        (Machine(cards(2)), "-1", "ok", "every GPU is hidden"),
        (Machine(cards(2)), "5", "fail", "there are 2 GPUs, 0 to 1"),
    ],
    ids=["mismatch", "not loaded", "no GPU", "hidden", "hidden by -1", "out of range"],
)
def test_a_machine_whose_gpus_cannot_be_used_gets_one_line(
    machine: Machine, value: str | None, status: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine, tmp_path, monkeypatch)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    (check,) = examine_gpus(None, elsewhere=False)
    assert check.status == status and said in check.found and (check.remedy or status == "ok"), check


@needs_gcc
def test_a_fit_gpu_is_told_with_capability_and_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = nvml(Machine(cards(2)), tmp_path, monkeypatch)
    assert found["GPU 1"].status == found["GPU peers"].status == "ok"
    assert found["GPU 1"].found == "NVIDIA H200, compute capability 9.0, 139.7 of 140.4 GiB free"


@needs_gcc
def test_everything_that_speaks_against_a_gpu_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = Card(Part("GPU-p", "Tesla V100", 16_384 * MIB, 2_000 * MIB), capability=(7, 0), mode=3)
    found = nvml(Machine([*cards(2), poor], no_peers=[(0, 1)]), tmp_path, monkeypatch)
    assert found["GPU 2"].status == "warn"
    for part in ("model.dtype=float16", "nvidia-smi -i 2 -c 0", "the processes that hold the rest"):
        assert part in found["GPU 2"].remedy
    assert "0 and 1" in found["GPU peers"].found and found["GPU peers"].status == "warn"
    assert found["GPU order"].remedy == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert "GPU order" not in nvml(Machine([*cards(2), poor]), tmp_path, monkeypatch)


@needs_gcc
def test_only_visible_gpus_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = nvml(Machine([*cards(2), T4]), tmp_path, monkeypatch, "GPU-1,0")
    assert found["visible GPUs"].status == "fail" and found["GPU 1"].status == "ok" and "GPU 0" not in found
    found = nvml(Machine([*cards(2), T4], no_peers=[(0, 2)]), tmp_path, monkeypatch, "1,0")
    assert found["visible GPUs"].found == "CUDA_VISIBLE_DEVICES '1,0' shows 2 of 3: GPU 1, GPU 0"
    assert "GPU 2" not in found and found["GPU peers"].status == "ok"


@needs_gcc
def test_mig_is_told_and_an_instance_that_is_not_named_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Card(Part("GPU-5"), mig=1, instances=[Part("MIG-a", "NVIDIA H200 MIG 1g.18gb"), Part("MIG-b")])
    found = nvml(Machine([split]), tmp_path, monkeypatch)
    assert "MIG instance MIG-a" in found["GPU 0"].found and "CUDA_VISIBLE_DEVICES=MIG-a,MIG-b" in found["GPU 0"].remedy
    found = nvml(Machine([split]), tmp_path, monkeypatch, "MIG-a")
    assert found["GPU 0"].status == "ok" and "shows 1 of 1: MIG-a" in found["visible GPUs"].found


@needs_gcc
def test_a_job_in_bfloat16_fails_on_a_gpu_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Machine([T4]), tmp_path, monkeypatch)
    found = gpus()
    assert found is not None

    def status(job: JobConfig) -> str:
        return named(list(examine_nvml(found, job)))["GPU 0"].status

    assert status(parse_config(ON_GPU)) == "fail"
    assert status(parse_config(ON_GPU, ["model.dtype=float16"])) == "ok"


@pytest.fixture(scope="module")
def facts() -> TorchFacts:
    """Of the installed torch."""
    done = apart(TORCH, 180)
    assert isinstance(done, list), done
    found: TorchFacts = json.loads(done[0])
    return found


def test_torch_tells_what_it_was_built_for(facts: TorchFacts) -> None:
    import torch

    assert (facts["version"], facts["cuda"]) == (torch.__version__, torch.version.cuda)


@needs_gcc
def test_a_cpu_build_beside_a_gpu_is_told_and_fails_a_job_on_gpus(
    facts: TorchFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build here")
    install(Machine(cards(1)), tmp_path, monkeypatch)
    found = named(list(examine_gpus(parse_config(ON_GPU), elsewhere=False)))["torch and CUDA"]
    assert found.status == "fail" and "driver 580.159.04, which serves CUDA 13.0" in found.found
    assert "CPU build" in found.found and "requirements/gpu.txt" in found.remedy
    machine = gpus()
    assert machine is not None
    assert [check.status for check in examine_torch(facts, machine, None)] == ["warn"]


@pytest.mark.parametrize(
    ("cuda", "tried", "status", "said"),
    [
        ((13, 0), [None], "ok", "torch 2.13.0+cu130 for CUDA 13.0, NCCL 2.29.7; 1 of 1 GPUs compute"),
        ((12, 8), [], "fail", "serves CUDA 12.8"),
        ((13, 0), [], "fail", "CUDA sees no GPU"),
        ((13, 0), ["AcceleratorError: CUDA error: no kernel image"], "fail", "GPU 0: AcceleratorError"),
    ],
    ids=["fits", "driver too old", "no GPU for CUDA", "does not compute"],
)
def test_driver_and_torch_have_to_fit(cuda: tuple[int, int], tried: list[str | None], status: str, said: str) -> None:
    check = torch_and_driver({**TORCH_FACTS, "tried": tried}, Gpus(driver="580.1", cuda=cuda, gpus=H200.gpus))
    assert check.status == status and said in check.found and (check.remedy or status == "ok"), check


@pytest.mark.parametrize(
    ("names", "capability", "runs"),
    [
        (["sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),  # a later minor version of the same major one
        (["sm_86"], (8, 0), False),  # an earlier one
        (["sm_80"], (9, 0), False),  # another major version
        (["compute_80"], (9, 0), True),  # PTX for any later GPU
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),  # "a": that very version alone
        (["sm_100f"], (10, 3), True),
        (["sm_75", "sm_120"], (12, 1), True),
        ([], (9, 0), False),
    ],
)
def test_code_runs_where_nvidia_says_that_it_does(names: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert covers(names, capability) is runs


def test_torch_draws_the_same_lines() -> None:
    from torch.cuda import DEVICE_REQUIREMENT, _code_compatible_with_device

    for code in DEVICE_REQUIREMENT:
        for device in (50, 61, 70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
            if (device, code) != (110, 101):  # one chip, whose number CUDA 13 changed
                found = covers([f"sm_{code}"], (device // 10, device % 10))
                assert found == _code_compatible_with_device(device, code), (device, code)


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """As nvcc writes it: entries of (kind, architecture, content)."""
    parts = [
        struct.pack("<HHIQIIII", kind, 0x101, 64, len(content), 0, 0, 0, architecture) + bytes(32) + content
        for kind, architecture, content in entries
    ]
    body = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_architectures_are_read_from_fat_binaries_among_other_bytes(tmp_path: Path) -> None:
    first = fat_binary((2, 80, b"x" * 40), (1, 90, b"y" * 24))
    second = fat_binary((2, 120, b"z" * 8))
    library = tmp_path / "_C.abi3.so"
    chance = struct.pack("<IHHQ", 0xBA55ED50, 9, 9, 2**60)
    library.write_bytes(b"\x7fELF" + bytes(60) + first + bytes(16) + chance + b"text" + second + first[:20])
    assert architectures(library) == {"sm_80", "compute_90", "sm_120"}
    assert told(architectures(library)) == "8.0, 12.0, PTX 9.0"


def test_the_installed_vllm_has_the_device_code_of_its_build() -> None:
    import torch

    found = {name for path in vllm_extensions() for name in architectures(path)}
    assert vllm_extensions(), "vLLM's extension modules are looked for under names that it has"
    assert bool(found) == (torch.version.cuda is not None)
    if found:
        assert covers(found, (8, 0)) and covers(found, (9, 0))


def test_a_gpu_without_kernels_fails_by_name() -> None:
    old = Gpus(gpus=(*H200.gpus, Gpu(1, "GPU-v", "Tesla V100", (7, 0), GB, GB)))
    checks = named(list(kernels(TORCH_FACTS, old)))
    assert checks["torch's kernels"].status == "fail" and "none for GPU 1 (7.0)" in checks["torch's kernels"].found
    assert named(list(kernels(TORCH_FACTS, H200)))["torch's kernels"].status == "ok"
