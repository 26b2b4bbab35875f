"""Reads prompts and answers of a data set from a local file or folder, or from the Hugging Face Hub.

An existing path is local; any other source is a data set name on the Hub. The library `datasets` determines which files
belong to a split, and downloads them. rlsys/data/row_files.py then reads JSON, CSV and Parquet, local or from the Hub,
so that the same files give the same rows. `datasets` itself reads all other formats. It caches Hub data sets; if the
Hub cannot be reached, the cache is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.config import ColumnSection, SourceSection
from rlsys.config.relative_paths import HUB_NAME
from rlsys.data import row_fields
from rlsys.data.messages import Messages
from rlsys.data.row_files import FORMATS, Row, format_of, read_file
from rlsys.data.split_files import PLAIN_OPTIONS, Splits, error_text, in_our_formats, splits_of_folder
from rlsys.errors import ConfigError, did_you_mean
from rlsys.utils.text_files import first_line

if TYPE_CHECKING:
    import datasets

HUB_LIMIT_S = 10.0  # for the Hub's first response; later requests have the time limits of `datasets`


@dataclass(frozen=True, slots=True)
class Rows:
    """N usable rows of a data set."""

    prompts: tuple[str | Messages, ...]
    answers: tuple[str, ...]
    unusable: int  # number of rows left out because a column is neither a text nor a number
    why: str  # why the first unusable row was left out; "" if all rows are usable


def read_rows(source: SourceSection, columns: ColumnSection, key: str) -> Rows:
    """Read all rows in their order; `key` is the config key of the source, such as task.train, for error messages.

    Raises:
        ConfigError: the file, data set, split or column does not exist, cannot be read, or has no usable row.
    """
    path = Path(source.path)
    if path.exists():
        rows = _local(source, columns, path, key)
    elif HUB_NAME.fullmatch(source.path) and format_of(source.path) is None:
        rows = _hub(source, columns, key)
    else:
        raise ConfigError(
            f"{key}.path: no file or folder {source.path!r} on this machine; wanted an existing path, or the name of a "
            "data set on the Hugging Face Hub, such as openai/gsm8k"
        )
    usable = _as_text(rows, columns, f"{key}: {source.path}")
    if not usable.prompts:
        raise ConfigError(f"{key}: {source.path} has no usable row{f': {usable.why}' if usable.why else ''}")
    return usable


def _as_text(rows: Iterable[Row], columns: ColumnSection, where: str) -> Rows:
    prompts, answers, unusable, why = list[str | Messages](), list[str](), 0, ""
    seen, known = set[str](), dict[str, None]()  # requested columns that some row has; all column names
    for number, row in enumerate(rows):
        cells = {column: row_fields.value_at(row, column) for column in (columns.prompt, columns.answer)}
        seen.update(column for column, value in cells.items() if value is not row_fields.MISSING)
        if len(seen) < len(cells):
            known.update(dict.fromkeys(row_fields.names(row)))
        column = columns.prompt
        try:
            prompt = row_fields.question(_present(cells[column]))
            column = columns.answer
            answer = row_fields.text(_present(cells[column]))
        except row_fields.UnusableError as error:
            unusable += 1
            why = why or f"row {number}: {column} {str(error).replace('COLUMN', column)}"
            continue
        prompts.append(prompt)
        answers.append(answer)
    for column, name in ((columns.prompt, "prompt"), (columns.answer, "answer")):
        if known and column not in seen:
            raise ConfigError(
                f"task.columns.{name}: {where} has no column {column!r}; it has {', '.join(known)}"
                f"{did_you_mean(column, known)}"
            )
    return Rows(tuple(prompts), tuple(answers), unusable, why)


def _present(value: object) -> object:
    return None if value is row_fields.MISSING else value


def _local(source: SourceSection, columns: ColumnSection, path: Path, key: str) -> Iterator[Row]:
    """Read local files in place, without a copy in a cache."""
    if path.is_dir():
        return _folder(source, columns, path, key)
    if format_of(path.name) is None:
        raise ConfigError(
            f"{key}.path: found {path}; wanted a folder, or a file whose name ends in {', '.join(FORMATS)}"
        )
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
                f"{key}.path: {source.path!r} is not a file or folder on this machine, the Hugging Face Hub cannot be "
                f"reached ({problem}), and the Hub's cache has no copy; set {key}.path to a local file or folder with "
                f"the same rows ({', '.join(FORMATS)}), or download the data set on a machine with network access and "
                "copy its HF_HOME folder to this machine"
            ) from error


def _of_split(splits: Splits, source: SourceSection, columns: ColumnSection, where: str) -> Iterator[Row]:
    """Yield the rows of a split, of a part of a split (train[:10%]) or of several splits (train+test)."""
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
        parts = spec.to_absolute({name: len(split_rows) for name, split_rows in rows.items()})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: split {source.split!r}: {error}; it has {known}") from error
    return (row for part in parts for row in rows[part.splitname][part.from_ : part.to])


def _of_files(files: Sequence[tuple[Path, str]], columns: ColumnSection, where: str) -> Iterator[Row]:
    for path, name in files:
        yield from read_file(path, _roots(columns), f"{where}: {name}", name)


def _roots(columns: ColumnSection) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*row_fields.roots(columns.prompt), *row_fields.roots(columns.answer))))


def _splits_of_hub(source: SourceSection, where: str) -> Splits | None:
    """Like ``splits_of_folder``, for a data set on the Hub; downloads the files of all splits into the Hub's cache."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.path, name=source.subset)
        if not _is_plain(builder.config):
            return None
        manager = datasets.DownloadManager(base_path=builder.base_path)
        files = {str(split): [str(file) for file in urls] for split, urls in builder.config.data_files.items()}
        if in_our_formats({split: [(Path(url), url) for url in urls] for split, urls in files.items()}) is None:
            return None
        return {
            split: [(Path(path), Path(url).name) for path, url in zip(manager.download(urls), urls, strict=True)]
            for split, urls in files.items()
        }
    except Exception as error:  # the library and the network raise many types
        raise ConfigError(f"{where} cannot be read: {error_text(error)}") from error


def _is_plain(config: datasets.BuilderConfig) -> bool:
    """Return whether the README sets no option that changes how files are read, such as names of CSV columns."""
    if not config.data_files:
        return False
    plain = type(config)()
    options = [field.name for field in fields(config) if field.name not in (*PLAIN_OPTIONS, "name", "sep")]
    return all(getattr(config, name) == getattr(plain, name) for name in options)


def _snapshot(name: str) -> Path | None:
    """Return the cached files of a data set; None if the cache has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _out_of_reach(name: str, key: str) -> str | None:
    """Return why the Hub cannot be reached, after at most HUB_LIMIT_S; None if the Hub has the data set.

    Raises:
        ConfigError: the Hub responds that the data set does not exist.
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
        except Exception as error:  # the HTTP libraries raise many types; the error message includes the text
            problem.append(error)

    request = threading.Thread(target=ask, daemon=True)  # a DNS lookup may block longer than any HTTP timeout
    request.start()
    request.join(HUB_LIMIT_S)
    if not problem:
        return f"no response within {HUB_LIMIT_S:.0f} s"
    error = problem[0]
    if isinstance(error, RepositoryNotFoundError):
        raise ConfigError(
            f"{key}.path: {name!r} is neither a file or folder on this machine nor an accessible data set on the "
            "Hugging Face Hub; check the name, and log in with `hf auth login` if the data set is private or gated"
        )
    return None if error is None else first_line(error)


@contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` use only its cache: by default it tries the Hub six times first."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _read(where: str, *args: str, **options: str | bool | None) -> Iterator[Row]:
    import datasets

    try:
        rows: list[Row] = list(datasets.load_dataset(*args, **options))
    except Exception as error:  # the readers of `datasets` raise many types
        raise ConfigError(f"{where} cannot be read: {error_text(error)}") from error
    return iter(rows)
