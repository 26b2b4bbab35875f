"""Prompts and answers of a data set: a local file or folder, or a name on the Hub.

A path that exists here is local, anything else is a name on the Hub. `datasets` says which files of a folder or of a
Hub name belong to a split, and fetches them; JSON, CSV and Parquet are then read by rlsys/data/row_files.py, wherever
they come from: the same files give the same rows. Other formats are read by the library. It keeps a Hub data set in its
cache, and it comes from there when the Hub is out of reach.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlsys.config import ColumnSection, SourceSection
from rlsys.config.relative_paths import HUB_NAME
from rlsys.data import row_fields
from rlsys.data.messages import Messages
from rlsys.data.row_files import FORMATS, Row, format_of, read_file
from rlsys.data.split_files import PLAIN_OPTIONS, Splits, in_our_formats, said, splits_of_folder
from rlsys.errors import ConfigError, did_you_mean
from rlsys.utils.text_files import first_line

HUB_LIMIT_S = 10.0  # for the first answer; after that the library's own limits hold


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows as text, and what became of those that are none."""

    prompts: tuple[str | Messages, ...]
    answers: tuple[str, ...]
    unusable: int  # rows left out: no text or number in one of the columns
    why: str  # of the first of those; "" without one


def load(source: SourceSection, columns: ColumnSection, key: str) -> Rows:
    """All rows in their order; `key` is where the job names the source, such as task.train.

    Raises:
        ConfigError: there is no such file, data set, split or column, it cannot be read, or no row is usable.
    """
    path = Path(source.path)
    if path.exists():
        rows = _local(source, columns, path, key)
    elif HUB_NAME.fullmatch(source.path) and format_of(source.path) is None:
        rows = _hub(source, columns, key)
    else:
        raise ConfigError(
            f"{key}.path: no file or folder {source.path!r} here; wanted one, or the name of a data set on the Hugging "
            "Face Hub, such as openai/gsm8k"
        )
    found = _as_text(rows, columns, f"{key}: {source.path}")
    if not found.prompts:
        raise ConfigError(f"{key}: {source.path} has no usable row{f': {found.why}' if found.why else ''}")
    return found


def _as_text(rows: Iterable[Row], columns: ColumnSection, where: str) -> Rows:
    prompts, answers, unusable, why = list[str | Messages](), list[str](), 0, ""
    seen, known = set[str](), dict[str, None]()  # columns that some row has; names of all of them
    for number, row in enumerate(rows):
        found = {column: row_fields.at(row, column) for column in (columns.prompt, columns.answer)}
        seen.update(column for column, value in found.items() if value is not row_fields.MISSING)
        if len(seen) < len(found):
            known.update(dict.fromkeys(row_fields.names(row)))
        column = columns.prompt
        try:
            asked = row_fields.question(_present(found[column]))
            column = columns.answer
            answer = row_fields.text(_present(found[column]))
        except row_fields.UnusableError as error:
            unusable += 1
            why = why or f"row {number}: {column} {str(error).replace('COLUMN', column)}"
            continue
        prompts.append(asked)
        answers.append(answer)
    for column, name in ((columns.prompt, "prompt"), (columns.answer, "answer")):
        if known and column not in seen:
            raise ConfigError(
                f"task.columns.{name}: {where} has no column {column!r}; it has {', '.join(known)}"
                f"{did_you_mean(column, known)}"
            )
    return Rows(tuple(prompts), tuple(answers), unusable, why)


def _present(value: Any) -> Any:
    return None if value is row_fields.MISSING else value


def _local(source: SourceSection, columns: ColumnSection, path: Path, key: str) -> Iterator[Row]:
    """Read where it lies: nothing is copied into a cache."""
    if path.is_dir():
        return _folder(source, columns, path, key)
    if format_of(path.name) is None:
        raise ConfigError(f"{key}.path: found {path}; wanted a folder, or a file that ends in {', '.join(FORMATS)}")
    return read_file(path, _roots(columns), f"{key}: {path}")


def _folder(source: SourceSection, columns: ColumnSection, path: Path, key: str) -> Iterator[Row]:
    splits = splits_of_folder(source, path, key)
    if splits is None:
        return _read(f"{key}: {path}", str(path.resolve()), name=source.subset, split=source.split, streaming=True)
    return _of_split(splits, source, columns, f"{key}: {path}")


def _hub(source: SourceSection, columns: ColumnSection, key: str) -> Iterator[Row]:
    problem = _out_of_reach(source.path, key)
    if problem is None:
        where = f"{key}: {source.path} on the Hub"
        splits = _splits_of_hub(source, where)
        if splits is None:
            return _read(where, source.path, name=source.subset, split=source.split)
        return _of_split(splits, source, columns, where)
    with _offline():
        try:
            snapshot = _snapshot(source.path)
            if snapshot is not None:
                splits = splits_of_folder(source, snapshot, key)
                if splits is not None:
                    return _of_split(splits, source, columns, f"{key}: {source.path} in the cache")
            return _read(f"{key}: {source.path} in the cache", source.path, name=source.subset, split=source.split)
        except ConfigError as error:
            raise ConfigError(
                f"{key}.path: {source.path!r} is no file or folder here, the Hugging Face Hub cannot be reached "
                f"({problem}), and the cache does not hold it; set {key}.path to a local file or folder of the same "
                f"rows ({', '.join(FORMATS)}), or load it once where there is a network and bring HF_HOME along"
            ) from error


def _of_split(splits: Splits, source: SourceSection, columns: ColumnSection, where: str) -> Iterator[Row]:
    """The rows of one split, or of a part of it or of several together: train[:10%], train+test."""
    if source.split in splits:
        return _of_files(splits[source.split], columns, where)
    import datasets

    known = ", ".join(map(repr, splits))
    unknown = ConfigError(f"{where} has no split {source.split!r}; it has {known}{did_you_mean(source.split, splits)}")
    names = [part.split("[")[0].strip() for part in source.split.split("+")]
    if not all(name in splits for name in names):
        raise unknown
    rows = {name: list(_of_files(splits[name], columns, where)) for name in names}
    try:
        spec = datasets.ReadInstruction.from_spec(source.split)
        parts = spec.to_absolute({name: len(found) for name, found in rows.items()})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: split {source.split!r}: {error}; it has {known}") from error
    return (row for part in parts for row in rows[part.splitname][part.from_ : part.to])


def _of_files(files: Sequence[tuple[Path, str]], columns: ColumnSection, where: str) -> Iterator[Row]:
    for path, name in files:
        yield from read_file(path, _roots(columns), f"{where}: {name}", name)


def _roots(columns: ColumnSection) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*row_fields.roots(columns.prompt), *row_fields.roots(columns.answer))))


def _splits_of_hub(source: SourceSection, where: str) -> Splits | None:
    """As ``splits_of_folder``; the files of all splits of the subset are fetched into the Hub's cache."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.path, name=source.subset)
        if not _is_plain(builder.config):
            return None
        manager = datasets.DownloadManager(base_path=builder.base_path)
        files = {str(split): [str(file) for file in found] for split, found in builder.config.data_files.items()}
        if in_our_formats({split: [(Path(file), file) for file in found] for split, found in files.items()}) is None:
            return None
        return {
            split: [(Path(path), Path(file).name) for path, file in zip(manager.download(found), found, strict=True)]
            for split, found in files.items()
        }
    except Exception as error:  # of a library that speaks to a server
        raise ConfigError(f"{where} cannot be read: {said(error)}") from error


def _is_plain(config: Any) -> bool:
    """Whether a subset's README sets nothing that changes how its files are read, such as names of CSV columns."""
    if not config.data_files:
        return False
    plain = type(config)()
    read = [field.name for field in fields(config) if field.name not in (*PLAIN_OPTIONS, "name", "sep")]
    return all(getattr(config, name) == getattr(plain, name) for name in read)


def _snapshot(name: str) -> Path | None:
    """The files of a data set that were fetched before; None where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None


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
    return None if error is None else first_line(error)


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


def _read(where: str, *args: str, **options: Any) -> Iterator[Row]:
    import datasets

    try:
        rows: list[Mapping[str, Any]] = list(datasets.load_dataset(*args, **options))
    except Exception as error:  # of a library that reads whatever file it is given
        raise ConfigError(f"{where} cannot be read: {said(error)}") from error
    return iter(rows)
