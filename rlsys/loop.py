"""The whole loop: problems -> samplers -> rewards -> advantages -> learner -> adapter -> samplers.

Each verb below is a stage (`rlsys.stages`); nothing here knows Ray, vLLM or PEFT. A step is a function of the learner's
state, the problems drawn and the seed, so one that is lost is simply done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlsys.config import JobConfig
from rlsys.ledger import Ledger
from rlsys.stages import Facts, Observer, Rewound, Stages
from rlsys.types import Array, SamplingParams


def run(
    config: JobConfig,
    stages: Stages,
    ledger: Ledger,
    held_out: Array,
    observer: Observer,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """From the last checkpoint to ``rl.steps``, or until ``should_stop``. Returns the last step; each is whole."""
    done, loaded = stages.keeper.done, False

    def over() -> bool:
        return done >= 0 and (done >= config.rl.steps or should_stop())

    while not over() or done != stages.keeper.done:
        try:
            if over():
                stages.keeper.save(done, ledger)
                continue
            if not loaded:
                stages.samplers.load(stages.learner.publish())
                loaded = True
            if done < 0:
                evaluate(config, stages, held_out, 0, observer)
            else:
                train(config, stages, ledger, held_out, observer, done + 1)
            done += 1
            if done % config.checkpoint.every_steps == 0:
                stages.keeper.save(done, ledger)
        except Rewound as back:
            done, loaded = (done, loaded) if back.step is None else (back.step, False)
            ledger.rewind(max(done, 0))
            observer.on_rewind(done)
    return done


def train(config: JobConfig, stages: Stages, ledger: Ledger, held_out: Array, observer: Observer, step: int) -> None:
    """One step, from problems to an adapter that every sampler serves."""
    samplers, learner = stages.samplers, stages.learner
    clock = Clock()
    with clock("sample"):
        problems = ledger.draw(step, config.rl.problems_per_step)
        params = config.rl.sampling.params(seed=config.run.seed * 1_000_003 + step)
        rollouts = samplers.sample("train", problems, config.rl.samples_per_problem, params)
    with clock("grade"):
        rewards = stages.graders.grade("train", rollouts)
    with clock("reference"):
        reference = learner.reference(rollouts) if config.rl.advantages.kl_coef > 0 else None
    with clock("advantage"):
        datums = stages.advantages.centre(rollouts, rewards, reference)
    with clock("learn"):
        learned = learner.step(datums, step)
        ledger.settle(step, datums.outcomes)
    with clock("sync"):
        synced = samplers.load(learner.publish())
    facts = {**rollouts.facts, **rewards.facts, **datums.facts, **learned, **synced, **clock.facts()}
    observer.on_step(step, facts, rollouts, rewards)
    if step == config.rl.steps or (config.eval.every_steps and step % config.eval.every_steps == 0):
        evaluate(config, stages, held_out, step, observer)


def evaluate(config: JobConfig, stages: Stages, held_out: Array, step: int, observer: Observer) -> None:
    """Greedy accuracy on the held-out problems; nothing here is trained on, so what is lost is only repeated."""
    clock = Clock()
    params = SamplingParams(max_tokens=config.eval.max_tokens, temperature=0.0, stop=config.rl.sampling.stop)
    while True:
        try:
            with clock("eval"):
                rollouts = stages.samplers.sample("eval", held_out, 1, params)
                rewards = stages.graders.grade("eval", rollouts)
            break
        except Rewound as back:
            if back.step is not None:
                raise
    facts = {
        "eval/accuracy": rewards.facts["reward/mean"],
        "eval/mean_tokens": rollouts.facts["sampler/completion_tokens_mean"],
        "time/eval_s": clock.seconds["eval"],
    }
    observer.on_eval(step, facts, rollouts, rewards)


class Clock:
    """Seconds by stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def facts(self) -> Facts:
        return {f"time/{stage}_s": s for stage, s in self.seconds.items()} | {"time/step_s": sum(self.seconds.values())}
