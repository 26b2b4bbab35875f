"""benchmarks.data_plane runs the stages of a job with actors that replay: they have what the stages call."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from actors.learner_actor import LearnerActor
from actors.sampler_actor import SamplerActor
from benchmarks.replaying import ReplayingLearner, ReplayingSampler

STAGES = Path(__file__).parents[3] / "actors" / "stages"
# Of more ranks than one, of a base that is made, of a reference policy, and of restarts: no replayed job has them.
NOT_ASKED = {"digest", "meeting_point", "problems", "reference", "replace", "supervised_since"}


def called(who: str) -> set[str]:
    """Methods that the stages call of actors with this name."""
    text = "".join(path.read_text() for path in sorted(STAGES.rglob("*.py")))
    return set(re.findall(rf"\b{who}\b(?:\[0\])?\.(\w+)\.remote\(", text))


@pytest.mark.parametrize(
    ("names", "real", "replaying"),
    [(("rank", "ranks"), LearnerActor, ReplayingLearner), (("actor",), SamplerActor, ReplayingSampler)],
)
def test_a_replaying_actor_has_the_methods_that_the_stages_call_with_the_same_parameters(
    names: tuple[str, ...], real: type, replaying: type
) -> None:
    wanted = {name for who in names for name in called(who) if hasattr(real, name)} - NOT_ASKED
    assert {"start", "stop" if real is SamplerActor else "publish"} <= wanted
    for name in sorted(wanted):
        assert hasattr(replaying, name), f"{replaying.__name__} lacks {name}"
        theirs, ours = (list(inspect.signature(getattr(one, name)).parameters) for one in (real, replaying))
        assert ours == theirs, f"{name}: found {ours}; wanted {theirs}"
