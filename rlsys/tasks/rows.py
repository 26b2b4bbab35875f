"""Prompts and answers of a data set: a local file or folder, or a name on the Hub. The one home of `datasets`.

A path that exists here is local, anything else is a name on the Hub. Both are read by the same library, so the same
files give the same rows. The library keeps a Hub data set in its cache, and it comes from there when the Hub is out of
reach.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config import ColumnSection, SourceSection
from rlsys.errors import ConfigError, did_you_mean

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_LIMIT_S = 10.0  # for the first answer; after that the library's own limits hold
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows as text, and what became of those that are none."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    unusable: int  # rows left out: no text or number in one of the columns
    why: str  # of the first of those; "" without one


def load(source: SourceSection, columns: ColumnSection, key: str) -> Rows:
    """All rows in their order; `key` is where the job names the source, such as task.train.

    Raises:
        ConfigError: there is no such file, data set, split or column, it cannot be read, or no row is usable.
    """
    path = Path(source.path).expanduser()
    if path.exists():
        rows = _local(source, path, key)
    elif _HUB_NAME.fullmatch(source.path) and path.suffix not in FORMATS:
        rows = _hub(source, key)
    else:
        raise ConfigError(
            f"{key}.path: no file or folder {source.path!r} here; wanted one, or the name of a data set on the Hugging "
            "Face Hub, such as openai/gsm8k"
        )
    found = _as_text(rows, columns, f"{key}: {source.path}")
    if not found.prompts:
        raise ConfigError(f"{key}: {source.path} has no usable row{f': {found.why}' if found.why else ''}")
    return found


def _as_text(rows: Iterable[Mapping[str, Any]], columns: ColumnSection, where: str) -> Rows:
    prompts, answers, unusable, why = [], [], 0, ""
    for number, row in enumerate(rows):
        for column, name in ((columns.prompt, "prompt"), (columns.answer, "answer")):
            if column not in row:
                raise ConfigError(
                    f"task.columns.{name}: {where} has no column {column!r}; it has {', '.join(row)}"
                    f"{did_you_mean(column, row)}"
                )
        prompt, answer = _text(row[columns.prompt]), _text(row[columns.answer])
        if prompt is not None and answer is not None:
            prompts.append(prompt)
            answers.append(answer)
            continue
        unusable += 1
        if not why:
            column = columns.prompt if prompt is None else columns.answer
            value = row[column]
            why = f"row {number}: {column} is {type(value).__name__} {str(value)[:_SHOWN]!r}, wanted a text or a number"
    return Rows(tuple(prompts), tuple(answers), unusable, why)


def _text(value: object) -> str | None:
    """Texts as they are, numbers as one writes them; None for a blank text and for anything else."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else repr(value)


def _local(source: SourceSection, path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """Read where it lies: nothing is copied into a cache."""
    if path.is_dir():
        return _read(f"{key}: {path}", str(path.resolve()), name=source.subset, split=source.split, streaming=True)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{key}.path: found {path}; wanted a folder, or a file that ends in {', '.join(FORMATS)}")
    files = {"rows": str(path.resolve())}
    return _read(f"{key}: {path}", FORMATS[path.suffix], data_files=files, split="rows", streaming=True)


def _hub(source: SourceSection, key: str) -> Iterator[Mapping[str, Any]]:
    problem = _out_of_reach(source.path, key)
    if problem is None:
        return _read(f"{key}: {source.path} on the Hub", source.path, name=source.subset, split=source.split)
    with _offline():
        try:
            return _read(f"{key}: {source.path} in the cache", source.path, name=source.subset, split=source.split)
        except ConfigError:
            raise ConfigError(
                f"{key}.path: {source.path!r} is no file or folder here, the Hugging Face Hub cannot be reached "
                f"({problem}), and the cache does not hold it; set {key}.path to a local file or folder of the same "
                f"rows ({', '.join(FORMATS)}), or load it once where there is a network and bring HF_HOME along"
            ) from None


def _out_of_reach(name: str, key: str) -> str | None:
    """Why the Hub does not answer, within HUB_LIMIT_S whatever the network does; None if it knows the data set.

    Raises:
        ConfigError: the Hub answers that there is no such data set.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problem: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=HUB_LIMIT_S)
            problem.append(None)
        except Exception as error:  # of the libraries below; what it says goes into the message
            problem.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a name server may hold its caller longer than any timeout
    asking.start()
    asking.join(HUB_LIMIT_S)
    if not problem:
        return f"no answer within {HUB_LIMIT_S:.0f} s"
    error = problem[0]
    if isinstance(error, RepositoryNotFoundError):
        raise ConfigError(
            f"{key}.path: {name!r} is no file or folder here and no data set on the Hugging Face Hub that may be read "
            "from here; mind the name, and for a private or gated one log in with `hf auth login`"
        )
    return None if error is None else (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _offline() -> Iterator[None]:
    """The library looks into its cache alone: it would try the Hub six times first."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _read(where: str, *args: str, **options: Any) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        rows: list[Mapping[str, Any]] = list(datasets.load_dataset(*args, **options))
    except Exception as error:  # of a library that reads whatever file it is given
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{where} cannot be read: {said}") from error
    return iter(rows)
