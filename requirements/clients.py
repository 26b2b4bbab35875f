"""Set up one environment of a Tinker client: .clients/NAME from requirements/clients/NAME.txt.

    .venv/bin/python requirements/clients.py NAME

A list holds what its client needs beside the packages of the environment that runs this file. The client finds those
after its own: torch and transformers lie on the disk once. Ends with an error that names each package that is missing.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LISTS = Path(__file__).parent / "clients"
FOLDER = LISTS.parents[1] / ".clients"
# Required by tinker-cookbook, and imported only by its audio recipes and for models of Thinking Machines' own.
LEFT_OUT = {"tml-renderers"}


def set_up(name: str) -> str | None:
    """Create the environment; return what is wrong with it."""
    wanted, folder = LISTS / f"{name}.txt", FOLDER / name
    if not wanted.is_file():
        known = ", ".join(sorted(each.stem for each in LISTS.glob("*.txt")))
        return f"{name} is not a client: wanted one of {known}"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--no-deps", "--retries", "2", "-r", str(wanted)]).returncode:
        return f"pip cannot install {wanted}: its message stands above"
    (own,) = folder.glob("lib/python3.*/site-packages")
    shared = sysconfig.get_path("purelib")
    (own / "shared.pth").write_text(f"{shared}\n")
    if missing := sorted(unmet(wanted, [str(own), shared])):
        return f"{wanted} is incomplete beside {shared}: " + "; ".join(missing)
    return None


def unmet(wanted: Path, path: list[str]) -> set[str]:
    """What the packages of a list require, directly or not, and `path` does not hold."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for each in importlib.metadata.distributions(path=path):
        found.setdefault(canonicalize_name(each.name), each)
    waiting = [(wanted.name, Requirement(line)) for line in wanted.read_text().splitlines() if "==" in line]
    seen: set[tuple[str, str]] = set()
    missing = set()
    while waiting:
        asker, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        if name not in found:
            missing.add(f"{asker} requires {requirement}, which is not there")
            continue
        there = found[name]
        if not requirement.specifier.contains(there.version, prereleases=True):
            missing.add(f"{asker} requires {requirement}, and {there.version} is there")
        extras = {"", *requirement.extras} - {extra for other, extra in seen if other == name}
        seen |= {(name, extra) for extra in extras}
        wants = [Requirement(line) for line in there.requires or ()] if extras else []
        waiting += [(name, each) for each in wants if applies(each, extras)]
    return missing


def applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: .venv/bin/python requirements/clients.py NAME")
    problem = set_up(sys.argv[1])
    sys.exit(problem and f"make clients: {problem}")
