"""Machines with GPUs that are not there: compiles nvml_standin.c with what NVML is to answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml_standin.c")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="compiling the NVML stand-in needs gcc")
MIB = 2**20


@dataclass(frozen=True)
class Part:
    uuid: str
    name: str = "NVIDIA H200"
    total: int = 143_771 * MIB
    free: int = 143_100 * MIB

    def text(self) -> str:
        return f'{{"{self.uuid}", "{self.name}", {self.total}ULL, {self.free}ULL}}'


@dataclass(frozen=True)
class Card:
    whole: Part
    capability: tuple[int, int] = (9, 0)
    mode: int = 0  # compute mode: 2 prohibited, 3 exclusive process
    mig: int = 0  # -1: the GPU knows no MIG
    instances: Sequence[Part | None] = ()

    def text(self) -> str:
        parts = ", ".join("{0}" if part is None else part.text() for part in self.instances) or "{0}"
        major, minor = self.capability
        numbers = f"{major}, {minor}, {self.mode}, {self.mig}, {len(self.instances)}"
        return f"{{{self.whole.text()}, {numbers}, {{{parts}}}}}"


@dataclass(frozen=True)
class Machine:
    cards: Sequence[Card]
    driver: str = "580.159.04"
    cuda: int = 13_000
    init: int = 0  # what nvmlInit answers
    no_peers: Sequence[tuple[int, int]] = ()

    def header(self) -> str:
        cards = ", ".join(card.text() for card in self.cards) or "{{0}}"
        apart = " && ".join(f"!(one == {one} && two == {two})" for one, two in self.no_peers) or "1"
        return (
            f"enum {{ INIT = {self.init}, CUDA = {self.cuda}, COUNT = {len(self.cards)} }};\n"
            f'static const char DRIVER[] = "{self.driver}";\n'
            f"static const struct gpu gpus[] = {{{cards}}};\n"
            f"static int peers(long one, long two) {{ return {apart}; }}\n"
        )


def cards(count: int) -> list[Card]:
    return [Card(Part(f"GPU-{at}{at}{at}{at}0000-0000-0000-0000-000000000000")) for at in range(count)]


def install(machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make processes started from now on find this machine's GPUs; this process has its own loader's path already."""
    (folder / "machine.h").write_text(machine.header())
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wno-unused-function", "-I", str(folder), str(SOURCE)]
    subprocess.run([*command, "-o", str(library)], check=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    monkeypatch.setenv("LD_LIBRARY_PATH", path)
    monkeypatch.setattr("actors.machine.gpus.NVML", str(library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library
