"""Facts about this machine's GPUs from NVML, as one JSON object on stdout. Run as `python -m actors.machine.gpu_query`.

NVML creates no CUDA context and takes no GPU memory. A broken driver can hang inside it, so actors/machine/gpus.py runs
this module in a subprocess with a time limit. A fact that the driver does not support is null.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

Facts = dict[str, Any]  # JSON; Any: texts, numbers and lists, which actors/machine/gpus.py turns into a `Gpus`
RAYS_COPY = "_private/thirdparty/pynvml/pynvml.py"


def main() -> None:
    print(json.dumps(query(_bindings())))


def query(nvml: ModuleType) -> Facts:
    """Driver, devices and peer access; {"error": ..., "code": ...} where NVML does not answer."""
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(at) for at in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return {"error": str(error), "code": int(getattr(error, "value", 0))}
    return {
        "driver": _fact(nvml, nvml.nvmlSystemGetDriverVersion),
        "cuda": _fact(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2),
        "gpus": [_gpu(nvml, at, handle) for at, handle in enumerate(handles)],
        "no_peer_access": list(_pairs_without_peer_access(nvml, handles)),
    }


def _gpu(nvml: ModuleType, at: int, handle: object) -> Facts:
    mig = _fact(nvml, nvml.nvmlDeviceGetMigMode, handle)  # [current, pending]
    return {
        "index": at,
        **_identity(nvml, handle),
        "capability": _fact(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle),
        "exclusive": _fact(nvml, nvml.nvmlDeviceGetComputeMode, handle) == nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
        "prohibited": _fact(nvml, nvml.nvmlDeviceGetComputeMode, handle) == nvml.NVML_COMPUTEMODE_PROHIBITED,
        "mig": bool(mig and mig[0]),
        "instances": list(_instances(nvml, handle)) if mig and mig[0] else [],
    }


def _identity(nvml: ModuleType, handle: object) -> Facts:
    memory = _fact(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return {
        "uuid": _fact(nvml, nvml.nvmlDeviceGetUUID, handle),
        "name": _fact(nvml, nvml.nvmlDeviceGetName, handle),
        "total": None if memory is None else int(memory.total),
        "free": None if memory is None else int(memory.free),
    }


def _instances(nvml: ModuleType, handle: object) -> Iterator[Facts]:
    """MIG instances of one GPU. Numbers of instances may have gaps."""
    for at in range(_fact(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = _fact(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, at)
        if instance is not None:
            yield _identity(nvml, instance)


def _pairs_without_peer_access(nvml: ModuleType, handles: list[object]) -> Iterator[list[int]]:
    for (one, first), (two, second) in combinations(enumerate(handles), 2):
        status = _fact(nvml, nvml.nvmlDeviceGetP2PStatus, first, second, nvml.NVML_P2P_CAPS_INDEX_WRITE)
        if status is not None and status != nvml.NVML_P2P_STATUS_OK:
            yield [one, two]


def _fact(nvml: ModuleType, ask: Callable[..., Any], *arguments: object) -> Any:  # any of NVML's types
    try:
        found = ask(*arguments)
    except nvml.NVMLError:
        return None
    return found.decode() if isinstance(found, bytes) else found


def _bindings() -> ModuleType:
    """NVIDIA's bindings: those installed (nvidia-ml-py), else the copy of them that Ray ships."""
    if importlib.util.find_spec("pynvml") is not None:
        return importlib.import_module("pynvml")
    return rays_copy()


def rays_copy() -> ModuleType:
    """Loaded by its file, which spares the seconds that `import ray` takes."""
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None:
        raise ModuleNotFoundError("no NVML bindings: install nvidia-ml-py")
    spec = importlib.util.spec_from_file_location("rays_pynvml", Path(ray.origin).parent / RAYS_COPY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # it looks itself up there
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
