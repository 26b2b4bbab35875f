"""Claims about the GPUs that rlsys finds, by the real NVML bindings on a stand-in for the driver's library."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from actors.machine import gpus as module
from actors.machine.gpus import Gpu, Gpus, gpus, gpus_for_ray, refuse_dtype, this_machine, visible
from rlsys.errors import ClusterError, ConfigError
from tests.unit.actors.machine.nvml_standin import MIB, Card, Machine, Part, cards, install, needs_gcc

ROOT = Path(__file__).parents[4]
TWO = tuple(Gpu(at, f"GPU-{at}abc", "NVIDIA L4", (8, 9), 10, 10) for at in range(2))
SPLIT = Card(Part("GPU-5"), mig=1, instances=[Part("MIG-a", total=40 * MIB), None, Part("MIG-b", total=20 * MIB)])


def test_without_a_driver_there_are_no_gpus_and_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NVML", "libnvidia-ml-that-is-not-there.so.1")
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert gpus() is None and gpus_for_ray() is None and this_machine(3).resources == {"CPU": 3.0}


@needs_gcc
def test_driver_memory_capability_and_peers_are_what_nvml_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Card(Part("GPU-b", "Tesla T4", 15_360 * MIB, 100 * MIB), capability=(7, 5), mode=3, mig=-1)
    install(Machine([*cards(1), second], driver="535.1", cuda=12_020, no_peers=[(0, 1)]), tmp_path, monkeypatch)
    found = gpus()
    assert found is not None and found.error is None
    assert (found.driver, found.cuda, found.no_peer_access) == ("535.1", (12, 2), ((0, 1),))
    assert found.gpus[1] == Gpu(1, "GPU-b", "Tesla T4", (7, 5), 15_360 * MIB, 100 * MIB)
    assert (found.exclusive, found.in_mig_mode) == (frozenset({1}), frozenset())
    node = this_machine(None)
    assert (node.resources["GPU"], node.gpu_memory) == (2.0, 15_360 * MIB), "the smaller one counts"


@needs_gcc
@pytest.mark.parametrize("bindings", ["rays_copy()", "importlib.import_module('pynvml')"])
def test_either_of_the_bindings_reads_it(bindings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import_module" in bindings and importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed, which requirements/gpu.txt brings")
    install(Machine([SPLIT]), tmp_path, monkeypatch)
    script = f"import json; from actors.machine.gpu_query import *; print(json.dumps(query({bindings})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert '"uuid": "MIG-b"' in done.stdout and '"driver": "580.159.04"' in done.stdout


@needs_gcc
def test_memory_that_the_driver_does_not_tell_is_not_invented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Machine([Card(Part("GPU-u", "NVIDIA GB10", 0, 0), capability=(12, 1))]), tmp_path, monkeypatch)
    found = gpus()
    assert found is not None and found.gpus[0].total is None
    node = this_machine(None)
    assert (node.resources["GPU"], node.gpu_memory) == (1.0, None)


@needs_gcc
def test_a_driver_that_does_not_answer_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Machine([], init=18), tmp_path, monkeypatch)
    found = gpus()
    assert found is not None and "NVML/RM version mismatch" in str(found.error) and "reboot" in found.remedy
    with pytest.raises(ClusterError, match=r"version mismatch.*CUDA_VISIBLE_DEVICES= to run on CPU"):
        gpus_for_ray()


@needs_gcc
def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Machine(cards(1)), tmp_path, monkeypatch)
    monkeypatch.setattr(module, "LIMIT_S", 0.01)
    found = gpus()
    assert found is not None and found.error == "NVML gave no answer within 0.01 s"


@needs_gcc
def test_each_mig_instance_that_is_named_counts_for_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Machine([SPLIT]), tmp_path, monkeypatch)
    assert gpus_for_ray() == 1 and this_machine(None).gpu_memory == 40 * MIB, "unnamed, the first alone"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert gpus_for_ray() == 2 and this_machine(None).gpu_memory == 20 * MIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus_for_ray() == 0 and "GPU" not in this_machine(None).resources, "Ray alone would count one"


NAMED = [  # value, indices that CUDA shows, part of the problem
    ("0", [0], None),
    ("1,0", [1, 0], None),
    (" 1 ", [1], None),
    ("GPU-1abc", [1], None),
    ("GPU-1,GPU-0", [1, 0], None),
    ("", [], None),
    ("-1", [], None),
    ("NoDevFiles", [], None),
    ("0,-1,1", [0], "stops reading at '-1'"),
    ("7", [], "there are 2 GPUs, 0 to 1"),
    ("0,2", [0], "there are 2 GPUs, 0 to 1"),
    ("0,0", [], "named twice"),
    ("GPU-", [], "names 2 GPUs here"),
    ("GPU-9", [], "names 0 GPUs here"),
    ("GPU-0,1", [0], "do not mix"),
    ("MIG-9", [], "names 0 GPUs here"),
    ("all", [], "no index"),
]


@pytest.mark.parametrize(("value", "indices", "problem"), NAMED, ids=[repr(value) for value, _, _ in NAMED])
def test_visible_gpus_follow_cudas_rules(value: str, indices: list[int], problem: str | None) -> None:
    shown = visible(value, Gpus(gpus=TWO))
    assert [gpu.index for gpu in shown.gpus] == indices
    assert (shown.problem is None) if problem is None else problem in str(shown.problem)


@pytest.mark.parametrize("value", [value for value, _, _ in NAMED if "GPU-" not in value and "MIG" not in value])
def test_torch_reads_the_same_indices(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.cuda import _parse_visible_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    read = [int(at) for at in _parse_visible_devices() if int(at) < len(TWO)]  # it does not know how many there are
    assert [gpu.index for gpu in visible(value, Gpus(gpus=TWO)).gpus] == read


def test_all_are_visible_where_nothing_is_set_but_those_in_prohibited_mode() -> None:
    assert visible(None, Gpus(gpus=TWO)).gpus == TWO
    assert visible(None, Gpus(gpus=TWO, unavailable=frozenset({0}))).gpus == TWO[1:]


@needs_gcc
@pytest.mark.parametrize(
    ("value", "refused"), [("0,7", "there are 2 GPUs"), ("0,0", "named twice"), ("tesla", "no index")]
)
def test_a_job_is_refused_where_cuda_would_see_less_than_is_named(
    value: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Machine(cards(2)), tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(ClusterError, match=rf"CUDA_VISIBLE_DEVICES '{value}'.*{refused}.*nvidia-smi -L"):
        gpus_for_ray()


@needs_gcc
def test_bfloat16_is_refused_before_the_model_loads_on_a_gpu_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Machine([Card(Part("GPU-t", "Tesla T4"), capability=(7, 5)), *cards(1)]), tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"sampler 0: Tesla T4 has compute capability 7\.5.*model\.dtype=float16"):
        refuse_dtype("bfloat16", "sampler 0")
    refuse_dtype("float16", "sampler 0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # as Ray gives an actor its GPU
    refuse_dtype("bfloat16", "sampler 0")


def test_vllm_draws_the_line_of_bfloat16_at_the_same_capability() -> None:
    from rlsys.architectures.precision import BFLOAT16_CAPABILITY

    source = Path(str(importlib.util.find_spec("vllm").submodule_search_locations[0])) / "platforms" / "cuda.py"  # type: ignore[union-attr,index]
    text = source.read_text("utf-8").partition("def check_if_supports_dtype")[2]
    assert f"has_device_capability({BFLOAT16_CAPABILITY[0] * 10 + BFLOAT16_CAPABILITY[1]})" in text[:200]
