"""Claims about the versions that an engine holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlsys.errors import SamplingError, WeightSyncError
from rlsys.sampler.adapter_slots import Adapter, AdapterSlots, kept


def filled(*keys: tuple[str, int], most: int = 3) -> tuple[AdapterSlots, dict[tuple[str, int], Adapter]]:
    live = AdapterSlots("sampler 0", most)
    adapters = {key: Adapter(number, key[1], SimpleNamespace(lora_name=f"{key}")) for number, key in enumerate(keys)}
    for (run, _), adapter in adapters.items():
        live.add(run, adapter)
    return live, adapters


def test_a_newer_version_overtakes_those_of_its_run_alone_and_names_what_has_to_move() -> None:
    live, adapters = filled(("a", 1), ("b", 1))
    adapters["a", 1].movable.update({"r1", "r2"})
    adapters["b", 1].movable.add("r3")
    newer = Adapter(9, 2, None)
    assert sorted(live.add("a", newer)) == ["r1", "r2"]
    assert adapters["a", 1].overtaken and not adapters["b", 1].overtaken and not newer.overtaken


def test_a_call_that_stays_is_served_by_its_version_and_one_that_moves_by_the_newest() -> None:
    live, adapters = filled(("a", 1), ("a", 2))
    stays, moves = live.hold("a", 1), live.hold("a", 1, moves=True)
    assert live.serving(stays) is adapters["a", 1]
    assert live.serving(moves) is adapters["a", 2]
    newest = Adapter(9, 3, None)
    live.add("a", newest)
    assert live.serving(stays) is adapters["a", 1]
    assert live.serving(moves) is newest
    assert live.serving(live.hold(None, -1)) is None
    with pytest.raises(SamplingError, match="version 4 is not loaded"):
        live.hold("a", 4, moves=True)


def test_what_was_begun_before_a_run_went_back_is_served_no_more_even_under_the_same_number() -> None:
    live, _ = filled(("a", 1), ("b", 1))
    before = [live.hold("a", 1), live.hold("a", 1, moves=True)]
    other = live.hold("b", 1)
    live.roll_back("a")
    live.add("a", Adapter(9, 1, None))
    for hold in before:
        with pytest.raises(SamplingError, match="went back to an earlier step"):
            live.serving(hold)
    assert live.serving(other) is not None
    assert live.serving(live.hold("a", 1)) is not None


def test_the_oldest_idle_version_that_is_not_its_runs_last_makes_room() -> None:
    live, adapters = filled(("a", 1), ("a", 2), ("a", 3))
    assert live.in_the_way("a") == ("a", 1)
    with kept(adapters["a", 1], 2):
        assert live.in_the_way("a") == ("a", 2)
        with pytest.raises(SamplingError, match="still has 2 running requests"):
            live.drop("a", 1)
        with kept(adapters["a", 2], 1), pytest.raises(WeightSyncError, match=r"raise sampler\.max_live_adapters"):
            live.in_the_way("b")
    live.drop("a", 1)
    assert live.in_the_way("a") is None
    assert live.keys() == (("a", 2), ("a", 3))
