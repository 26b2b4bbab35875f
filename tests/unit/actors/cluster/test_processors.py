"""A processor that a key names and the node lacks is refused by the key."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from actors.cluster.processors import pin, refuse_absent_cores
from rlsys.config import LearnerSection, SamplerSection
from rlsys.errors import ConfigError

HERE = sorted(os.sched_getaffinity(0))
ABSENT = max(HERE) + 1


@pytest.mark.parametrize("cores", [[ABSENT], [HERE[0], ABSENT], [4095]])
def test_a_core_that_the_node_lacks_is_refused_by_its_key_even_beside_one_that_is_there(cores: list[int]) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ConfigError, match=rf"learner\.cores: {cores[-1]} is not available .*: {HERE[0]}"):
        pin(cores, "learner.cores")
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("key", ["learner.cores", "sampler.cores"])
def test_a_job_that_starts_ray_itself_is_refused_before_anything_starts(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    learner = LearnerSection(cores=[ABSENT] if key == "learner.cores" else HERE[:1])
    sampler = SamplerSection(cores=[ABSENT] if key == "sampler.cores" else HERE[:1])
    with pytest.raises(ConfigError, match=key):
        refuse_absent_cores(None, learner, sampler)


def test_of_a_cluster_that_is_joined_only_its_nodes_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    refuse_absent_cores(None, LearnerSection(cores=[ABSENT]), SamplerSection(cores=[ABSENT]))


def test_cores_that_are_there_are_the_only_ones_used_and_none_is_no_restriction() -> None:
    script = (
        "import os; from actors.cluster.processors import pin; pin([], 'k'); a = os.sched_getaffinity(0);"
        f"pin([{HERE[0]}], 'k'); print(sorted(a), sorted(os.sched_getaffinity(0)))"
    )
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert said.strip() == f"{HERE} [{HERE[0]}]"
