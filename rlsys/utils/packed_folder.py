"""Packs a model folder for nodes without a shared file system.

``pack_folder`` and ``unpack_folder`` convert a folder to named bytes with a manifest of hashes, and back. Folders are
created atomically.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from rlsys.errors import CheckpointError
from rlsys.utils.atomic_files import new_folder

MANIFEST = "rlsys-manifest.txt"  # one line "<hash>  <name>" per file, sorted by name


def pack_folder(path: Path) -> dict[str, bytes]:
    """Relative name -> content of every file below `path`, and a manifest. Symbolic links are followed."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; wanted the folder of a model")
    files = {name: file.read_bytes() for name, file in _files_under(path).items() if name != MANIFEST}
    if not files:
        raise CheckpointError(f"{path}: found an empty folder; wanted the files of a model")
    return {**files, MANIFEST: _manifest(files)}


def unpack_folder(files: Mapping[str, bytes], path: Path) -> None:
    """Write the result of ``pack_folder`` to `path`. Several processes can do this concurrently; a folder with the same
    content is kept.

    Raises:
        CheckpointError: a file name leaves `path`, the content does not match the manifest, or `path` exists with other
            content.
    """
    contents = {name: content for name, content in files.items() if name != MANIFEST}
    for name in contents:
        _check_name(name)
    if files.get(MANIFEST) != _manifest(contents):
        raise CheckpointError(f"{path}: the packed files do not match their manifest; pack the folder again")
    if not path.exists():
        try:
            with new_folder(path) as folder:
                for name, content in files.items():
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
            return
        except FileExistsError:
            pass  # another process was faster; its folder is compared below
    found = _files_under(path)
    if found.keys() != files.keys() or any(found[name].read_bytes() != files[name] for name in found):
        raise CheckpointError(f"{path}: found a folder with other content; remove it, or unpack elsewhere")


def _files_under(path: Path) -> dict[str, Path]:
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}


def _manifest(files: Mapping[str, bytes]) -> bytes:
    digests = {name: hashlib.blake2b(content, digest_size=16).hexdigest() for name, content in files.items()}
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(files)).encode()


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    plain = str(pure) == name and name.isprintable() and "\\" not in name
    if not plain or pure.is_absolute() or ".." in pure.parts or name == ".":
        raise CheckpointError(f"packed file {name!r}: the name leaves the folder, or is not a plain relative path")
