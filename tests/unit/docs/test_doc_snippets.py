"""Every Python snippet of README and docs/ is executed by a test; those here need neither Ray nor an engine."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from rlsys import losses
from rlsys.evaluation.record import write
from tests.unit.docs import pages
from tests.unit.docs.pages import PAGES, ROOT
from tests.unit.evaluation.test_record import record
from tests.unit.tokenization.test_renderer import tokenizer_of

DOCS = ROOT / "docs"
# the first line of a snippet -> the test that executes it
EXECUTED = {
    "import rlsys": "tests/client/test_readme.py::test_the_snippet_of_the_readme_runs",
    "# my_rewards.py": "tests/ray/test_command.py::test_the_reward_function_of_the_docs_runs_as_the_docs_say",
    "# my_tasks.py": "tests/unit/tasks/test_tasks.py::test_the_task_that_the_docs_show_is_a_task_in_under_twenty_lines",
    "# my_sets.py": "tests/unit/tasks/test_tasks.py::test_the_data_set_that_the_docs_show_is_a_task_too",
    "def reinforce(": "tests/unit/docs/test_doc_snippets.py::test_the_loss_of_the_docs_is_a_loss",
    '    "reinforce": ': "tests/unit/docs/test_doc_snippets.py::test_the_loss_of_the_docs_is_a_loss",
    "from rlsys.tokenization.renderer": (
        "tests/unit/docs/test_doc_snippets.py::test_the_conversation_of_the_docs_becomes_tokens"
    ),
    "from openai": "tests/serve/test_openai.py::test_the_snippet_of_the_docs_asks_a_checkpoint",
    "from pathlib": "tests/unit/docs/test_doc_snippets.py::test_two_evaluations_are_compared_as_the_docs_say",
}


def snippet(page: str, start: str) -> str:
    (found,) = [block for block in pages.blocks(DOCS / page, "python") if block.startswith(start)]
    return found


def test_every_snippet_is_executed_by_a_test_that_exists() -> None:
    starts = [block for page in PAGES for block in pages.blocks(page, "python")]
    assert len(starts) == len(EXECUTED)
    for block in starts:
        (test,) = [test for start, test in EXECUTED.items() if block.startswith(start)]
        path, _, function = test.partition("::")
        assert re.search(rf"^def {function}\b", (ROOT / path).read_text(), re.MULTILINE), test


def test_the_loss_of_the_docs_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    space = dict(vars(losses))
    exec(snippet("extending.md", "def reinforce("), space)
    entry = eval("{" + snippet("extending.md", '    "reinforce": ') + "}", space)
    monkeypatch.setattr(losses, "_LOSSES", {**losses._LOSSES, **entry})
    p, q, advantage = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]), torch.tensor([1.0, -0.5])
    assert losses.resolve("reinforce", {}).name == "reinforce"
    assert entry["reinforce"].equation(p, q, advantage).tolist() == [1.0, -1.0]


def test_the_conversation_of_the_docs_becomes_tokens() -> None:
    space = {"tokenizer": tokenizer_of(None)}
    exec(snippet("tasks.md", "from rlsys.tokenization.renderer"), space)
    assert len(space["tokens"]) == len(space["weights"]) > 0
    assert set(space["weights"].tolist()) == {0.0, 1.0}


def test_two_evaluations_are_compared_as_the_docs_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = snippet("evaluation.md", "from pathlib")
    for path, solved in zip(re.findall(r'Path\("(.+?)\.json"\)', code), ((0.0,) * 4, (1.0,) * 4), strict=True):
        write(dataclasses.replace(record(solved=solved), name=Path(path).name), tmp_path / Path(path).parent)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert re.fullmatch(r"\+1\.000, between \+0\.\d{3} and \+\d\.\d{3}\n", capsys.readouterr().out)
