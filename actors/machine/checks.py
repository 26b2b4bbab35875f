"""One finding of `rlsys doctor`, and scripts that run in a process of their own because they may hang or crash."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlsys.utils.env_variables import env_variable

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    found: str
    remedy: str = ""


def apart(script: str, limit_s: float, *arguments: str) -> list[str] | str:
    """Last line of what a script prints in a process of its own, in a list; or why it failed, as one line."""
    command = [sys.executable, "-c", script, *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env_variable("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {limit_s:g} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        return [lines[-1]]
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return errors[-1] if errors else f"ended with code {done.returncode}"
