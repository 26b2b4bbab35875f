"""Forked programs begin with the learner's imports, and the pools under test do not."""

from __future__ import annotations

import sys

from rlsys.config import RewardSection
from rlsys.rewards.grader_pool import GraderPool
from tests.forked import PRELOADED, run_forked


def torch_is_imported(completion: str, answer: str) -> float:
    return float("torch" in sys.modules)


def test_a_program_finds_the_learner_imported_and_a_pool_started_before_or_after_it_does_not() -> None:
    for _ in range(2):
        pool = GraderPool(RewardSection(timeout_s=600), torch_is_imported)
        try:
            assert pool.grade(["x"], ["x"]).rewards.tolist() == [0.0]
        finally:
            pool.close()
        done = run_forked(f"import sys; print([name in sys.modules for name in {PRELOADED}])")
        assert done.stdout.strip() == str([True] * len(PRELOADED)), done.stderr
