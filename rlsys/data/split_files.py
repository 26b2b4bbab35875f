"""Finds the files of each split in a data set's folder, by the rules of `datasets`: by file name or by README.md."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlsys.config import SourceSection
from rlsys.data.row_files import FORMATS, format_of
from rlsys.errors import ConfigError, did_you_mean
from rlsys.utils.text_files import first_line, plain_path, read_text

# Options in README.md that do not change how files are read.
PLAIN_OPTIONS = {"data_files", "data_dir", "default", "description", "version", "features"}
_SAVE_TO_DISK_FILES = ("state.json", "dataset_dict.json")

Splits = Mapping[str, Sequence[tuple[Path, str]]]  # split -> its files, each as (path, original file name)


def splits_of_folder(source: SourceSection, folder: Path, key: str) -> Splits | None:
    """Return the files of each split in a folder; None if only `datasets` can read their format.

    Raises:
        ConfigError: the folder contains no data set, or not the subset `source.subset`.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns, sanitize_patterns

    where = f"{key}: {folder}"
    if any((folder / name).is_file() for name in _SAVE_TO_DISK_FILES):
        raise ConfigError(
            f"{where} was written by save_to_disk; wanted files in {', '.join(FORMATS)}: convert the data set with "
            "datasets.load_from_disk(folder).to_parquet('train.parquet'), or each split of a DatasetDict"
        )
    options = _options_of_folder(source, folder, where)
    if options.keys() - PLAIN_OPTIONS:
        return None
    root = (folder / str(options.get("data_dir") or "")).resolve()
    with plain_path(root) as plain:
        base, named = glob.escape(str(plain)), options.get("data_files")
        try:
            patterns = get_data_patterns(base) if named is None else sanitize_patterns(named)
            files = {str(split): _resolved(of_split, base) for split, of_split in patterns.items()}
        except EmptyDatasetError:
            raise ConfigError(
                f"{where} contains no data files; wanted files whose names end in {', '.join(FORMATS)}"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: its README.md names files that do not exist: {error_text(error)}") from error
        kept = _of_one_format(files, where)
    if kept is None:
        return None
    names = {split: [str(Path(path).relative_to(plain)) for path in paths] for split, paths in kept.items()}
    return {split: [(root / name, name) for name in of_split] for split, of_split in names.items()}


def _resolved(patterns: Sequence[str], base: str) -> list[str]:
    """Return the files that match, in the order of the patterns, as `datasets` does.

    Raises:
        FileNotFoundError: no file matches, or a file named without a wildcard does not exist.
    """
    from datasets.data_files import resolve_pattern

    paths = dict[str, None]()
    for pattern in patterns:
        try:
            paths.update(dict.fromkeys(map(str, resolve_pattern(pattern, base))))
        except FileNotFoundError:
            if not glob.has_magic(pattern):
                raise
    if not paths:
        raise FileNotFoundError(f"no file matches {', '.join(patterns)}")
    return list(paths)


def _of_one_format(files: Mapping[str, Sequence[str]], where: str) -> Mapping[str, Sequence[str]] | None:
    """Return the files of the format that `datasets` infers for the folder; None if rlsys cannot read that format."""
    from datasets.load import infer_module_for_data_files

    plain = {split: [path.replace("::", "__") for path in paths] for split, paths in files.items()}
    try:
        module, _ = infer_module_for_data_files(plain)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error_text(error)}") from error
    endings = [ending for ending, kind in FORMATS.items() if module == ("csv" if kind == "tsv" else kind)]
    kept = {
        split: [path for path in paths if set(map(str.lower, Path(path).suffixes)).intersection(endings)]
        for split, paths in files.items()
    }
    all_paths = [path for paths in kept.values() for path in paths]
    return kept if all_paths and all(map(format_of, all_paths)) else None


def _options_of_folder(source: SourceSection, folder: Path, where: str) -> Mapping[str, object]:
    """Return the options of the subset in the folder's README.md, as on the Hub."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    content = read_text(card, f"{where.partition(':')[0]}: {card}") if card.is_file() else ""
    try:
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard(content).data if content[:3] == "---" else {})
        subset = source.subset or (subsets.get_default_config_name() if subsets else None)
    except Exception as error:  # a malformed README makes the library raise many types
        raise ConfigError(f"{where}: its README.md cannot be read: {error_text(error)}") from error
    if not subsets and source.subset in (None, "default"):
        return {}
    if not subsets:
        raise ConfigError(f"{where} has no subset {source.subset!r}; its README.md defines no subsets")
    if subset not in subsets:
        key, known = f"{where.partition(':')[0]}.subset", ", ".join(subsets)
        if source.subset is None:
            raise ConfigError(f"{where} has several subsets; set {key} to one of {known}")
        raise ConfigError(f"{where} has no subset {subset!r} ({key}); it has {known}{did_you_mean(subset, subsets)}")
    options: Mapping[str, object] = subsets[subset]
    return options


def in_our_formats(splits: Splits) -> Splits | None:
    """Return `splits` if rlsys can read the format of every file, else None."""
    kinds = [format_of(name) for files in splits.values() for _, name in files]
    return None if None in kinds else splits


def error_text(error: BaseException) -> str:
    """Return a library's error message on one line; some messages list the valid choices over several lines."""
    return " ".join(str(error).split()) or first_line(error)
