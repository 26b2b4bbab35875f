"""What recipes of tinker-cookbook load by name from a hub, laid out on the disk: a tokenizer, and data sets.

The tokenizer lies in the hub's cache. `datasets` takes a folder of the working directory before the hub's repository of
that name; so a recipe runs in this folder.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.serve.tiny_base import SPELLED, STRAWBERRY, gsm8k_question

REVISION = "0" * 40
ANSWER = 2  # the same for each question, so that a recipe of RL has something to find
ROWS = 64


def prepare(folder: Path, base: str, name: str) -> dict[str, str]:
    """Environment variables of a recipe that runs in `folder` and knows the tokenizer of `base` as `name`."""
    cached = folder / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = cached / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(REVISION)
    for file in Path(base).glob("*.json"):
        shutil.copy(file, snapshot)
    rng = random.Random(3)
    questions = [gsm8k_question(rng) for _ in range(ROWS)]
    gsm8k = [{"question": each, "answer": f"He buys {ANSWER}.\n#### {ANSWER}"} for each in questions]
    data_set(folder / "openai/gsm8k", "main", {"train": gsm8k, "test": gsm8k[:4]})
    chat = [
        {"messages": [{"role": "user", "content": each}, {"role": "assistant", "content": f"\\boxed{{{ANSWER}}}"}]}
        for each in questions
    ]
    data_set(folder / "HuggingFaceH4/no_robots", "default", {"train": chat, "test": chat[:4]})
    pairs = [
        {
            kind: f"\n\nHuman: {each}\n\nAssistant: \\boxed{{{answer}}}"
            for kind, answer in (("chosen", 2), ("rejected", 3))
        }
        for each in [*questions, STRAWBERRY, SPELLED]
    ]
    data_set(folder / "Anthropic/hh-rlhf", "default", {"train": pairs, "test": pairs[:4]})
    return {"HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub")}


def data_set(folder: Path, configuration: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """A repository of a data set: files, and a card that says which belong to which split."""
    folder.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text(lines(rows))
        files.append(f"  - split: {split}\n    path: {split}.jsonl\n")
    card = f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(card)


def lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
