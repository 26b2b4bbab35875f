"""The README's program runs as it is printed, on the tiny model in place of the quickstart's base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rlsys

README = Path(__file__).parents[2] / "README.md"


def test_the_snippet_of_the_readme_runs(
    service: rlsys.ServiceClient, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("runs/quickstart/base") == 1
    exec(code.replace("runs/quickstart/base", base), {})
    assert abs(float(capsys.readouterr().out) - 1) < 1e-3  # on policy, so p = q
