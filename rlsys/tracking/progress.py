"""Progress of a job for the user: a bar per stage on a terminal, plain lines elsewhere, and a closing summary.

rich redirects stdout and stderr while a bar is up, so lines that Ray or a library prints appear above it.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from rlsys.utils.shell_paths import command

LINE_EVERY_S = 1.0  # without a terminal: a log file should not get a line for every step of a fast stage
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 24  # newest rewards in the sparkline

Row = tuple[str, str]  # label, value


class Progress:
    """One stage at a time. Notes and figures may come from any thread."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._stage: _Stage | None = None

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[None]:
        """Show `name` until the block ends; `total` is in steps, None if unknown."""
        assert self._stage is None, f"stage {name!r} starts inside another stage"
        self._stage = _BarStage(name, total, self._console) if self._live else _LineStage(name, total, self._console)
        ended_well = False
        try:
            yield
            ended_well = True
        finally:
            self._stage.end(ended_well)
            self._stage = None

    def update(
        self,
        step: int,
        *,
        reward: float | None = None,
        tokens_per_s: float | None = None,
        accuracy: float | None = None,
        loss: float | None = None,
        times: Mapping[str, float] | None = None,
    ) -> None:
        """The stage has made `step` steps; omitted values stay as displayed. `times`: seconds by part of a step."""
        assert self._stage is not None, "update() outside of a stage"
        held_out = "accuracy" if accuracy is None else held_out_name(accuracy)
        figures = {"reward": reward, held_out: accuracy, "loss": loss, "tokens/s": tokens_per_s}
        self._stage.update(step, {name: value for name, value in figures.items() if value is not None}, times)

    def note(self, text: str) -> None:
        """One sentence for the user, above the bar."""
        self._print(Text(text))

    def summary(self, title: str, rows: Sequence[Row]) -> None:
        """Print the closing summary. Lines are never wrapped, so that a path or a command can be copied."""
        width = max((len(label) for label, _ in rows), default=0)
        self._print(Text(f"\n{title}", style="bold"))
        for label, value in rows:
            self._print(Text.assemble(("  " + label.ljust(width), "dim"), "  ", value))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)
        self._console.file.flush()


class _Stage(ABC):
    """Metrics and clock of a stage, for both kinds of display."""

    def __init__(self, name: str, total: int | None, console: Console) -> None:
        self._name = name
        self._total = total
        self._console = console
        self._step = 0
        self._figures: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._rewards: dict[int, float] = {}  # by step, so that a repeated step counts once
        self._started = time.monotonic()

    def update(self, step: int, figures: dict[str, float], times: Mapping[str, float] | None) -> None:
        self._step = step
        self._figures.update(figures)
        self._times = dict(times) if times else self._times
        if "reward" in figures:
            self._rewards[step] = figures["reward"]
        self._show()

    @abstractmethod
    def end(self, ended_well: bool) -> None: ...

    @abstractmethod
    def _show(self) -> None: ...


class _View(RichProgress):
    """The bar, and lines below it."""

    below: Sequence[Text] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from self.below


class _BarStage(_Stage):
    def __init__(self, name: str, total: int | None, console: Console) -> None:
        super().__init__(name, total, console)
        self._bar = _View(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]of[/]"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task(escape(name), total=total)
        self._bar.start()

    def _show(self) -> None:
        steps = [value for step, value in sorted(self._rewards.items()) if step <= self._step][-SPARK_STEPS:]
        drawn = "" if self._console.options.ascii_only else sparkline(steps)
        lines = ("  ".join(filter(None, [shown(self._figures), drawn])), spent(self._times))
        self._bar.below = [Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in lines if line]
        self._bar.update(self._task, completed=self._step)

    def end(self, ended_well: bool) -> None:
        if ended_well:  # also a stage that reached its goal before its last step
            self._bar.update(self._task, total=self._step, completed=self._step)
        self._bar.stop()


class _LineStage(_Stage):
    def __init__(self, name: str, total: int | None, console: Console) -> None:
        super().__init__(name, total, console)
        self._printed_at = float("-inf")
        self._printed_step = -1
        self._print(f"{name}: started" + (f", {total} steps" if total else ""))

    def _show(self) -> None:
        if time.monotonic() - self._printed_at >= LINE_EVERY_S:
            self._print_step()

    def end(self, ended_well: bool) -> None:
        if self._step and self._printed_step != self._step:
            self._print_step()
        took = duration(time.monotonic() - self._started)
        self._print(f"{self._name}: {'done' if ended_well else 'stopped'} after {took}")

    def _print_step(self) -> None:
        self._printed_at, self._printed_step = time.monotonic(), self._step
        words = [f"{self._name}: step {self._step}" + (f"/{self._total}" if self._total else ""), shown(self._figures)]
        words.append(spent(self._times))
        if self._total and self._step:
            so_far = time.monotonic() - self._started
            words.append(f"left {duration(so_far / self._step * (self._total - self._step))}")
        self._print("  ".join(word for word in words if word))

    def _print(self, line: str) -> None:
        print(line, file=self._console.file, flush=True)


def shown(figures: dict[str, float]) -> str:
    """``reward 0.512  tokens/s 1830``: three decimals, or none from 100 upwards."""
    return "  ".join(
        f"{name} {value:.0f}" if abs(value) >= 100 else f"{name} {value:.3f}" for name, value in figures.items()
    )


def stage_times(facts: Mapping[str, float]) -> dict[str, float]:
    """``time/sample_s`` and its like as ``{"sample": seconds}``; ``step`` is their sum and is omitted."""
    names = {name: name.removeprefix("time/").removesuffix("_s") for name in facts if name.startswith("time/")}
    return {short: facts[name] for name, short in names.items() if short != "step"}


def spent(times: Mapping[str, float]) -> str:
    """``step 1.52 s: sample 1.21, learn 0.31``: the longest part first; parts below 5 ms are omitted."""
    if not times:
        return ""
    parts = sorted(times.items(), key=lambda item: -item[1])
    said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts if seconds >= 0.005)
    return f"step {sum(times.values()):.2f} s" + (f": {said}" if said else "")


def sparkline(values: Sequence[float]) -> str:
    """Bars scaled from the lowest to the highest value; empty for fewer than two values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, room = min(finite), max(finite) - min(finite)
    return "".join(SPARKS[round((value - low) / room * (len(SPARKS) - 1)) if room else 0] for value in finite)


def duration(seconds: float) -> str:
    """Seconds as ``0:42`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def held_out_name(*means: float) -> str:
    """Name of mean grades: accuracy, or held-out reward where a grade is outside of 0 to 1."""
    return "accuracy" if all(math.isnan(mean) or 0 <= mean <= 1 for mean in means) else "held-out reward"


def closing_rows(
    run_dir: Path,
    *,
    accuracy_before: float,
    accuracy_after: float,
    steps: int,
    seconds: float,
    wandb_dir: Path | None,
    wandb_url: str | None,
    adapter: Path | None,
) -> list[Row]:
    """Rows of the closing summary: the result and its files. NaN: the accuracy was not evaluated."""
    name = held_out_name(accuracy_before, accuracy_after)
    rows = [
        (
            "held-out accuracy" if name == "accuracy" else name,
            f"{_accuracy(accuracy_before)} before, {_accuracy(accuracy_after)} after",
        ),
        ("steps", str(steps)),
        ("time", duration(seconds)),
        ("report", str(run_dir / "report.html")),
        ("metrics", str(run_dir / "metrics.jsonl")),
    ]
    if wandb_url:
        rows.append(("wandb", wandb_url))
    elif wandb_dir:
        rows.append(("wandb (offline)", command("wandb", "sync", wandb_dir)))
    if adapter:
        rows.append(("adapter (PEFT)", str(adapter)))
    return rows


def _accuracy(value: float) -> str:
    return "not evaluated" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
