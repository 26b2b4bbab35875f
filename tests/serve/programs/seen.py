"""What a program saw, as JSON lines on stdout: "step", "check" or "saw" first. What fails does not end the program."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

MODEL = os.environ.get("RLSYS_SERVE_MODEL", "")  # as the server's table has it
_failed: list[str] = []


def say(**line: Any) -> None:
    # `default`: NumPy scalars
    print(json.dumps(line, default=float), flush=True)


def check(name: str, found: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """Equal; numbers and arrays within `tolerance`, relative to the greater of 1 and what is wanted."""
    if isinstance(wanted, int | float | list | np.ndarray) and not isinstance(wanted, bool) and tolerance:
        left, right = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
        apart = float(np.max(np.abs(left - right), initial=0.0)) if left.shape == right.shape else float("inf")
        holds = apart <= tolerance * max(1.0, float(np.max(np.abs(right), initial=0.0)))
        say(
            check=name,
            holds=holds,
            apart=apart,
            **({} if holds else {"found": _short(found), "wanted": _short(wanted)}),
        )
    else:
        holds = bool(found == wanted)
        say(check=name, holds=holds, found=_short(found), wanted=_short(wanted))
    if not holds:
        _failed.append(name)


@contextmanager
def step(name: str) -> Iterator[None]:
    """One thing that a user does; an exception is told and the program goes on behind the block."""
    start = time.monotonic()
    try:
        yield
    except Exception as error:
        _failed.append(name)
        say(step=name, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-3000:])
    else:
        say(step=name, seconds=round(time.monotonic() - start, 3))


def refused(name: str, words: list[str], call: Any) -> None:
    """`call` raises an error that holds each of `words`."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        text = str(error)
        holds = all(word in text for word in words)
        say(check=name, holds=holds, found=text, wanted=words, seconds=round(time.monotonic() - start, 3))
    else:
        holds = False
        say(check=name, holds=False, found="no error", wanted=words)
    if not holds:
        _failed.append(name)


def end() -> None:
    """The last line. The exit status is 1 if anything failed."""
    say(saw="end", failed=_failed)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if _failed else 0)  # threads of an SDK's event loop outlive main


def _short(value: Any) -> Any:
    text = str(value)
    return text if len(text) < 800 else text[:800] + " ..."
