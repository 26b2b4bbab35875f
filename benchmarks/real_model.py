"""Benchmarks on the real model: sampler, learner and a complete GRPO step, each against the usual alternative.

    make real-model
    python -m benchmarks.real_model --gsm8k ../gsm8k                 # about two hours; nothing else on the machine
    python -m benchmarks.real_model --only sampler learner --repeats 3
    python -m benchmarks.real_model --only grpo --trl-repeats 2 --trl-warmups 0

Three parts, one after the other, each in a separate process:

    sampler   the sampler actor against vLLM's LLM.generate           (benchmarks/sampler.py --models smollm2)
    learner   the learner against transformers + PEFT                 (benchmarks/learner.py --model smollm2)
    grpo      a GRPO step against TRL's GRPOTrainer                   (benchmarks/grpo_step.py --row smollm2)

Each has 8 prompts of 100 to 150 tokens with 8 completions of 200 tokens, in bfloat16, and writes its own rows. A step
of TRL takes about nine minutes, so TRL can have fewer turns than rlsys; the row has both numbers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.real import real_model

DTYPE = "bfloat16"
GROUP = 8  # completions of a prompt, in all three


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Part -> module and arguments."""
    common = ["--repeats", options.repeats, *(["--gsm8k", options.gsm8k] if options.gsm8k else [])]
    common += ["--tokens", options.tokens]
    problems = ["--problems", options.problems]
    threads = ["--threads", options.threads]
    trl = ["--trl-repeats", options.repeats if options.trl_repeats is None else options.trl_repeats]
    trl += ["--trl-warmups", options.trl_warmups]
    sampler = ["benchmarks.sampler", "--models", "smollm2", "--dtypes", DTYPE, *threads, *problems, *common]
    learner = ["benchmarks.learner", "--model", "smollm2", "--dtype", DTYPE, *threads, *common, "--profile"]
    learner += ["--datums", options.problems * GROUP]
    grpo = ["benchmarks.grpo_step", "--row", "smollm2", "--warmups", 1, *trl, *problems, *common]
    every = {"sampler": sampler, "learner": learner, "grpo": grpo}
    return {name: [str(word) for word in every[name]] for name in options.only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("sampler", "learner", "grpo")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trl-repeats", type=int, help="default: as --repeats")
    parser.add_argument("--trl-warmups", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of sampler and learner; grpo has always two")
    parser.add_argument("--problems", type=int, default=8, help="of a step or repetition, each with 8 completions")
    parser.add_argument("--tokens", type=int, default=200, help="of a completion")
    parser.add_argument("--gsm8k", type=Path, help="folder with its train.jsonl and test.jsonl; default: arithmetic")
    options = parser.parse_args()
    real_model()
    failed = []
    for name, command in commands(options).items():
        began = time.monotonic()
        print(f"== {name}: python -m {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command]).returncode
        print(
            f"== {name}: {'done' if code == 0 else f'ended with {code}'}, {time.monotonic() - began:.0f} s", flush=True
        )
        failed += [name] if code else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
