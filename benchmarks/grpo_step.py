"""Seconds of one complete GRPO step: rlsys against TRL's GRPOTrainer, alternating on the same cores.

    python -m benchmarks.grpo_step --row tiny [--trl .bench]      # also: tiny-fp32, 54m
    python -m benchmarks.grpo_step --row smollm2 --gsm8k ../gsm8k --repeats 5 --trl-repeats 2   # the real model

Each side is a separate process that makes one step per turn. A step lasts until the start of the next one: sampling,
rewards, advantages, loss and gradient, AdamW, and for rlsys the transfer of the adapter to the engine with its
attestation. rlsys is a job as run by `rlsys train`. TRL generates with transformers' generate: with use_vllm (colocate)
on vLLM 0.32 for CPU it was seen to fail in load_weights, when it transfers its weights ("'Parameter' object has no
attribute 'weight_loader'"), and its server mode needs CUDA for the transfer.

Held equal: model folder, dtype of the frozen base (adapters in float32), cores, prompts and their order, 16 prompts per
step (8 for smollm2) with 8 completions of full length (the end token is outside of the vocabulary; lengths are checked
on both sides), temperature 1 without top-p and top-k, reward, group-normalised advantages, PPO clip at 0.2, mean over
each completion's tokens, no KL, one AdamW step, LoRA of rank 16 on the seven linear modules, learning rate, gradient
clipping, no evaluation, checkpoint or wandb in between. The step of rlsys includes the sampler's log-probability of
each token and the ratio p / q.

A side may make fewer steps than the other (--trl-repeats, --trl-warmups); it makes the first ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.grpo_task import prompts
from benchmarks.real import PROMPT_TOKENS, described, prompts_of, real_model, write_endless
from benchmarks.rows import Row, Target, by_turns, finish
from benchmarks.shapes import DTYPES, S54, TINY, write_model
from benchmarks.sides import Side
from rlsys.data.problems import Epochs
from rlsys.run_state.jsonl import read_metrics

ROOT = Path(__file__).parents[1]
GROUP = 8
RUN = "grpo-step"
POOL = 512  # prompts, in the same order on both sides
THREADS = 2
LEARNING_RATE, RANK, ALPHA = 1e-4, 16, 32.0


@dataclass(frozen=True, slots=True)
class Case:
    """`shape`: of random weights; None: the real model. `words`: of a prompt, uniformly; of the real model, tokens.
    `micro_batch`: completions of one backward of TRL's, which with 128 of the 54M model runs out of 24 GiB."""

    title: str
    shape: dict[str, int] | None
    dtype: str
    words: tuple[int, int]
    max_tokens: int
    target: float
    micro_batch: int
    prompts: int = 16
    reward: str = "share_of_even"

    @property
    def step_tokens(self) -> int:
        """Number of tokens in a step's completions."""
        return self.prompts * GROUP * self.max_tokens


CASES = {
    "tiny": Case("2.9M model, 32 tokens", TINY, "bfloat16", (24, 40), 32, 1.5, 128),
    "tiny-fp32": Case("2.9M model, 32 tokens, float32", TINY, "float32", (24, 40), 32, 1.5, 128),
    "54m": Case("54M model, 128 tokens", S54, "bfloat16", (80, 120), 128, 2.0, 16),
    "smollm2": Case(
        "SmolLM2-135M-Instruct, 200 tokens", None, "bfloat16", PROMPT_TOKENS, 200, 8.0, 8, 8, "share_of_vowels"
    ),
}


@dataclass(frozen=True, slots=True)
class Given:
    """Input of both sides: the model folder, and problems as texts for TRL and as a task for rlsys."""

    model: Path
    about_model: Mapping[str, Any]
    about_prompts: str
    texts: Sequence[str]
    task: Mapping[str, Any]  # keys of the job


def given(case: Case, folder: Path, gsm8k: Path | None) -> Given:
    if case.shape is None:
        base = real_model()
        found = prompts_of(base, gsm8k, case.words)
        questions = list(found.problems.prompts[:POOL])
        (folder / "questions.json").write_text(json.dumps(questions))
        task = {
            "task.name": "benchmarks.grpo_task:Questions",
            "task.options": {"file": str(folder / "questions.json"), "reward": case.reward},
            "prompt.chat": False,
            "prompt.template": found.template,
        }
        texts = [found.template.replace("{prompt}", question) for question in questions]
        model = write_endless(base, folder / "model")
        return Given(model, described(base), f"{case.prompts} a step, {found.about}", texts, task)
    options = options_of_prompts(case)
    task = {"task.name": "benchmarks.grpo_task:RandomWords", "task.options": options}
    about = f"{case.prompts} of {case.words[0]} to {case.words[1]} tokens"
    return Given(folder_of_model(case, folder / "model"), case.shape, about, prompts(**options), task)


def folder_of_model(case: Case, folder: Path) -> Path:
    """Write a random model with a tokenizer whose words are numbers, and an end token that is never sampled."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert case.shape is not None
    write_model(folder, case.shape, case.dtype)
    size = case.shape["vocab_size"]
    numbers = {str(i): i for i in range(1, size)}
    words = Tokenizer(models.WordLevel({"<pad>": 0, **numbers, "</s>": size}, unk_token="1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**fields, "eos_token_id": None}))
    return folder


def options_of_prompts(case: Case) -> dict[str, int]:
    assert case.shape is not None
    shortest, longest = case.words
    return {"count": POOL, "shortest": shortest, "longest": longest, "vocabulary": case.shape["vocab_size"]}


def job(case: Case, both: Given, folder: Path, steps: int, changes: list[str]) -> list[str]:
    """The job, as overrides of an empty configuration."""
    set_to: dict[str, Any] = {
        "run.name": RUN,
        "run.dir": str(folder),
        "model.path": str(both.model),
        "model.dtype": case.dtype,
        "model.max_length": case.words[1] + case.max_tokens,
        **both.task,
        "lora.rank": RANK,
        "lora.alpha": ALPHA,
        "learner.threads": THREADS,
        "sampler.threads": THREADS,
        "rl.steps": steps,
        "rl.problems_per_step": case.prompts,
        "rl.samples_per_problem": GROUP,
        "rl.sampling.max_tokens": case.max_tokens,
        "rl.sampling.stop": [],  # the model's end token is never sampled
        "rl.loss.name": "ppo",
        "rl.loss.params": {"clip_ratio": 0.2},
        "rl.advantages.normalise": "std",
        "rl.advantages.aggregate": "length",
        "rl.optim.learning_rate": LEARNING_RATE,
        "rl.optim.warmup_steps": 0,
        "rl.optim.beta2": 0.999,
        "rl.optim.eps": 1e-8,
        "eval.every_steps": 0,
        "eval.max_tokens": min(8, case.max_tokens),
        "checkpoint.every_steps": 10_000,
        "tracking.wandb": "disabled",
    }
    return [f"{key}={json.dumps(value)}" for key, value in set_to.items()] + changes


def in_trl(case: Case, both: Given, folder: Path, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments of benchmarks.trl_side."""
    order = Epochs(len(both.texts), case.prompts, seed=0).take(0, steps * case.prompts).tolist()
    return {
        "model": str(both.model),
        "folder": str(folder),
        "prompts": [both.texts[i] for i in order],
        "reward": case.reward,
        "steps": steps,
        "threads": THREADS,
        "dtype": case.dtype,
        "autocast": False,
        "completions": case.prompts * GROUP,
        "group": GROUP,
        "max_tokens": case.max_tokens,
        "micro_batch": case.micro_batch,
        "learning_rate": LEARNING_RATE,
        "rank": RANK,
        "alpha": ALPHA,
        "more": {},
        **changes,
    }


def install_trl(folder: Path) -> Path:
    """Install only TRL, on top of the installed libraries, so that both sides use the same ones."""
    if not (folder / "trl").exists():
        wanted = ROOT / "requirements" / "bench.txt"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "-r"]
        subprocess.run([*command, str(wanted)], check=True)
    return folder


def run(
    case: Case, both: Given, options: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[float]], dict[str, Side]]:
    repeats, warmups = counts(options)
    steps = {name: warmups[name] + repeats[name] for name in repeats}
    env = {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    for_trl = in_trl(case, both, folder / "trl", steps["TRL"], json.loads(options.trl_set))
    commands = {
        "TRL": [sys.executable, "-m", "benchmarks.trl_side", str(folder / "trl.json")],
        "rlsys": [
            sys.executable, "-m", "benchmarks.rlsys_side",
            *job(case, both, folder / "runs", steps["rlsys"], options.set),
        ],
    }  # fmt: skip
    (folder / "trl.json").write_text(json.dumps(for_trl))
    envs = {
        "TRL": {**env, "PYTHONPATH": f"{install_trl(options.trl)}:{ROOT}", "OMP_NUM_THREADS": str(THREADS)},
        "rlsys": {**env, "RAY_AUTH_MODE": "disabled"},
    }
    sides: dict[str, Side] = {}
    try:
        for name in options.only or commands:
            sides[name] = Side(name, commands[name], folder / f"{name}.log", envs[name])
        for side in sides.values():
            side.ready()
        times = by_turns({name: side.step for name, side in sides.items()}, repeats, warmups)
    finally:
        for side in sides.values():
            side.close()
    require_full_lengths(case, sides, folder / "runs" / RUN)
    return times, sides


def counts(options: argparse.Namespace) -> tuple[dict[str, int], dict[str, int]]:
    """(repetitions, warm-ups) of each side."""
    ours, before = options.repeats, options.warmups
    theirs = ours if options.trl_repeats is None else options.trl_repeats
    before_theirs = before if options.trl_warmups is None else options.trl_warmups
    return {"TRL": theirs, "rlsys": ours}, {"TRL": before_theirs, "rlsys": before}


def require_full_lengths(case: Case, sides: Mapping[str, Side], run_dir: Path) -> None:
    """Check that every completion of every step has the full length, on both sides."""
    found: dict[str, list[float]] = {}
    if "TRL" in sides:
        found["TRL"] = [turn["mean_length"] * case.prompts * GROUP for turn in sides["TRL"].turns]
    if "rlsys" in sides:
        lines = [line for line in read_metrics(run_dir) if "sampler/completion_tokens" in line]
        found["rlsys"] = [line["sampler/completion_tokens"] for line in lines]
    for name, tokens in found.items():
        if not tokens or set(tokens) != {float(case.step_tokens)}:
            raise SystemExit(
                f"{name}: found {tokens} completion tokens in its steps; wanted {case.step_tokens} in each"
            )


def middle(side: Side, warmups: int) -> dict[str, float]:
    """Medians of the times that a side reported for its steps."""
    turns = side.turns[warmups:]
    return {key: round(median(turn[key] for turn in turns), 4) for key in turns[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=CASES, default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--trl-repeats", type=int, help="default: as --repeats")
    parser.add_argument("--trl-warmups", type=int, help="default: as --warmups")
    parser.add_argument("--gsm8k", type=Path, help="folder with its train.jsonl and test.jsonl, for smollm2")
    parser.add_argument("--problems", type=int, help="of a step, in the place of the row's own number")
    parser.add_argument("--tokens", type=int, help="of a completion, in the place of the row's own number")
    parser.add_argument("--trl", type=Path, default=ROOT / ".bench", help="where TRL is, or is installed to")
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the job")
    parser.add_argument("--trl-set", default="{}", help="JSON over the arguments of benchmarks.trl_side")
    parser.add_argument("--only", action="append", choices=("TRL", "rlsys"))
    options = parser.parse_args()
    gsm8k = None if options.gsm8k is None else options.gsm8k.resolve()
    os.chdir(ROOT)
    case = CASES[options.row]
    case = replace(case, max_tokens=options.tokens or case.max_tokens, prompts=options.problems or case.prompts)
    if case.dtype not in DTYPES:
        print(f"grpo-{options.row}: left out: no kernels for {case.dtype} here (python -m benchmarks.precision)")
        return
    with tempfile.TemporaryDirectory(prefix="grpo-step-") as scratch:
        both = given(case, Path(scratch), gsm8k)
        times, sides = run(case, both, options, Path(scratch))
    repeats, warmups = counts(options)
    parts = {name: middle(side, warmups[name]) for name, side in sides.items()}
    if options.only:
        print(json.dumps({"seconds": times, "parts": parts}, indent=1))
        return
    row = Row(
        name=f"grpo-{options.row}",
        title=f"one GRPO step, {case.title}",
        command=f"python -m benchmarks.grpo_step --row {options.row}",
        unit="s",
        sides=times,
        targets=[Target("TRL", "rlsys", case.target, ">=")],
        equal={
            "model": both.about_model,
            "dtype": f"{case.dtype} base, float32 adapter",
            "threads": THREADS,
            "prompts": both.about_prompts,
            "completions": f"{GROUP} of {case.max_tokens} tokens each",
            "completion tokens of a step": case.step_tokens,
            "lora_rank": RANK,
        },
        more={
            "parts": parts,
            "repetitions": repeats,
            "warm-ups": warmups,
            "TRL: completions of a backward pass": case.micro_batch,
        },
    )
    finish(row)


if __name__ == "__main__":
    main()
