"""GPU checks of `rlsys doctor`: driver, CUDA, memory, kernels, peer access, MIG, CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Literal, TypedDict

from actors.machine.checks import Check, Status, apart
from actors.machine.device_code import architectures, covers, told, vllm_extensions
from actors.machine.gpus import NVML, Gpu, Gpus, gpus
from rlsys.architectures.precision import bfloat16_problem
from rlsys.config import JobConfig
from rlsys.planning.memory import GIB
from rlsys.utils.env_variables import env_variable

TORCH_LIMIT_S = 180.0  # its import takes seconds, and the first CUDA call initialises every GPU
MOSTLY_FREE = 0.9  # of a GPU's memory
GPU_PACKAGES = "set up with requirements/gpu.txt (docs/development.md)"

# Prints what torch knows. The last part computes a little on each visible GPU, which is the only proof that one works.
TORCH = """
import json, warnings, torch
warnings.simplefilter("ignore")
cuda = torch.cuda
built = torch.version.cuda is not None
nccl = cuda.nccl.version() if built and torch.distributed.is_nccl_available() else ()
tried = []
for at in range(cuda.device_count() if built else 0):
    try:
        assert (torch.ones(256, 256, device=f"cuda:{at}") @ torch.ones(256, 256, device=f"cuda:{at}")).sum() == 2.0**24
        tried.append(None)
    except Exception as error:
        tried.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "nccl": list(nccl),
                  "architectures": cuda.get_arch_list() if built else [], "tried": tried}))
"""


class TorchFacts(TypedDict):
    """What `TORCH` prints."""

    version: str
    cuda: str | None  # None: a CPU build
    nccl: list[int]
    architectures: list[str]
    tried: list[str | None]  # of each visible GPU: why it does not compute; None: it does


def examine_gpus(job: JobConfig | None, elsewhere: bool) -> Iterator[Check]:
    """`elsewhere`: the job joins a cluster, whose nodes may have other GPUs than this machine."""
    found = gpus()
    if found is None or found.error is not None or not found.visible.gpus:
        yield _none(found, job, elsewhere)
        return
    yield from examine_nvml(found, job)
    yield from examine_torch(_torch(), found, job)


def examine_torch(torch: TorchFacts | str, found: Gpus, job: JobConfig | None) -> Iterator[Check]:
    """`torch`: what it tells of itself, or why it does not."""
    if isinstance(torch, str):
        yield Check("torch and CUDA", "fail", torch, "`pip check`, and set up again")
    elif torch["cuda"] is None:  # well enough for jobs on the CPU
        needed = job is not None and asks_for_gpus(job)
        text = f"{_driver(found)}; torch {torch['version']} is a CPU build, which uses no GPU"
        yield Check("torch and CUDA", "fail" if needed else "warn", text, GPU_PACKAGES)
    else:
        yield torch_and_driver(torch, found)
        yield from kernels(torch, found)


def serving_device() -> Literal["cpu", "cuda"]:
    """What the installed vLLM would serve on here."""
    found = gpus()
    shown = found is not None and found.error is None and found.visible.gpus
    return "cuda" if shown and any(architectures(path) for path in vllm_extensions()) else "cpu"


def _none(found: Gpus | None, job: JobConfig | None, elsewhere: bool) -> Check:
    """One line where no GPU can be used."""
    if found is None:
        said, remedy = f"none: no NVIDIA driver here ({NVML} is not found)", "install the NVIDIA driver"
    elif found.error is not None:
        return Check("GPU", "fail", found.error, found.remedy)
    elif not found.gpus:
        said, remedy = f"none: driver {found.driver} knows no GPU", "does `nvidia-smi` list one?"
    else:
        value = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = found.visible.problem or "every GPU is hidden"
        said = f"none of {len(found.gpus)} visible: CUDA_VISIBLE_DEVICES is {value!r}: {why}"
        remedy = "unset CUDA_VISIBLE_DEVICES, or name GPUs that `nvidia-smi -L` lists"
        if found.visible.problem is not None:
            return Check("GPU", "fail", said, remedy)
    if job is None or not asks_for_gpus(job):
        return Check("GPU", "ok", said)
    asked = f"{said}; the job asks for some (learner.num_gpus, sampler.num_gpus)"
    return Check("GPU", "warn" if elsewhere else "fail", asked, remedy)


def examine_nvml(found: Gpus, job: JobConfig | None) -> Iterator[Check]:
    """What needs no CUDA context."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        problem, shown = found.visible.problem, ", ".join(_short(gpu) for gpu in found.visible.gpus)
        text = f"CUDA_VISIBLE_DEVICES {hidden!r} shows {len(found.visible.gpus)} of {len(found.gpus)}: {shown}"
        remedy = "name GPUs that `nvidia-smi -L` lists" if problem else ""
        yield Check("visible GPUs", "fail" if problem else "ok", f"{text}; {problem}" if problem else text, remedy)
    order = env_variable("CUDA_DEVICE_ORDER")
    if len({gpu.name for gpu in found.gpus}) > 1 and order != "PCI_BUS_ID":
        text = f"GPUs of different models, which CUDA counts in another order than nvidia-smi: {_models(found)}"
        yield Check("GPU order", "warn", text, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    for gpu in found.visible.gpus:
        yield _gpu(gpu, found, job)
    pairs = [pair for pair in found.no_peer_access if set(pair) <= {gpu.index for gpu in found.visible.gpus}]
    if pairs:
        text = "no peer access between GPUs " + ", ".join(f"{one} and {two}" for one, two in pairs)
        yield Check(
            "GPU peers",
            "warn",
            f"{text}: NCCL copies through host memory",
            "nothing, or keep tensor_parallel_size and ranks within a pair",
        )
    elif len({gpu.index for gpu in found.visible.gpus}) > 1:
        yield Check("GPU peers", "ok", f"{len(found.visible.gpus)} GPUs, each with access to each")


def _gpu(gpu: Gpu, found: Gpus, job: JobConfig | None) -> Check:
    name, text = f"GPU {gpu.index}", gpu.name
    if gpu.capability is not None:
        text += f", compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.total is not None and gpu.free is not None:
        text += f", {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    else:
        text += ", memory not told by the driver"
    if gpu.instance:
        text += f", MIG instance {gpu.uuid}"
    elif gpu.index in found.in_mig_mode:
        text += ", MIG mode on"
    against = list(_against(gpu, found, job))
    if not against:
        return Check(name, "ok", text)
    status: Status = "fail" if any(status == "fail" for status, _ in against) else "warn"
    return Check(name, status, text, "; ".join(remedy for _, remedy in against))


def _against(gpu: Gpu, found: Gpus, job: JobConfig | None) -> Iterator[tuple[Status, str]]:
    """What speaks against one GPU, each with what would help."""
    dtype = "bfloat16" if job is None else job.model.dtype
    reason = None if gpu.capability is None else bfloat16_problem(dtype, gpu.capability, "this GPU")
    if reason is not None:
        yield "fail" if job is not None and asks_for_gpus(job) else "warn", reason
    if gpu.instance and not (env_variable("CUDA_VISIBLE_DEVICES") or "").startswith("MIG-"):
        yield (
            "warn",
            f"CUDA serves one instance where none is named: export CUDA_VISIBLE_DEVICES={_all_instances(found)}",
        )
    if gpu.index in found.exclusive and (job is None or job.sampler.colocate):
        yield (
            "warn",
            "its compute mode is exclusive process, and sampler.colocate needs two processes on it: "
            f"`nvidia-smi -i {gpu.index} -c 0`",
        )
    if gpu.total is not None and gpu.free is not None and gpu.free < MOSTLY_FREE * gpu.total:
        yield "warn", "`nvidia-smi` lists the processes that hold the rest of its memory; end them"


def torch_and_driver(torch: TorchFacts, found: Gpus) -> Check:
    """Versions of driver, CUDA and NCCL, and whether they serve each other."""
    assert torch["cuda"] is not None, "a CPU build is told apart before"
    nccl = ".".join(map(str, torch["nccl"])) or "missing"
    text = f"{_driver(found)}; torch {torch['version']} for CUDA {torch['cuda']}, NCCL {nccl}"
    built = int(torch["cuda"].partition(".")[0])
    if found.cuda is not None and found.cuda[0] < built:  # a driver serves every minor version of its major one
        remedy = f"update the NVIDIA driver to one for CUDA {built}, or install builds for CUDA {found.cuda[0]}"
        return Check("torch and CUDA", "fail", text, remedy)
    failed = [f"GPU {at}: {why}" for at, why in enumerate(torch["tried"]) if why is not None]
    if failed:
        return Check("torch and CUDA", "fail", f"{text}; a product of matrices failed: {'; '.join(failed)}", _ADVICE)
    if not torch["tried"]:
        return Check("torch and CUDA", "fail", f"{text}; CUDA sees no GPU", "does /dev/nvidia-uvm exist? " + _ADVICE)
    shown = len(found.visible.gpus)
    computed = f"{len(torch['tried'])} of {shown} GPUs compute"
    return Check("torch and CUDA", "ok", f"{text}; {computed}")


def _driver(found: Gpus) -> str:
    serves = "" if found.cuda is None else f", which serves CUDA {found.cuda[0]}.{found.cuda[1]}"
    return f"driver {found.driver}{serves}"


_ADVICE = "`nvidia-smi` shows what holds the GPU; in a container, is the host's driver mounted (--gpus all)?"


def kernels(torch: TorchFacts, found: Gpus) -> Iterator[Check]:
    """Whether torch and vLLM were built for these GPUs."""
    of_vllm = {name for path in vllm_extensions() for name in architectures(path)}
    for who, built in (("torch", set(torch["architectures"])), ("vLLM", of_vllm)):
        name = f"{who}'s kernels"
        if not built:
            yield Check(name, "fail", f"{who}'s libraries hold no device code: a CPU build", GPU_PACKAGES)
            continue
        text = f"built for compute capability {told(built)}"
        missing = [gpu for gpu in found.visible.gpus if gpu.capability and not covers(built, gpu.capability)]
        if missing:
            names = ", ".join(
                f"GPU {gpu.index} ({gpu.capability[0]}.{gpu.capability[1]})" for gpu in missing if gpu.capability
            )
            yield Check(name, "fail", f"{text}; none for {names}", f"a GPU of that list, or {who} built for this one")
        else:
            yield Check(name, "ok", text)


def _torch() -> TorchFacts | str:
    done = apart(TORCH, TORCH_LIMIT_S)
    if isinstance(done, str):
        return done
    facts: TorchFacts = json.loads(done[0])
    return facts


def asks_for_gpus(job: JobConfig) -> bool:
    return job.learner.num_gpus > 0 or job.sampler.num_gpus > 0


def _short(gpu: Gpu) -> str:
    return gpu.uuid if gpu.instance else f"GPU {gpu.index}"


def _models(found: Gpus) -> str:
    return ", ".join(f"{gpu.index} {gpu.name}" for gpu in found.gpus)


def _all_instances(found: Gpus) -> str:
    return ",".join(one.uuid for one in found.instances)
