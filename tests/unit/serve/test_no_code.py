"""Nothing of a request is run, unpickled, imported or given to a shell: the code of rlsys.serve has no means to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlsys.serve

FOLDER = Path(rlsys.serve.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
MODULES = {
    *["pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"],
    *["subprocess", "pty", "commands", "code", "codeop", "runpy", "imp", "ctypes", "multiprocessing", "pickletools"],
    *["yaml", "ray", "vllm", "peft", "xml", "xmlrpc", "torch", "tempfile", "zipfile", "gzip", "bz2", "lzma"],
}
NAMES = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint", "input", "globals"}
# Of any object: numpy.load and torch.load unpickle, os.system and its like run a program.
ATTRIBUTES = {
    *["system", "popen", "import_module", "import_by_path", "load_module", "exec_module", "literal_eval"],
    *["create_subprocess_shell", "create_subprocess_exec", "full_load", "unsafe_load", "format_map"],
    *["__reduce__", "__globals__", "__subclasses__", "extractall", "fromfile", "memmap"],
}
LOADERS = {"np", "numpy", "torch", "pa", "pd"}  # whose `load` unpickles


def found_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES:
                yield node.module or ""
            yield from (each.name for each in node.names if each.name in NAMES | ATTRIBUTES)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.id
        elif isinstance(node, ast.Attribute):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            is_loader = of in LOADERS and node.attr == "load"
            is_program = of == "os" and node.attr.startswith(("spawn", "exec", "posix_spawn", "fork"))
            if node.attr in ATTRIBUTES or is_loader or is_program:
                yield node.attr
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            yield f"{node.arg}="


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_no_file_of_the_http_layer_can_run_what_a_request_brings(file: Path) -> None:
    assert list(found_in(ast.parse(file.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import os; os.system('x')", "eval('1')", "exec('1')",
        "from subprocess import run", "import torch; torch.load('x')", "np.load(f, allow_pickle=True)",
        "x.import_module(y)",         "import yaml", "__import__('os')", "import cloudpickle as p",
        "from importlib import import_module",
        "os.execvp('a', [])", "os.posix_spawn('a')", "f(shell=True)", "loop.create_subprocess_exec('x')",
        "import ray.cloudpickle",
    ],
)  # fmt: skip
def test_the_search_sees_what_it_is_for(code: str) -> None:
    assert list(found_in(ast.parse(code)))


def test_all_files_are_searched() -> None:
    assert {"gate.py", "app.py", "training.py", "passes.py", "rest.py"} <= {file.name for file in FILES}
