"""The files of a folder that are the splits of a data set, as `datasets` deals them out: by names, or by README.md."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.config import SourceSection
from rlsys.data.row_files import FORMATS, format_of
from rlsys.errors import ConfigError, did_you_mean
from rlsys.utils.text_files import first_line, plain_path, read_text

PLAIN_OPTIONS = {"data_files", "data_dir", "default", "description", "version", "features"}  # of a README's config
_OF_SAVE_TO_DISK = ("state.json", "dataset_dict.json")

Splits = Mapping[str, Sequence[tuple[Path, str]]]  # the files of each, and their own names


def splits_of_folder(source: SourceSection, folder: Path, key: str) -> Splits | None:
    """As `datasets` deals the files of a folder out to splits; None where they are of a format of the library's.

    Raises:
        ConfigError: the folder holds no data set, or not this subset of one.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns, sanitize_patterns

    where = f"{key}: {folder}"
    if any((folder / name).is_file() for name in _OF_SAVE_TO_DISK):
        raise ConfigError(
            f"{where} was written by save_to_disk; wanted {', '.join(FORMATS)}, such as "
            "datasets.load_from_disk(folder).to_parquet('train.parquet') writes (of a DatasetDict, each split)"
        )
    options = _options_of_folder(source, folder, where)
    if options.keys() - PLAIN_OPTIONS:
        return None
    root = (folder / (options.get("data_dir") or "")).resolve()
    with plain_path(root) as plain:
        base, named = glob.escape(str(plain)), options.get("data_files")
        try:
            patterns = get_data_patterns(base) if named is None else sanitize_patterns(named)
            files = {str(split): _resolved(of_split, base) for split, of_split in patterns.items()}
        except EmptyDatasetError:
            raise ConfigError(f"{where} holds no files of rows; wanted some that end in {', '.join(FORMATS)}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: its README.md names files that are not there: {said(error)}") from error
        kept = _of_one_format(files, where)
    if kept is None:
        return None
    names = {split: [str(Path(file).relative_to(plain)) for file in found] for split, found in kept.items()}
    return {split: [(root / name, name) for name in found] for split, found in names.items()}


def _resolved(patterns: Sequence[str], base: str) -> list[str]:
    """Files in the order of the patterns, as the library has them.

    Raises:
        FileNotFoundError: none is there, or not one that is named.
    """
    from datasets.data_files import resolve_pattern

    found = dict[str, None]()
    for pattern in patterns:
        try:
            found.update(dict.fromkeys(map(str, resolve_pattern(pattern, base))))
        except FileNotFoundError:
            if not glob.has_magic(pattern):
                raise
    if not found:
        raise FileNotFoundError(f"no file matches {', '.join(patterns)}")
    return list(found)


def _of_one_format(files: Mapping[str, Sequence[str]], where: str) -> Mapping[str, Sequence[str]] | None:
    """The files of the format that `datasets` reads of them; None where it is none of ours."""
    from datasets.load import infer_module_for_data_files

    plain = {split: [file.replace("::", "__") for file in found] for split, found in files.items()}
    try:
        module, _ = infer_module_for_data_files(plain)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {said(error)}") from error
    endings = [ending for ending, kind in FORMATS.items() if module == ("csv" if kind == "tsv" else kind)]
    kept = {
        split: [file for file in found if set(map(str.lower, Path(file).suffixes)).intersection(endings)]
        for split, found in files.items()
    }
    every = [file for found in kept.values() for file in found]
    return kept if every and all(map(format_of, every)) else None


def _options_of_folder(source: SourceSection, folder: Path, where: str) -> Mapping[str, Any]:
    """What the folder's README.md says of the subset, as on the Hub."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    content = read_text(card, f"{where.partition(':')[0]}: {card}") if card.is_file() else ""
    try:
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard(content).data if content[:3] == "---" else {})
        named = source.subset or (subsets.get_default_config_name() if subsets else None)
    except Exception as error:  # of a library that reads whatever the README says
        raise ConfigError(f"{where}: its README.md cannot be read: {said(error)}") from error
    if not subsets and source.subset in (None, "default"):
        return {}
    if not subsets:
        raise ConfigError(f"{where} has no subset {source.subset!r}; its README.md names none")
    if named not in subsets:
        key, known = f"{where.partition(':')[0]}.subset", ", ".join(subsets)
        if source.subset is None:
            raise ConfigError(f"{where} has several subsets; set {key} to one of {known}")
        raise ConfigError(f"{where} has no subset {named!r} ({key}); it has {known}{did_you_mean(named, subsets)}")
    options: Mapping[str, Any] = subsets[named]
    return options


def in_our_formats(splits: Splits) -> Splits | None:
    kinds = [format_of(name) for files in splits.values() for _, name in files]
    return None if None in kinds else splits


def said(error: BaseException) -> str:
    """What a library says, which may list over several lines what there is."""
    return " ".join(str(error).split()) or first_line(error)
