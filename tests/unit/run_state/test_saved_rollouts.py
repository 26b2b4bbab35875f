"""What a step was computed from comes back whole or not at all, and only the newest steps are kept."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from rlsys.errors import CheckpointError
from rlsys.rollouts import ENVIRONMENT, Rollouts, offsets_of
from rlsys.run_state.saved_rollouts import (
    STEPS,
    SavedStep,
    delete_after,
    format_steps,
    load_step,
    recorded_steps,
    save_step,
)
from rlsys.types import Array

KEEP = 20


def drawn(groups: int = 3, per_group: int = 4, seed: int = 0) -> Rollouts:
    """Completions of 0 to 9 tokens, some of them written by an environment."""
    random = np.random.default_rng(seed)
    prompt_offsets = offsets_of(random.integers(1, 6, groups))
    lengths = random.integers(0, 10, groups * per_group)
    T = int(lengths.sum())
    return Rollouts(
        problems=random.integers(0, 100, groups),
        prompt_tokens=random.integers(0, 64, prompt_offsets[-1]).astype(np.int32),
        prompt_offsets=prompt_offsets,
        group=np.repeat(np.arange(groups), per_group).astype(np.int32),
        tokens=random.integers(0, 64, T).astype(np.int32),
        logprobs=random.uniform(-5, 0, T).astype(np.float32),
        versions=random.choice([4, 5, ENVIRONMENT], T).astype(np.int32),
        offsets=offsets_of(lengths),
        stop_reasons=random.integers(0, 2, groups * per_group).astype(np.int8),
    )


def recorded(step: int = 7, with_reference: bool = True) -> SavedStep:
    rollouts = drawn(seed=step)
    random = np.random.default_rng(step)
    reference = random.uniform(-5, 0, len(rollouts.tokens)).astype(np.float32) if with_reference else None
    return SavedStep(step, 5, 2, rollouts, random.random(len(rollouts.group)), reference)


def assert_same(found: SavedStep, wanted: SavedStep) -> None:
    assert (found.step, found.version, found.pieces) == (wanted.step, wanted.version, wanted.pieces)
    assert (found.reference is None) == (wanted.reference is None)
    pairs = [(getattr(found.rollouts, f.name), getattr(wanted.rollouts, f.name)) for f in fields(Rollouts)]
    pairs.append((found.rewards, wanted.rewards))
    if found.reference is not None and wanted.reference is not None:
        pairs.append((found.reference, wanted.reference))
    for a, b in pairs:
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_step_comes_back_to_the_bit(tmp_path: Path, with_reference: bool) -> None:
    wanted = recorded(with_reference=with_reference)
    assert save_step(tmp_path, wanted, KEEP) == tmp_path / STEPS / "step-000007.npz"
    assert_same(load_step(tmp_path, 7), wanted)


def test_a_step_without_a_token_comes_back(tmp_path: Path) -> None:
    nothing = replace(
        drawn(),
        tokens=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        versions=np.empty(0, np.int32),
        offsets=np.zeros(13, np.int64),
    )
    wanted = SavedStep(1, 0, 1, nothing, np.zeros(12), None)
    save_step(tmp_path, wanted, KEEP)
    assert_same(load_step(tmp_path, 1), wanted)


def test_numpy_alone_reads_a_step(tmp_path: Path) -> None:
    wanted = recorded()
    path = save_step(tmp_path, wanted, KEEP)
    assert path is not None
    with np.load(path, allow_pickle=False) as archive:
        tokens: Array = archive["tokens"]
    assert np.array_equal(tokens, wanted.rollouts.tokens)


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_step(tmp_path, recorded(step), keep=3)
        assert recorded_steps(tmp_path) == list(range(max(1, step - 2), step + 1))


def test_keeping_none_writes_none_and_removes_those_of_before(tmp_path: Path) -> None:
    assert save_step(tmp_path, recorded(), keep=0) is None
    assert not (tmp_path / STEPS).exists()
    save_step(tmp_path, recorded(1), KEEP)
    assert save_step(tmp_path, recorded(2), keep=0) is None
    assert recorded_steps(tmp_path) == []


def test_a_step_that_is_done_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save_step(tmp_path, recorded(7), KEEP)
    again = replace(recorded(7), version=6)
    save_step(tmp_path, again, KEEP)
    assert_same(load_step(tmp_path, 7), again)


def test_a_step_is_never_removed_by_its_own_writing(tmp_path: Path) -> None:
    """Where later steps were not forgotten, it is not among the newest."""
    for step in (8, 9, 5):
        save_step(tmp_path, recorded(step), keep=2)
    assert recorded_steps(tmp_path) == [5, 8, 9]


def test_going_back_forgets_the_steps_after(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_step(tmp_path, recorded(step), KEEP)
    delete_after(tmp_path, 3)
    assert recorded_steps(tmp_path) == [1, 2, 3]
    delete_after(tmp_path, -1)
    assert recorded_steps(tmp_path) == []
    delete_after(tmp_path / "no run yet", 3)


def test_what_a_dead_writer_left_is_no_step_and_goes(tmp_path: Path) -> None:
    save_step(tmp_path, recorded(1), KEEP)
    half = tmp_path / STEPS / ".step-000002.npz.new"
    half.write_bytes(b"half")
    assert recorded_steps(tmp_path) == [1]
    save_step(tmp_path, recorded(3), KEEP)
    assert not half.exists() and recorded_steps(tmp_path) == [1, 3]


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-000002.npz: does not exist; found none"):
        load_step(tmp_path, 2)
    for step in (5, 6, 7, 9):
        save_step(tmp_path, recorded(step), KEEP)
    with pytest.raises(CheckpointError, match="found steps 5 to 7 and 9"):
        load_step(tmp_path, 2)


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save_step(tmp_path, recorded(), KEEP)
    assert path is not None
    whole = path.read_bytes()
    for at in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"step-000007.npz: .*damaged"):
            load_step(tmp_path, 7)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_step(tmp_path, 7)


def test_a_step_under_another_number_is_refused(tmp_path: Path) -> None:
    path = save_step(tmp_path, recorded(7), KEEP)
    assert path is not None
    path.rename(path.with_name("step-000008.npz"))
    with pytest.raises(CheckpointError, match="format version 1 of step 7; wanted 1 of step 8"):
        load_step(tmp_path, 8)


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [([], "none"), ([3], "step 3"), ([4, 5, 6], "steps 4 to 6"), ([1, 2, 9, 11], "steps 1 to 2, 9 and 11")],
)
def test_steps_are_told_as_ranges(steps: list[int], wanted: str) -> None:
    assert format_steps(steps) == wanted
