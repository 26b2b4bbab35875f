"""A checkpoint is served by plain ``vllm serve --enable-lora``, with the learner's log-probabilities."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.learner.adapter_checkpoint import save_run
from rlsys.learner.learner import Learner
from tests.engine.tiny_engine import BOUND, MAX_LENGTH, VOCAB, Reference
from tests.waiting import FAR_S, size_of, until

SECTIONS = {"inner": LoraSection(rank=4, alpha=8.0), "with-output": LoraSection(rank=8, alpha=4.0, train_unembed=True)}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def learner(reference: Reference) -> Learner:
    """Runs whose B is not zero."""
    model = ModelSection(path=str(reference.folder), max_length=MAX_LENGTH)
    made, draw = Learner(reference.folder, model, LearnerSection()), torch.Generator().manual_seed(1)
    for run, section in SECTIONS.items():
        made.runs.create(run, section, 1)
        for name, weight in made.runs.state(run).weights.items():
            if name.endswith("lora_B"):
                weight.copy_(0.15 * torch.randn(weight.shape, generator=draw))
    return made


@pytest.fixture(scope="module")
def address(learner: Learner, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for run in SECTIONS:
        save_run(learner, run, folder / run, with_optimizer=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    modules = [f"{run}={folder / run}" for run in SECTIONS]
    command = [  # what `vllm serve` runs; the command itself looks for a distribution called vllm, and this is vllm-cpu
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(reference.folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(MAX_LENGTH)),
        *("--enforce-eager", "--max-num-seqs", "8", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
        *("--lora-modules", *modules),
    ]
    log = folder / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT}, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    said = lambda: log.read_text()[-3000:]  # noqa: E731
    until(lambda: answers(url), "a server", size_of(log), process=server, state=said, poll_s=0.5)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:  # urllib's own is one
        return False
    return True


def complete(address: str, model: str, prompt: list[int]) -> dict[str, Any]:
    body = {
        **{"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 1.0, "seed": 3},
        **{"logprobs": 1, "return_token_ids": True, "ignore_eos": True},
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=FAR_S) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice


@pytest.mark.parametrize("run", SECTIONS)
def test_plain_vllm_serves_a_checkpoint_with_the_learners_logprobs(address: str, learner: Learner, run: str) -> None:
    prompt = (np.arange(20) * 7 % VOCAB).tolist()
    choice = complete(address, run, prompt)
    tokens = np.array(prompt + choice["token_ids"], np.int32)
    served = np.array(choice["logprobs"]["token_logprobs"])
    ours, base = (learner.logprobs(r, tokens, np.array([0, len(tokens)]))[len(prompt) :] for r in (run, None))
    assert len(served) == 12
    assert np.abs(served - ours).max() < BOUND
    assert np.abs(served - base).mean() > 100 * BOUND
