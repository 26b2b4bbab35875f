"""Claims about reading data sets from files, folders and the Hub."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlsys.config import ColumnSection, SourceSection
from rlsys.data.rows import HUB_LIMIT_S, Rows, read_rows
from rlsys.errors import ConfigError
from tests.unit.data.fake_hub import fake_hub
from tests.waiting import slowdown

ROOT = Path(__file__).parents[3]
SHIPPED = Path(__file__).parents[1] / "data" / "gsm8k_like.jsonl"
ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "Über, 2 + 3?\nSay", "answer": "5"}]
LARGE: list[dict[str, object]] = [
    {"question": "1 + 1?", "answer": 123456789012345678901234},
    {"question": "2 + 3?", "answer": None},
]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def read(path: Path | str, split: str = "train", subset: str | None = None, **columns: str) -> Rows:
    return read_rows(SourceSection(path=str(path), split=split, subset=subset), ColumnSection(**columns), "task.train")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    assert read(write(tmp_path / f"words{ending}", ROWS)) == Rows(("1 + 1?", "Über, 2 + 3?\nSay"), ("2", "5"), 0, "")


def test_a_folder_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "test.jsonl", ROWS[1:])
    assert read(tmp_path, "train").answers == ("2",)
    assert read(tmp_path, "test").answers == ("5",)
    with pytest.raises(ConfigError, match=r"task\.train: .*validation.*'train', 'test'"):
        read(tmp_path, "validation")


def test_numbers_become_texts_and_rows_without_an_answer_are_counted_and_told(tmp_path: Path) -> None:
    answers = ["7", 7, 7.0, 2.5, -3, None, "", "  ", True]
    path = write(tmp_path / "mixed.jsonl", [{"question": f"{i}?", "answer": a} for i, a in enumerate(answers)])
    found = read(path)
    assert found.answers == ("7", "7", "7", "2.5", "-3")
    assert found.unusable == 4
    assert found.why.startswith("row 5: answer is NoneType")


def test_numbers_of_a_column_with_gaps_stay_whole(tmp_path: Path) -> None:
    found = read(write(tmp_path / "gaps.csv", [{"question": "a", "answer": 1500}, {"question": "b", "answer": ""}]))
    assert (found.answers, found.unusable) == (("1500",), 1)


def test_a_set_without_a_usable_row_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"question": [{"role": "user"}], "answer": "1"}])
    with pytest.raises(ConfigError, match=r"no usable row: row 0: question is list .* wanted a text or a number"):
        read(path)


def test_a_column_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"task\.columns\.prompt.*'quest'.*has question, answer; did you mean"):
        read(SHIPPED, prompt="quest")
    with pytest.raises(ConfigError, match=r"task\.columns\.answer.*'solution'.*has question, answer"):
        read(SHIPPED, answer="solution")


@pytest.mark.parametrize("path", ["nowhere/problems.jsonl", "./nowhere", "/nowhere/at/all", "problems.csv"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.train\.path: no file or folder"):
        read(path)


def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a b")
    with pytest.raises(ConfigError, match=r"words\.txt; wanted .*\.jsonl, \.json, \.csv, \.parquet"):
        read(tmp_path / "words.txt")


def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "words.parquet").write_text("a b")
    with pytest.raises(ConfigError, match=r"words\.parquet cannot be read"):
        read(tmp_path / "words.parquet")


LOAD = """
import json, sys
from rlsys.config import ColumnSection, SourceSection
from rlsys.errors import ConfigError
from rlsys.data import rows
rows.HUB_LIMIT_S = 2.0
for path in sys.argv[1:]:
    try:
        found = rows.read_rows(SourceSection(path=path, subset="main", split="test"), ColumnSection(), "task.eval")
        print(json.dumps([found.prompts, found.answers]))
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


def elsewhere(endpoint: str, home: Path, *paths: str) -> list[object]:
    """What a process of its own reads, for which the Hub is at `endpoint` and its caches in `home`."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class Found:
    """What processes read of two data sets: from the Hub, from their local copies, and from the cache without the Hub.
    With it what they were told of a data set that does not exist."""

    hub: list[object]
    local: list[object]
    cached: list[object]
    unknown: str
    missing: str


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("hub")
    words, numbers = folder / "words", folder / "numbers"
    write(words / "main" / "train.jsonl", ROWS[:1])
    write(words / "main" / "test.jsonl", ROWS)
    write(words / "other" / "test.jsonl", ROWS[:1])
    splits = "[{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]"
    (words / "README.md").write_text(
        f"---\nconfigs:\n- {{config_name: main, data_files: {splits}}}\n"
        "- {config_name: other, data_files: other/test.jsonl}\n---\n"
    )
    write(numbers / "main" / "test.jsonl", LARGE)
    write(numbers / "other" / "test.csv", ROWS)
    (numbers / "README.md").write_text(
        "---\nconfigs:\n- {config_name: main, data_files: [{split: test, path: main/test.jsonl}]}\n"
        "- {config_name: other, data_files: other/test.csv}\n---\n"
    )
    names, unknown = ["someone/words", "someone/numbers"], "someone/wrods"
    with fake_hub(dict(zip(names, (words, numbers), strict=True))) as endpoint:
        *read, told = elsewhere(endpoint, folder / "home", *names, str(words), str(numbers), unknown)
    *cached, missing = elsewhere(endpoint, folder / "home", *names, unknown)
    return Found(read[:2], read[2:], cached, str(told), str(missing))


def test_the_hub_gives_the_rows_of_its_local_copy_and_the_cache_gives_them_without_it(found: Found) -> None:
    assert found.hub[0] == found.local[0] == found.cached[0] == [["1 + 1?", "Über, 2 + 3?\nSay"], ["2", "5"]]


def test_a_data_set_that_does_not_exist_is_told_with_and_without_the_hub(found: Found) -> None:
    assert "nor an accessible data set on the Hugging Face Hub" in found.unknown
    assert "cannot be reached" in found.missing
    assert "set task.eval.path to a local file or folder" in found.missing


def test_numbers_of_the_hub_and_of_its_cache_are_those_of_the_file(found: Found) -> None:
    assert found.hub[1] == found.local[1] == found.cached[1] == [["1 + 1?"], ["123456789012345678901234"]]


def test_a_hub_that_never_answers_is_given_up_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun, slow = time.monotonic(), slowdown()
        (said,) = elsewhere(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "home", "someone/words")
    assert "cannot be reached (no response within 2 s" in str(said) or "timed out" in str(said)
    assert time.monotonic() - begun < HUB_LIMIT_S * max(slow, slowdown())
