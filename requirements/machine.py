"""Can this machine do what make is asked for? One line says what is wrong and what would be right, before any download.

Standard library alone, so that it runs on the Python that is asked about:

    python3.12 requirements/machine.py DEVICE FOLDER GOAL ...    Python, platform, disk; for quickstart on CUDA, GPU
    python3.12 requirements/machine.py gpu                       driver and GPU alone
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys

PYTHONS = ("3.11", "3.12")  # as rlsys/python_version.py and pyproject.toml have them
DISK_GIB = {"cpu": 3, "cuda": 13}  # an environment, and the largest wheel while it is unpacked
DRIVER_CUDA = 13000  # what torch's CUDA build is made for, as cuDriverGetVersion counts: 13.0
DRIVER = 580  # the first driver that serves it
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def set_up_problem(device: str, folder: str) -> str | None:
    """What stands in the way of an environment for `device` in `folder`."""
    found = ".".join(platform.python_version_tuple()[:2])
    if found not in PYTHONS:
        wanted = " or ".join(PYTHONS)
        return f"rlsys needs Python {wanted}; {sys.executable} is {platform.python_version()}: set PYTHON=python3.12"
    machine = f"{platform.system()} on {platform.machine()}"
    if device == "cuda" and machine != "Linux on x86_64":
        return f"DEVICE=cuda: the packages are for Linux on x86_64; this is {machine}"
    holds = _python_of(folder)
    if holds not in (None, found):
        return (
            f"{folder} holds Python {holds}, and PYTHON is {found}: set VENV to another folder, or PYTHON=python{holds}"
        )
    where = os.path.abspath(folder)
    if os.path.exists(os.path.join(where, ".ready")):
        return None
    while not os.path.exists(where):
        where = os.path.dirname(where)
    free = shutil.disk_usage(where).free / 2**30
    if free < DISK_GIB[device]:
        return (
            f"DEVICE={device}: the packages take {DISK_GIB[device]} GiB; {free:.1f} GiB are free in {where}: make "
            "room, or set VENV to a folder on another disk"
        )
    return None


def gpu_problem() -> str | None:
    """Why no CUDA program can run here. Asks the driver, so CUDA_VISIBLE_DEVICES counts and no package is needed."""
    here = platform.node()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return f"{here} has no NVIDIA driver (libcuda.so.1 cannot be loaded); install driver {DRIVER} or newer"
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < DRIVER_CUDA:
        return (
            f"the NVIDIA driver of {here} serves CUDA {_cuda(version.value)}, and the packages are built for "
            f"{_cuda(DRIVER_CUDA)}; install driver {DRIVER} or newer"
        )
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error == NO_DEVICE or (not error and not count.value):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "is not set" if visible is None else f"is {visible!r}"
        return f"the NVIDIA driver of {here} shows no GPU here (CUDA_VISIBLE_DEVICES {seen}); compare nvidia-smi -L"
    if error:
        return f"the NVIDIA driver of {here} does not start (error {error} of cuInit); see whether nvidia-smi works"
    return None


def _python_of(folder: str) -> str | None:
    """Version of the Python that a virtual environment was made with."""
    try:
        with open(os.path.join(folder, "pyvenv.cfg"), encoding="utf-8") as file:
            line = re.search(r"^version *= *(\d+\.\d+)", file.read(), re.MULTILINE)
    except OSError:
        return None
    return line[1] if line else None


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def main(device: str, folder: str = "", *goals: str) -> str | None:
    if device == "gpu":
        return gpu_problem()
    problem = set_up_problem(device, folder)
    if problem is None and device == "cuda" and "quickstart" in goals:
        problem = gpu_problem()
        return problem and f"make quickstart DEVICE=cuda: {problem}, or leave DEVICE=cuda out"
    return problem


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
