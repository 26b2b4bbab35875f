"""Claims about what the user sees, on a terminal and in a log file."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlsys.tracking import progress
from rlsys.tracking.progress import Progress, closing_rows, duration, shown, sparkline, spent, stage_times


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, _environ={"TERM": "xterm"})


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def lines_of(to: Console) -> list[str]:
    return written(to).splitlines()


def test_a_log_file_gets_plain_lines_with_stage_step_figures_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    out = console(terminal=False)
    bars = Progress(out)
    with bars.stage("rl", 4):
        bars.update(1, reward=0.25, tokens_per_s=1830.4)
        bars.update(2, reward=0.5, accuracy=0.75)
    assert "\x1b" not in written(out) and "\r" not in written(out)
    assert lines_of(out)[0] == "rl: started, 4 steps"
    assert re.fullmatch(r"rl: step 1/4  reward 0\.250  tokens/s 1830  left 0:00", lines_of(out)[1])
    assert "step 2/4  reward 0.500  tokens/s 1830  accuracy 0.750" in lines_of(out)[2], "tokens/s keeps its value"
    assert lines_of(out)[-1] == "rl: done after 0:00"


def test_a_fast_stage_does_not_flood_a_log_file_and_its_last_step_is_there() -> None:
    out = console(terminal=False)
    bars = Progress(out)
    with bars.stage("sft", 5000):
        for step in range(1, 5001):
            bars.update(step, loss=1.0)
    steps = [line for line in lines_of(out) if "step" in line.split(":", 1)[1].split("/")[0]]
    assert len(steps) <= 4
    assert steps[-1].startswith("sft: step 5000/5000")


def test_a_stage_that_fails_says_stopped_and_another_can_begin() -> None:
    out = console(terminal=False)
    bars = Progress(out)
    with pytest.raises(KeyboardInterrupt), bars.stage("rl", 4):
        raise KeyboardInterrupt
    assert lines_of(out)[-1] == "rl: stopped after 0:00"
    with bars.stage("saving", None):
        bars.update(1)
    assert "saving: step 1" in lines_of(out), "no total, so no time left"


def test_a_log_file_says_where_the_time_of_a_step_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    out = console(terminal=False)
    bars = Progress(out)
    with bars.stage("rl", 4):
        bars.update(1, reward=0.25, times={"sample": 1.25, "learn": 2.5, "reference": 0.0})
        bars.update(1, accuracy=0.5)
    assert "rl: step 1/4  reward 0.250  step 3.75 s: learn 2.50, sample 1.25  left" in lines_of(out)[1]
    assert "accuracy 0.500  step 3.75 s" in lines_of(out)[2], "an evaluation leaves the times of the step"


def test_a_terminal_gets_a_bar_and_below_it_everything_that_is_known() -> None:
    out = console(terminal=True)
    bars = Progress(out)
    with bars.stage("rl [lora]", 4):
        bars.update(1, reward=0.25)
        bars.update(2, reward=0.5, tokens_per_s=900.0, accuracy=0.75, times={"sample": 1.0, "learn": 0.5})
    bar, figures, times = plain(out).strip().splitlines()[-3:]
    for part in ("✓", "rl [lora]", "2/2", "left"):
        assert part in bar
    assert figures.strip() == "reward 0.500  accuracy 0.750  tokens/s 900  ▁█"
    assert times.strip() == "step 1.50 s: sample 1.00, learn 0.50"


def test_a_narrow_terminal_keeps_one_line_for_each_and_one_without_these_signs_gets_none_of_them() -> None:
    narrow = Console(file=io.StringIO(), force_terminal=True, width=30, highlight=False, _environ={"TERM": "xterm"})
    ascii_only = console(terminal=True)
    ascii_only.file = io.TextIOWrapper(io.BytesIO(), "ascii", errors="replace", write_through=True)
    for out in (narrow, ascii_only):
        bars = Progress(out)
        with bars.stage("rl", 4):
            bars.update(1, reward=0.25, tokens_per_s=900.0, accuracy=0.75)
            bars.update(2, reward=0.5)
    assert "reward 0.500" in plain(narrow) and max(map(len, plain(narrow).splitlines())) <= 30
    assert isinstance(ascii_only.file, io.TextIOWrapper) and isinstance(ascii_only.file.buffer, io.BytesIO)
    assert b"reward 0.500  accuracy 0.750  tokens/s 900\x1b" in ascii_only.file.buffer.getvalue()


def plain(out: Console) -> str:
    """Without the terminal's commands."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(out).replace("\r", "\n"))


def test_what_others_print_appears_above_the_bar_in_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = console(terminal=True)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # rich redirects what it finds here while a bar is up
    bars = Progress(out)
    with bars.stage("rl", 4):
        bars.update(1, reward=0.5)
        print("(SamplerActor pid=12) a line of Ray")
        bars.note("wandb: offline, in [run]/wandb")
        bars.update(2)
    lines = plain(out).splitlines()
    assert "(SamplerActor pid=12) a line of Ray" in lines
    assert "wandb: offline, in [run]/wandb" in lines


@pytest.mark.parametrize("terminal", [True, False])
def test_the_closing_words_say_the_result_and_where_to_look_without_wrapping(terminal: bool) -> None:
    out = console(terminal)
    run_dir = Path("runs") / ("long-" * 20 + "name")
    rows = closing_rows(
        run_dir,
        accuracy_before=0.45,
        accuracy_after=0.935,
        steps=25,
        seconds=301.4,
        wandb_dir=run_dir / "wandb" / "offline-run-1",
        wandb_url=None,
        adapter=run_dir / "adapter",
    )
    Progress(out).summary("done", rows)
    for part in (
        "0.450 before, 0.935 after",
        "5:01",
        f"{run_dir}/report.html",
        f"{run_dir}/metrics.jsonl",
        f"wandb sync {run_dir}/wandb/offline-run-1",
        f"{run_dir}/adapter",
    ):
        assert part in written(out)


def test_an_online_run_is_pointed_to_and_an_accuracy_that_is_not_there_is_not_made_up() -> None:
    rows = dict(
        closing_rows(
            Path("r"),
            accuracy_before=0.5,
            accuracy_after=float("nan"),
            steps=3,
            seconds=1.0,
            wandb_dir=Path("r/wandb/run-1"),
            wandb_url="https://wandb.example/run",
            adapter=None,
        )
    )
    assert rows["wandb"] == "https://wandb.example/run"
    assert rows["held-out accuracy"] == "0.500 before, not evaluated after"
    assert not any("adapter" in label for label in rows)


def test_mean_grades_outside_0_to_1_are_called_a_reward_and_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    out = console(terminal=False)
    with (bars := Progress(out)).stage("rl", 2):
        bars.update(1, accuracy=-12.5)
    assert "held-out reward -12.500" in written(out) and "accuracy" not in written(out)
    where: dict[str, Any] = {"steps": 3, "seconds": 1.0, "wandb_dir": None, "wandb_url": None, "adapter": None}
    rows = dict(closing_rows(Path("r"), accuracy_before=-1250.0, accuracy_after=0.5, **where))
    assert rows["held-out reward"] == "-1250.0 before, 0.500 after"


def test_durations_and_figures_are_short() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert shown({"reward": 0.5123, "tokens/s": 18304.4}) == "reward 0.512  tokens/s 18304"


def test_times_are_found_among_the_facts_of_a_step_and_the_longest_is_said_first() -> None:
    times = stage_times({"time/sample_s": 1.0, "time/learn_s": 2.0, "time/step_s": 3.0, "reward/mean": 9.0})
    assert times == {"sample": 1.0, "learn": 2.0}
    assert spent(times) == "step 3.00 s: learn 2.00, sample 1.00"
    assert spent({}) == "" and spent({"sync": 0.001}) == "step 0.00 s"


def test_a_sparkline_goes_from_the_lowest_to_the_highest_and_is_silent_about_one_value() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0]) == sparkline([]) == sparkline([float("nan"), 1.0]) == ""
