"""Install lists of pinned packages into the environment whose Python runs this file.

    .venv/bin/python requirements/install.py requirements/torch-cpu.txt requirements/cpu.txt

Standard library and pip. Several pips at once, since one of them waits for a download or unpacks on one core: the lists
are complete, so nothing is resolved, and no package waits for another. Bytecode is compiled on all cores, without
modules that no job imports; if one is imported after all, Python compiles it then.
"""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

AT_ONCE = min(4, os.cpu_count() or 1)
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile")
# Two fifths of all bytes: tests of packages, and models, clients and libraries of which a job imports at most a few
# modules.
SELDOM_IMPORTED = re.compile(
    r"/(tests?|testing|transformers/models|vllm/models|vllm/model_executor/models|ray/(data|rllib|serve|train|tune)"
    r"|anthropic/types|numba|playwright|pip|setuptools|pygments)/"
)


def parts(list_: Path, count: int) -> list[str]:
    """Deal the packages of a list to at most `count` lists with the same options."""
    lines = [line for line in list_.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    options = [line for line in lines if line.startswith("-")]
    packages = [line for line in lines if not line.startswith("-")]
    dealt = [packages[i::count] for i in range(count)]
    return ["\n".join([*options, *part, ""]) for part in dealt if part]


def install(lists: list[Path]) -> bool:
    """Return whether all pips succeeded; each says itself why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        pips = []
        for list_ in lists:
            for i, text in enumerate(parts(list_, AT_ONCE)):
                part = Path(folder) / f"{list_.stem}-{i}.txt"
                part.write_text(text, encoding="utf-8")
                pips.append(subprocess.Popen([*PIP, "--retries", "2", "-r", str(part)]))
        codes = [pip.wait() for pip in pips]
        return not any(codes)


def main() -> int:
    if not install([Path(each) for each in sys.argv[1:]]):
        return 1
    compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, rx=SELDOM_IMPORTED, workers=os.cpu_count() or 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
