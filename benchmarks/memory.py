"""Predicted against measured memory of each role: ``python -m benchmarks.memory [CONFIG [KEY=VALUE...]]``.

Without arguments: the quickstart, a 54M-parameter Qwen3 with short sequences, and the same with a vocabulary of
151,936. Predictions are printed before the run starts. Measured is the peak resident size (VmHWM) of the learner, and
of the sampler with its engine, minus that of a process that has only imported the same modules.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
POLL_S = 0.1
MIB = 2**20
ROLES = {"ray::LearnerActor": "learner", "ray::SamplerActor": "sampler", "VLLM::EngineCore": "engine"}
OTHERS = {"ray::RewardActor": "rewards", "ray::GroupAdvantageActor": "advantages"}
HOST = "rlsys host of sampler"  # the last argument of a sampler's host process
IMPORTS = {
    "learner": "ray actors.learner_actor rlsys.learner.learner rlsys.learner.policy rlsys.bootstrap.supervised "
    "rlsys.modeling.base_model "
    "transformers.models.qwen3.modeling_qwen3",
    "sampler": "ray actors.sampler_actor rlsys.weight_sync.update",
    "host": "vllm.v1.engine.async_llm vllm.v1.engine.core rlsys.sampler.vllm.cpu_worker rlsys.sampler.engine "
    "rlsys.environments.multi_turn",
    "engine": "vllm.v1.engine.async_llm vllm.v1.engine.core rlsys.sampler.vllm.cpu_worker "
    "rlsys.sampler.vllm.adapter_worker "
    "vllm.model_executor.models.qwen3",
}
SMALL_MODEL = {
    "hidden_size": 640,
    "num_hidden_layers": 11,
    "num_attention_heads": 20,
    "num_key_value_heads": 10,
    "head_dim": 32,
    "intermediate_size": 1920,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SMALL_JOB: dict[str, dict[str, Any]] = {
    "run": {"name": "memory", "seed": 1},
    "model": {"dtype": "float32", "max_length": 128},
    "task": {"train_problems": 256, "eval_problems": 32},
    "learner": {"token_budget": 2048, "logprob_chunk_tokens": 1024},
    "sampler": {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_gb": 0.5},
    "rewards": {
        "function": "benchmarks.memory:toss"
    },  # a random model is never correct; equal rewards give no gradient
    "rl": {"steps": 3, "problems_per_step": 16, "samples_per_problem": 4, "sampling": {"max_tokens": 32}},
    "eval": {"every_steps": 0, "max_tokens": 32},
    "tracking": {"wandb": "disabled"},
}


def toss(completion: str, answer: str) -> float:
    return float(os.urandom(1)[0] % 2)


def write_model(out: Path, vocab_size: int | None) -> Path:
    """A random model of SMALL_MODEL's dimensions with the task's tokenizer; None: that tokenizer's vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlsys import tasks
    from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
    from rlsys.config import TaskSection

    task = tasks.build(TaskSection(), 0)
    assert isinstance(task, tasks.TeachableTask)
    tokenizer = build_tokenizer([prompt + answer for prompt, answer in task.supervised_examples(3000, 0.5, 0)], 320)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=vocab_size or len(tokenizer), dtype="float32", **SMALL_MODEL, **ends)
    ).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def imported(modules: str) -> dict[str, int]:
    """Resident bytes of a new process that imports these modules."""
    script = f"import importlib\nfor name in {modules.split()!r}: importlib.import_module(name)\n" + (
        "print(open('/proc/self/status').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=_environment(), capture_output=True, text=True, check=True
    )
    return _status(done.stdout)


def run(config: Path, overrides: Sequence[str], keep_log: Path) -> dict[str, dict[str, int]]:
    """Peaks per role while the job runs, in bytes: VmHWM and the highest RssAnon, RssFile and RssShmem seen."""
    peaks: dict[str, dict[str, int]] = {}
    with keep_log.open("w") as log:
        command = [sys.executable, "-m", "rlsys", "train", str(config), *overrides]
        driver = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log)
        while driver.poll() is None:
            for process in _descendants(driver.pid):
                _look(process, peaks)
            time.sleep(POLL_S)
    if driver.returncode:
        raise SystemExit(f"the job failed ({driver.returncode}):\n{keep_log.read_text()[-3000:]}")
    return peaks


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _look(process: psutil.Process, peaks: dict[str, dict[str, int]]) -> None:
    try:
        title = " ".join(process.cmdline())
        role = next((role for name, role in (ROLES | OTHERS).items() if title.startswith(name)), None)
        role = "host" if HOST in title else role
        if role is None:
            return
        found = _status(Path(f"/proc/{process.pid}/status").read_text())
    except (psutil.Error, OSError):
        return
    seen = peaks.setdefault(role, {})
    for name, value in found.items():
        seen[name] = max(seen.get(name, 0), value)


def _status(text: str) -> dict[str, int]:
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def compare(
    name: str, config: Path, overrides: Sequence[str], scratch: Path, before: dict[str, dict[str, int]]
) -> list[str]:
    """Predict, run, and one row per role: predicted, measured, difference."""
    from rlsys.architectures.model_shape import model_shape
    from rlsys.config import load_config
    from rlsys.planning.memory import learner_memory, sampler_memory

    job = load_config(config, overrides)
    dims = model_shape(job.model)
    predicted = {"learner": learner_memory(job, dims).peak, "sampler": sampler_memory(job, dims).peak}
    for role, peak in predicted.items():
        parts = ", ".join(f"{part} {size / MIB:.0f}" for part, size in peak.parts.items())
        print(f"{name}: predicted {role} {peak.total / MIB:.0f} MiB while {peak.name}: {parts}", flush=True)
    peaks = run(config, [*overrides, f"run.dir={scratch / 'runs'}"], scratch / f"{name}.log")
    print(f"{name}: peaks in MiB {json.dumps(_mib(peaks))}", flush=True)
    above = {role: peaks[role]["VmHWM"] - before[role]["VmHWM"] for role in before}
    measured = {"learner": above["learner"], "sampler": above["sampler"] + above["host"] + above["engine"]}
    return [
        f"{name:<22} {role:<8} {predicted[role].total / MIB:>10.0f} {measured[role] / MIB:>9.0f} "
        f"{predicted[role].total / measured[role] - 1:>+8.1%}"
        for role in predicted
    ]


def _mib(peaks: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {role: {name: size // MIB for name, size in sizes.items()} for role, sizes in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--vocab", type=int, help="the 54M model with this vocabulary, overrides after it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlsys-memory-") as name:
        scratch = Path(name)
        cases: list[tuple[str, Path, Sequence[str]]] = []
        if arguments.config and arguments.config.suffix == ".yaml":
            cases.append((arguments.config.stem, arguments.config, arguments.overrides))
        else:
            overrides = [*([str(arguments.config)] if arguments.config else []), *arguments.overrides]
            vocabularies = [arguments.vocab] if arguments.vocab is not None else [0, 151_936]
            if arguments.vocab is None:
                cases.append(("quickstart", ROOT / "configs" / "quickstart.yaml", overrides))
            for vocab in vocabularies:
                model = write_model(scratch / f"model-{vocab}", vocab or None)
                job = scratch / f"job-{vocab}.yaml"
                job.write_text(yaml.safe_dump(SMALL_JOB | {"model": {**SMALL_JOB["model"], "path": str(model)}}))
                cases.append((f"54M, vocabulary {vocab or 'small'}", job, overrides))
        before = {role: imported(modules) for role, modules in IMPORTS.items()}
        print(f"after imports, in MiB {json.dumps(_mib(before))}", flush=True)
        rows = [row for case in cases for row in compare(*case, scratch, before)]
    print(f"{'case':<22} {'role':<8} {'predicted':>10} {'measured':>9} {'error':>8}   (MiB above imports)")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
