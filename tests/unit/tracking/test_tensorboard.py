"""Claims about TensorBoard's copy of the figures, read back from its event files by its own reader."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlsys.config import TrackingSection
from rlsys.errors import ConfigError
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.tracker import Tracker
from tests.forked import run_forked

ON = TrackingSection(wandb="disabled", tensorboard=True)


def shown(run_dir: Path, name: str, stage: str = "rl") -> list[tuple[int, float]]:
    """What TensorBoard draws of a figure."""
    read = EventAccumulator(str(run_dir / "tensorboard" / stage)).Reload()
    return [(event.step, event.value) for event in read.Scalars(name)] if name in read.Tags()["scalars"] else []


def steps_of(tracker: Tracker, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        tracker.log(step, {"reward/mean": step + offset})


def test_every_figure_is_there_under_its_name_step_and_time(tmp_path: Path) -> None:
    with Tracker(tmp_path, ON, "r", {"rl": {"steps": 2}}, note=lambda text: None) as tracker:
        tracker.log(500, {"sft/loss": 2.5})
        tracker.log(0, {"eval/accuracy": 0.25})
        tracker.log(1, {"reward/mean": 0.5, "sync/bytes": 2**20, "policy/ratio_max": math.inf})
        assert shown(tmp_path, "reward/mean") == [(1, 0.5)], "a run that is killed now has lost nothing"
    assert shown(tmp_path, "sft/loss", "sft") == [(500, 2.5)]
    assert shown(tmp_path, "eval/accuracy") == [(0, 0.25)]
    assert shown(tmp_path, "sync/bytes") == [(1, 2.0**20)]
    assert shown(tmp_path, "policy/ratio_max") == [(1, math.inf)]
    read = EventAccumulator(str(tmp_path / "tensorboard" / "rl")).Reload()
    assert read.Scalars("eval/accuracy")[0].wall_time == pytest.approx(read_metrics(tmp_path)[1]["time"])
    (text,) = read.Tensors("config/text_summary")
    assert b"steps: 2" in text.tensor_proto.string_val[0]


def test_a_step_that_is_done_again_hides_its_first_figures_and_those_after_it(tmp_path: Path) -> None:
    with Tracker(tmp_path, ON, "r", {}, note=lambda text: None) as tracker:
        tracker.log(9, {"sft/loss": 1.0})
        steps_of(tracker, range(6))
        tracker.roll_back(2)
        steps_of(tracker, range(3, 5), offset=0.5)
    assert shown(tmp_path, "reward/mean") == [(0, 0), (1, 1), (2, 2), (3, 3.5), (4, 4.5)]
    assert shown(tmp_path, "sft/loss", "sft") == [(9, 1.0)]


KILLED = """
import os, pathlib, signal, sys
from tests.unit.tracking.test_tensorboard import ON, Tracker, steps_of
tracker = Tracker(pathlib.Path(sys.argv[1]), ON, "r", {}, note=lambda text: None)
tracker.log(9, {"sft/loss": 1.0})
steps_of(tracker, range(6))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_a_killed_run_that_goes_on_shows_every_step_once(tmp_path: Path, keep: bool) -> None:
    assert run_forked(KILLED, str(tmp_path)).returncode == -signal.SIGKILL
    with Tracker(tmp_path, ON, "r", {}, note=lambda text: None, resume_from=3, keep_supervised=keep) as tracker:
        if not keep:
            tracker.log(4, {"sft/loss": 7.0})
        steps_of(tracker, range(4, 8), offset=0.5)
    assert shown(tmp_path, "reward/mean") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5)]
    assert shown(tmp_path, "sft/loss", "sft") == ([(9, 1.0)] if keep else [(4, 7.0)])


def test_a_run_that_is_gone_on_with_and_had_none_gets_the_steps_before(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingSection(wandb="disabled"), "r", {}, note=lambda text: None) as tracker:
        steps_of(tracker, range(4))
    assert not (tmp_path / "tensorboard").exists()
    with Tracker(tmp_path, ON, "r", {}, note=lambda text: None, resume_from=2) as tracker:
        steps_of(tracker, range(3, 5), offset=0.5)
    assert shown(tmp_path, "reward/mean") == [(0, 0), (1, 1), (2, 2), (3, 3.5), (4, 4.5)]


def test_without_the_package_the_run_is_refused_and_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as Python itself marks what cannot be imported
    with pytest.raises(ConfigError, match=r"tracking\.tensorboard.*pip install tensorboard"):
        Tracker(tmp_path, ON, "r", {}, note=lambda text: None)


def test_it_is_not_imported_where_nobody_asked_for_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from rlsys.config import TrackingSection; from rlsys.tracking.tracker import Tracker\n"
        f"t = Tracker(pathlib.Path({str(tmp_path)!r}), TrackingSection(wandb='disabled'), 'r', {{}})\n"
        "t.log(1, {'reward/mean': 1.0}); t.close()\n"
        "assert not [name for name in sys.modules if name == 'tensorboard' or name.startswith('torch.utils.tensor')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
