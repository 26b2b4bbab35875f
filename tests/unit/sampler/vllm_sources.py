"""Digests of the vLLM sources that rlsys.sampler builds on, of one installed or unpacked build:

    python -m tests.unit.sampler.vllm_sources SITE_PACKAGES > tests/unit/sampler/vllm_cuda_sources.txt

The record beside this module is of the CUDA build that requirements/gpu.txt pins. Only its Python files are needed: a
wheel can be unpacked without installing it (`unzip vllm-*.whl 'vllm/*.py' 'vllm-*.dist-info/*'`).
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rlsys.sampler.private_api import PRIVATE_API

ROOT = Path(__file__).parents[3]
RECORD = Path(__file__).with_name("vllm_cuda_sources.txt")
# What rlsys.sampler.vllm reaches without naming it: the worker and the runners on CUDA that AdapterExtension is mixed
# into, and the managers, layers and kernels of LoRA that adapters pass through.
REACHED = (
    "vllm.lora.punica_wrapper.punica_base",
    "vllm.entrypoints.llm",
    "vllm.lora.layers.base_linear",
    "vllm.lora.layers.column_parallel_linear",
    "vllm.lora.layers.logits_processor",
    "vllm.lora.layers.row_parallel_linear",
    "vllm.lora.punica_wrapper.punica_gpu",
    "vllm.lora.worker_manager",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.sample.logprobs",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.lora_model_runner_mixin",
    "vllm.v1.worker.worker_base",
)
# Attributes that AdapterExtension reads from objects of these modules; assigned to `self` there.
ATTRIBUTES = {
    "vllm.v1.worker.gpu_worker": ("model_runner",),
    "vllm.v1.worker.worker_base": ("distributed_init_method",),
    "vllm.v1.worker.lora_model_runner_mixin": ("lora_manager",),
    "vllm.lora.worker_manager": ("_adapter_manager",),
    "vllm.lora.model_manager": (
        "lora_config",
        "lora_index_to_id",
        "model",
        "modules",
        "packed_modules",
        "punica_wrapper_mapping",
    ),
    "vllm.lora.layers.base_linear": ("lora_a_stacked", "lora_b_stacked", "base_layer", "tp_size"),
}


def imported() -> set[str]:
    """Modules of vLLM that rlsys imports by name when it runs."""
    found: set[str] = set()
    for path in ROOT.glob("rlsys/sampler/**/*.py"):
        for node in _executed(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                found |= {str(node.module), *(f"{node.module}.{each.name}" for each in node.names)}
            elif isinstance(node, ast.Import):
                found |= {each.name for each in node.names if each.name.startswith("vllm.")}
    return found


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from _executed(node)


def sources(site_packages: Path) -> Iterator[tuple[str, Path]]:
    """(module, file) of each, in order; names of things inside a module are left out."""
    modules = imported() | {path.partition(":")[0] for path in PRIVATE_API} | set(REACHED) | set(ATTRIBUTES)
    for module in sorted(modules):
        file = file_of(site_packages, module)
        if file is not None:
            yield module, file


def file_of(site_packages: Path, module: str) -> Path | None:
    path = site_packages.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def digests(site_packages: Path) -> dict[str, str]:
    return {module: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for module, file in sources(site_packages)}


def function(site_packages: Path, path: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The definition of `module:name` or `module:Class.name`, of a base class where the class has none itself; None:
    there is none. Nothing is imported."""
    module, _, name = path.partition(":")
    file = file_of(site_packages, module)
    if file is None:
        return None
    tree = ast.parse(file.read_text())
    owner, _, last = name.rpartition(".")
    if not owner:
        return _defined(tree.body, last) or _elsewhere(site_packages, module, tree, last, "")
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    if not classes:
        return _elsewhere(site_packages, module, tree, owner, f".{last}")
    found = _defined(classes[0].body, last)
    for base in classes[0].bases:
        found = found or (function(site_packages, f"{module}:{base.id}.{last}") if isinstance(base, ast.Name) else None)
    return found


def _defined(body: list[ast.stmt], name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return next((node for node in body if isinstance(node, kinds) and node.name == name), None)


def _elsewhere(
    site_packages: Path, module: str, tree: ast.Module, name: str, rest: str
) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Where a module imports `name` from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            package = module.rsplit(".", node.level)[0] + "." if node.level else ""
            return function(site_packages, f"{package}{node.module}:{name}{rest}")
    return None


def parameters(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """As inspect names them, without `self` and `**kwargs`."""
    given = definition.args
    more = [given.vararg] if given.vararg else []
    return [
        each.arg
        for each in [*given.posonlyargs, *given.args, *more, *given.kwonlyargs]
        if each.arg not in ("self", "cls")
    ]


def assigned(file: Path) -> set[str]:
    """Attributes of `self` that a module's classes assign."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                found.add(target.attr)
            elif isinstance(target, ast.Name) and isinstance(node, ast.AnnAssign):
                found.add(target.id)  # declared in the class, assigned elsewhere
    return found


def version(site_packages: Path) -> str:
    """Of the distribution, "vllm 0.32.0"."""
    (info,) = site_packages.glob("vllm*-[0-9]*.dist-info")
    name, _, number = info.name.removesuffix(".dist-info").partition("-")
    return f"{name.replace('_', '-')} {number}"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(f"# {version(place)}: module and the first 16 digits of its file's SHA-256; made by this module")
    for each, digest in digests(place).items():
        print(each, digest)
