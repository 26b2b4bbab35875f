"""Lists of `make clients`: pinned, of one mind, without what they share; and what is said of an incomplete one."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LISTS = sorted((ROOT / "requirements" / "clients").glob("*.txt"))
_spec = importlib.util.spec_from_file_location("clients", ROOT / "requirements" / "clients.py")
assert _spec is not None and _spec.loader is not None
clients = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(clients)


def pins(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "--"))]
    found: dict[str, str] = {canonicalize_name(each.name): str(each.specifier) for each in map(Requirement, lines)}
    assert len(found) == len(lines), f"{file.name} names a package twice"
    return found


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_each_package_of_a_client_is_pinned_and_is_none_that_the_client_shares(file: Path) -> None:
    found = pins(file)
    assert all(each.startswith("==") for each in found.values()), found
    assert not found.keys() & pins(ROOT / "requirements" / "cpu.txt").keys()


def test_a_package_that_several_clients_have_has_one_version() -> None:
    versions: dict[str, set[str]] = {}
    for file in LISTS:
        for name, version in pins(file).items():
            versions.setdefault(name, set()).add(version)
    assert {name for name, each in versions.items() if len(each) > 1} == {"tinker"}


def test_what_a_list_lacks_is_named_with_who_requires_it(tmp_path: Path) -> None:
    wanted = tmp_path / "own.txt"
    wanted.write_text("typer==0.0.1\nno-such-package==1\n")
    found = clients.unmet(wanted, [sysconfig.get_path("purelib")])
    assert "own.txt requires no-such-package==1, which is not there" in found
    assert any(each.startswith("own.txt requires typer==0.0.1, and ") for each in found)
