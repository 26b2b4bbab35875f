"""What a user names by path is there, or the message says why it is not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.utils.import_path import MOVED, import_by_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"import sys\nsys.exit(2)\n", "raised SystemExit: 2"),
        (b"raise StopIteration\n", "raised StopIteration"),
        (b"def f(:\n", r"raised SyntaxError: .*line 1"),
        (b"x = 'caf\xe9'\n", r"raised SyntaxError: .*utf-8.*0xe9"),
        (b"x = 1\x00\n", r"raised SyntaxError: .*null bytes"),
        (b"import not_there_at_all\n", "raised ModuleNotFoundError: No module named 'not_there_at_all'"),
        (b"\xff\xfei\x00", "raised SyntaxError"),
    ],
)
def test_a_module_of_the_users_that_cannot_be_read_is_one_line_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    (tmp_path / "my_rewards.py").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    with pytest.raises(ConfigError, match=rf"rewards\.function: .*importing my_rewards {message}") as raised:
        import_by_path("my_rewards:grade", "rewards.function", "'package.module:function'")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("old", MOVED)
def test_a_module_of_rlsys_that_has_moved_is_refused_with_its_new_name(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    # A checkout in which an older revision ran keeps the folder of a package that has moved: its modules are gone.
    module = ".answers" if hasattr(new, "__path__") else ""
    names = rf"the module {old}{module} is now {MOVED[old]}{module};"
    with pytest.raises(ConfigError, match=rf"rewards\.function: '{old}{module}:grade': {names}"):
        import_by_path(f"{old}{module}:grade", "rewards.function", "'package.module:function'")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rlsys.problems", "rlsys.data.problems"),
        ("rlsys.rewards.math.extraction", "rlsys.math_grading"),  # Python names the package or the module
    ],
)
def test_a_module_of_the_users_that_imports_one_that_has_moved_is_refused_with_the_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    (tmp_path / "my_task.py").write_text(f"from {old} import anything\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    with pytest.raises(ConfigError, match=rf"the module rlsys\.[\w.]+ is now {new}"):
        import_by_path("my_task:Task", "task.name", "'package.module:Class'")
