"""What a step draws, with every part real, does not depend on how it is cut into calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from actors import job as jobs
from rlsys.config import JobConfig, parse_config
from rlsys.rollouts import Rollouts
from rlsys.run_state.saved_rollouts import load_step
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB

Job = Callable[..., JobConfig]
STEP = ("task.train_problems=2", "rl.problems_per_step=8", "rl.steps=1")  # each problem comes four times


def drawn(config: JobConfig) -> Rollouts:
    assert jobs.train(config, Progress()).steps == 1
    return load_step(config.run_dir, 1).rollouts


def completions(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [tuple(rollouts.completion(r).tolist()) for r in range(len(rollouts.group))]


@pytest.fixture(scope="module")
def whole(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    """One sampler, one call."""
    place = [f"model.path={micro_base}", f"run.dir={tmp_path_factory.mktemp('whole')}"]
    return drawn(parse_config(JOB, [*place, *STEP]))


def test_a_problem_that_a_step_draws_again_has_other_completions(whole: Rollouts) -> None:
    found = completions(whole)
    assert len(found) == 8 * 4 and len(set(whole.problems.tolist())) == 2
    assert len(set(found)) == len(found)


CUTS = [  # all at once: a piece is two groups, a sampler gets one of them, and its engine takes half of that
    "sampler.num_workers=2",
    "overlap.max_policy_lag=0",
    "overlap.minibatches=4",
    "sampler.max_num_seqs=2",
]


def test_the_completions_are_the_same_however_the_step_is_cut_into_calls(whole: Rollouts, job: Job) -> None:
    """Over two samplers, in overlapped pieces, and in batches above what an engine takes."""
    other = drawn(job("run.name=cut", *STEP, *CUTS))
    assert other.problems.tolist() == whole.problems.tolist()
    assert completions(other) == completions(whole)
