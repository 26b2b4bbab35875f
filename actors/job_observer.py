"""What a job logs, shows and records of its steps and evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

from actors.faults.actor_logs import Failures
from actors.stages.restarting_actors import GraderActors
from rlsys.config import JobConfig
from rlsys.metrics import Metrics
from rlsys.protocols import RewardsRef, RolloutsRef, TrainedStep
from rlsys.run_state.jsonl import RolloutRow, read_metrics
from rlsys.run_state.saved_rollouts import delete_after
from rlsys.tracking.learning_checks import LearningChecks, see_records
from rlsys.tracking.progress import Progress, stage_times
from rlsys.tracking.system_metrics import SystemMetrics
from rlsys.tracking.tracker import Tracker

WATCH_EVERY = 10  # steps between two searches for the actors' processes
EVAL_ROWS = 12  # completions of the held-out problems in the report, before and after


class JobObserver:
    """Passes the loop's reports on to tracker and progress."""

    def __init__(
        self,
        config: JobConfig,
        tracker: Tracker,
        progress: Progress,
        failures: Failures,
        accuracies: dict[int, float],
        graders: GraderActors,
        pids: Callable[[], dict[str, list[int]]],
    ) -> None:
        self.config, self.tracker, self.progress, self.failures = config, tracker, progress, failures
        self.accuracies = accuracies
        self.run_dir = config.run_dir
        self.system = SystemMetrics(self.run_dir, progress.note)
        self.graders, self.pids = graders, pids
        self._look_at = 0
        self.checks = LearningChecks(config.model_dump(mode="json"))
        see_records(self.checks, read_metrics(self.run_dir))  # of a resumed run: reported already

    def on_supervised(self, news: list[dict[str, float]]) -> None:
        for figures in news:
            step = int(figures["sft/step"])
            self.tracker.log(step, {name: value for name, value in figures.items() if name != "sft/step"})
        if news:
            last = news[-1]
            accuracy = next((new["sft/gate_accuracy"] for new in reversed(news) if "sft/gate_accuracy" in new), None)
            self.progress.update(
                int(last["sft/step"]), loss=last["sft/loss"], tokens_per_s=last["sft/tokens_per_s"], accuracy=accuracy
            )

    def on_task(self, metrics: Metrics) -> None:
        self.tracker.log(0, metrics)
        self._check(0, metrics)

    def on_rollback(self, step: int) -> None:
        self.tracker.roll_back(step)
        delete_after(self.run_dir, step)
        self.accuracies = {at: accuracy for at, accuracy in self.accuracies.items() if at <= step}
        self.checks.roll_back(step)

    def on_step(self, step: int, metrics: Metrics, trained: TrainedStep) -> None:
        self.failures.forget()
        if step >= self._look_at:  # finding the processes takes longer than reading their memory
            self.system.watch(self.pids())
            self._look_at = step + WATCH_EVERY
        self.tracker.log(step, {**metrics, **self.system.figures()})
        self._check(step, metrics)
        rewards, samples = trained.rewards, self.config.rl.samples_per_problem
        self.tracker.groups(
            step, trained.problems.tolist(), (rewards.passed / samples).tolist(), rewards.grade.tolist()
        )
        if self.config.tracking.rollout_steps:
            self.graders.record(str(self.run_dir.absolute()), step, trained)
        count = self.config.tracking.rollouts_per_step
        self._show("train", "train", step, count, trained.rollouts, trained.rewards, trained)
        self.progress.update(
            step,
            reward=metrics["reward/mean"],
            tokens_per_s=metrics["sampler/tokens_per_s"],
            times=stage_times(metrics),
        )

    def on_eval(self, step: int, metrics: Metrics, rollouts: RolloutsRef, rewards: RewardsRef) -> None:
        self.tracker.log(step, metrics)
        self._check(step, metrics)
        self.accuracies[step] = metrics["eval/accuracy"]
        self.progress.update(step, accuracy=metrics["eval/accuracy"])
        if step in (0, self.config.rl.steps):
            self._show("eval", "before" if step == 0 else "after", step, EVAL_ROWS, rollouts, rewards)

    def _check(self, step: int, metrics: Metrics) -> None:
        """Note signs that the run cannot learn, once each."""
        for text in self.checks.see(step, metrics):
            self.progress.note(f"rlsys: step {step}: {text}")

    def _show(
        self,
        split: str,
        phase: Literal["before", "train", "after"],
        step: int,
        rows: int,
        rollouts: RolloutsRef,
        rewards: RewardsRef,
        trained: TrainedStep | None = None,
    ) -> None:
        if rows:
            shown = self.graders.show(split, rows, rollouts, rewards, trained)
            self.tracker.rollouts(step, [RolloutRow(step=step, phase=phase, **asdict(row)) for row in shown])
