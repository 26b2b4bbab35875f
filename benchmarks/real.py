"""The pretrained model of the benchmarks, and its prompts.

SmolLM2-135M-Instruct from `make real-model`. Questions are GSM8K's if a folder with its train.jsonl and test.jsonl is
given, else those of the arithmetic task. They are rendered with the model's chat template, and only prompts of
PROMPT_TOKENS are used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.real_model import FOLDER, WEIGHTS, Unavailable, verify
from rlsys import tasks
from rlsys.config import PromptSection, SourceSection, TaskSection
from rlsys.data.problems import Problem, ProblemSet, encode
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import load_tokenizer

INSTRUCTION = "{prompt}\nReason step by step, and put the final answer in \\boxed{}."
PROMPT_TOKENS = (100, 150)
NEVER = "<|never|>"
CONFIGS = ("config.json", "generation_config.json")
DIMENSIONS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompts:
    """Problems with the model's prompts. `template`: the chat template's own text around a question."""

    source: str
    template: str
    problems: ProblemSet  # `prompts` holds only the questions

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        offsets = self.problems.prompt_offsets
        return [int(length) for length in offsets[1:] - offsets[:-1]]

    @property
    def about(self) -> str:
        return f"{self.source}, in the model's chat template, {min(self.lengths)} to {max(self.lengths)} tokens"


def real_model(folder: Path = FOLDER) -> Path:
    """The model folder, checked for the pinned weights; without it the benchmark ends."""
    try:
        verify(folder)
    except Unavailable as error:
        raise SystemExit(f"{error}; `make real-model` brings the model") from None
    return folder


def described(folder: Path) -> dict[str, Any]:
    """Name and dimensions, for a row."""
    config = json.loads((folder / "config.json").read_text())
    return {"name": folder.name, **{name: config[name] for name in DIMENSIONS if name in config}}


def prompts_of(folder: Path, gsm8k: Path | None, span: tuple[int, int] = PROMPT_TOKENS) -> Prompts:
    """All training problems whose prompts have span[0] to span[1] tokens, in order."""
    if gsm8k is None:
        source = "arithmetic task, 6 to 9 operations"
        section = TaskSection(name="arithmetic", min_operations=6, max_operations=9, train_problems=1024)
    else:
        source = "GSM8K's training set"
        train, held_out = (SourceSection(path=str(gsm8k / f"{part}.jsonl")) for part in ("train", "test"))
        section = TaskSection(name="gsm8k", train=train, eval=held_out)
    renderer = Renderer(load_tokenizer(folder), PromptSection(template=INSTRUCTION))
    known = tasks.build(section, 0).problems("train")
    rows = list(zip(known, renderer.ids_of_each([problem.prompt for problem in known]), strict=True))
    kept = [(problem, ids) for problem, ids in rows if span[0] <= len(ids) <= span[1]]
    if not kept:
        lengths = sorted(len(ids) for _, ids in rows)
        raise SystemExit(f"{source}: prompts have {lengths[0]} to {lengths[-1]} tokens; wanted {span[0]} to {span[1]}")
    tokens = [ids for _, ids in kept]
    problems: Sequence[Problem] = [problem for problem, _ in kept]
    return Prompts(source, renderer.render("{prompt}"), encode(problems, lambda _: tokens))


def write_endless(model: Path, out: Path) -> Path:
    """A copy of the model that nothing ends: no end token in its configuration, and a tokenizer whose end token lies
    beyond the embedding, so that the model never writes it. Its tokenizer has no chat template, which would name one.
    """
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"eos_token": NEVER})
    tokenizer.chat_template = None
    tokenizer.save_pretrained(out)
    for name in CONFIGS:
        fields = json.loads((model / name).read_text())
        (out / name).write_text(json.dumps({**fields, "eos_token_id": None}))
        if "vocab_size" in fields and tokenizer.eos_token_id < fields["vocab_size"]:
            raise SystemExit(
                f"{model}: the embedding has a row for {NEVER}; wanted an end token that cannot be sampled"
            )
    shutil.copyfile(model / WEIGHTS, out / WEIGHTS)
    return out
