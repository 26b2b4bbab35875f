"""Tiny random Qwen3 models, made once per session. Which tests run first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

# The files that take longest begin after the forked programs of tests/conftest.py: no process is left with one of them
# at the end.
LONG = (
    "benchmarks/test_gpu_check.py",
    "learner/test_fake_cuda.py",
    "rewards/test_grader_pool.py",
    "tracking/test_tracker.py",
    "actors/forking/test_fork_server.py",
    "math_grading/test_grading_table.py",
    "replay/test_replay_step.py",
    "benchmarks/test_gpu_loop.py",
    "test_waiting.py",
    "sandbox/test_run_python.py",
    "actors/hosting/test_host_process.py",
    "environments/test_environment_pool.py",
    "environments/test_multi_turn.py",
    "sandbox/test_process_pool.py",
    "actors/machine/test_gpu_checks.py",
    "learner/test_learner.py",
    "learner/test_turns.py",
    "learner/test_invariance.py",
    "learner/test_custom_loss.py",
    "serve/test_gate.py",
    "serve/test_fuzz.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0].removeprefix("tests/unit/"), len(LONG)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """tied -> folder of a Qwen3 with vocabulary 64, hidden size 32, 2 layers and weights large enough to matter."""
    import torch  # here: with -n 2 the process that hands out the tests reads this file too
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folders: dict[bool, Path] = {}

    def folder(tied: bool = True) -> Path:
        if tied not in folders:
            config = Qwen3Config(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2,
                tie_word_embeddings=tied, dtype="float32",
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7 + tied)
                model = Qwen3ForCausalLM(config)
            folders[tied] = tmp_path_factory.mktemp("models") / f"tiny-{'tied' if tied else 'untied'}"
            model.save_pretrained(folders[tied])
        return folders[tied]

    return folder
