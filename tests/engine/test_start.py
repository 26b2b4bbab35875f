"""How an engine starts and ends: without a compiler, with its parent, on the vLLM that it was written for."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import ModelSection, SamplerSection
from rlsys.errors import ClusterError
from rlsys.sampler.engine import Sampler
from rlsys.sampler.engine_start import PRELOAD
from rlsys.sampler.private_api import check_private_api
from rlsys.sampler.vllm.model_classes import register_classes
from rlsys.types import SamplingParams
from tests.engine.tiny_engine import Reference
from tests.waiting import run as run_to_end
from tests.waiting import until_gone

COMPILER = re.compile(r"(^|-)(cc|gcc|g\+\+|c\+\+|clang|clang\+\+|icx|icpx)(-[0-9.]+)?$")
PROGRAM = """
import asyncio, shutil, sys
from pathlib import Path
import numpy as np
from rlsys.config import ModelSection, SamplerSection
from rlsys.sampler.engine import Sampler
from rlsys.sampler.engine_start import PRELOAD
from rlsys.types import SamplingParams

async def main(folder):
    assert not any(map(shutil.which, ("cc", "gcc", "g++", "clang")))
    model = ModelSection(path=folder, dtype="bfloat16", max_length=64)
    sampler = Sampler(name="s", base=Path(folder), model=model, section=SamplerSection(kv_cache_gb=0.1), seed=0)
    await sampler.start()
    prompt = np.arange(4, dtype=np.int32)
    params = SamplingParams(max_tokens=8, stop=[])
    rollouts = await sampler.sample(np.array([0]), prompt, np.array([0, 4]), 2, params, None, -1)
    pids = [process.pid for process in sampler.engine.llm.engine_core.resources.engine_manager.processes]
    print("READY", len(rollouts.tokens), *pids, flush=True)
    await asyncio.sleep(1e5)

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""


METHOD = """
from rlsys.config import SamplerSection
from rlsys.sampler.engine import prepare_environment
prepare_environment(SamplerSection(num_gpus=1), "cuda")
from vllm.utils.system_utils import get_mp_context
from vllm.v1.engine import utils
from vllm.v1.worker.gpu_worker import Worker
from rlsys.sampler.vllm.cuda_worker import CudaWorker
assert utils.get_mp_context is get_mp_context  # with it vLLM makes the engine's process
assert issubclass(CudaWorker, Worker)
print("METHOD", get_mp_context().get_start_method())
"""
ENGINE_LIKE = """
import multiprocessing, os, threading, time
from rlsys.sampler.vllm.parent_process import exit_with_parent

def engine(pipe):
    exit_with_parent()
    pipe.send(os.getpid())
    time.sleep(1e5)

def start():
    global child, pid
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=engine, args=(there,))
    child.start()
    pid = here.recv()

if __name__ == "__main__":
    thread = threading.Thread(target=start)  # which ends, as one of an actor may
    thread.start()
    thread.join()
    time.sleep(1)
    print("READY" if child.is_alive() else "GONE", pid, flush=True)
    time.sleep(1e5)
"""


def path_without_compilers(folder: Path) -> Path:
    """A folder with a link to every program on PATH that does not compile (vLLM runs lscpu, for one)."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.iterdir() if place.is_dir() else ():
            link = folder / program.name
            if not COMPILER.search(program.name) and not link.is_symlink():
                link.symlink_to(program)
    return folder


def test_an_engine_starts_with_no_compiler_and_ends_when_its_parent_is_killed(
    reference: Reference, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = path_without_compilers(tmp_path / "bin")
    environment = {**os.environ, "PATH": str(path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("CC", None)
    process = subprocess.Popen(
        [sys.executable, str(program), str(reference.folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "err").open("w"),
        text=True,
    )
    assert process.stdout is not None
    ready = next((line.split() for line in process.stdout if line.startswith("READY")), None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ready is not None, (tmp_path / "err").read_text()[-3000:]
    assert ready[1] == "16"
    (engine,) = map(int, ready[2:])
    until_gone([engine], "the engine of a killed process to end")


def test_a_path_of_a_model_is_no_pattern_and_no_address_and_an_engine_leaves_nothing(
    reference: Reference, tmp_path: Path, run: Callable[..., Any]
) -> None:
    folder = tmp_path / "exp[1] *? {a,b} 100% #1 a::b w\xf6rld"
    shutil.copytree(reference.folder, folder)
    model = ModelSection(path=str(folder), max_length=64)
    sampler = Sampler(name="s", base=folder, model=model, section=SamplerSection(kv_cache_gb=0.1), seed=0)
    run(sampler.start())
    try:
        one = np.array([0]), np.arange(4, dtype=np.int32), np.array([0, 4])
        rollouts = run(sampler.sample(*one, 2, SamplingParams(max_tokens=8, stop=[]), None, -1))
        assert len(rollouts.tokens) == 16
        read = Path(sampler.engine.llm.model_config.model)
        assert read.samefile(folder) and read != folder  # still there: the engine reads it again when it is ready
        [met_in] = run(sampler.engine.call_workers("rlsys_meeting_file"))
        assert Path(met_in).is_file()
        (process,) = sampler.engine.llm.engine_core.resources.engine_manager.processes
    finally:
        run(sampler.stop())
    assert not os.path.lexists(read) and not os.path.lexists(met_in)
    until_gone([process.pid], "the engine of a stopped sampler to end")


def test_another_vllm_is_refused_before_it_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    check_private_api()
    with monkeypatch.context() as patch:
        patch.setattr(PunicaWrapperCPU, "add_lora_linear", lambda self, y, x, a_stacked: None)
        with pytest.raises(ClusterError, match=r"PunicaWrapperCPU.add_lora_linear takes \['y', 'x', 'a_stacked'\]"):
            check_private_api()
    monkeypatch.setattr(vllm, "__version__", "0.41.1")
    with pytest.raises(
        ClusterError, match=r"vLLM 0\.41\.1 is installed, and rlsys knows 0\.32 and 0\.33; .* 0\.32, as"
    ):
        check_private_api()


def test_kernels_that_are_registered_before_a_fork_are_not_looked_for_again() -> None:
    from vllm.platforms import current_platform
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    import rlsys.sampler.vllm.cpu_kernels  # noqa: F401  registers

    registered = ComputeSlotMappingKernel.kernel
    assert isinstance(registered, KernelOverride)
    current_platform.register_triton_kernel_overrides()  # as each worker does
    assert ComputeSlotMappingKernel.kernel is registered


def test_logging_is_configured_once_for_all_engines_that_are_forked_from_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import logger
    from vllm.config.logging import LoggingConfig
    from vllm.v1.engine import core

    import rlsys.sampler.vllm.engine_logging  # noqa: F401  configures

    resets: list[object] = []
    monkeypatch.setattr(logger, "dictConfig", resets.append)
    logger.configure_logging(LoggingConfig())  # as each engine does
    logger.configure_logging_if_needed(LoggingConfig())  # and its parent
    assert resets == []
    logger.configure_logging(LoggingConfig(log_level="DEBUG"))
    assert len(resets) == 1
    logger.configure_logging(LoggingConfig())
    assert len(resets) == 2
    # the engine takes what is replaced if its module is imported after this one
    assert PRELOAD[0] == "rlsys.sampler.vllm.engine_logging"
    assert "from vllm.logger import configure_logging" in inspect.getsource(core)


def test_a_model_s_class_is_inspected_here_and_not_in_a_process_that_imports_vllm_again(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    def refuse(function: Callable[[], object]) -> object:
        raise AssertionError("another process")

    name = "Qwen3ForCausalLM"
    by_name = registry._LazyRegisteredModel("vllm.model_executor.models.qwen3", name)
    monkeypatch.setattr(registry, "_run_in_subprocess", refuse)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # the file of an earlier inspection lies elsewhere
    monkeypatch.setitem(ModelRegistry.models, name, by_name)
    with pytest.raises(AssertionError, match="another process"):
        by_name.inspect_model_cls()
    register_classes(reference.folder)
    found = ModelRegistry.models[name].inspect_model_cls()
    assert found.architecture == name and found.is_text_generation_model and found.supports_pp


def test_both_model_runners_keep_adapters_where_the_engine_s_hooks_look_for_them() -> None:
    """Read in their sources: the second wants Triton."""
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0]) / "v1" / "worker"  # type: ignore[union-attr,index]
    for file in ("gpu_model_runner.py", "gpu/model_runner.py"):
        tree = ast.parse((folder / file).read_text())
        (runner,) = (one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "GPUModelRunner")
        assert "LoRAModelRunnerMixin" in {base.id for base in runner.bases if isinstance(base, ast.Name)}, file
    scoring = (folder / "gpu" / "sample" / "prompt_logprob.py").read_text()
    assert "prompt_logprobs is not None" in scoring  # 0 asks for the given tokens alone, as rlsys.sampler.requests does
    assert "logprob_token_ids" in (folder / "gpu" / "sample" / "sampler.py").read_text()


def test_on_cuda_an_engine_s_process_is_spawned_whatever_the_environment_says() -> None:
    environment = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "fork", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_to_end([sys.executable, "-c", METHOD], env=environment)
    assert done.stdout.split()[-2:] == ["METHOD", "spawn"], done.stdout + done.stderr


def test_a_spawned_process_outlives_the_thread_that_made_it_and_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ENGINE_LIKE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    state, pid = process.stdout.readline().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state == "READY"
    until_gone([int(pid)], "the spawned process of a killed one to end")
