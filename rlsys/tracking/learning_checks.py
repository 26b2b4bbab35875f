"""Warnings from metrics that show a run cannot learn: each states the share affected and the key to change.

A run in which every completion is truncated, every group has zero variance or no gradient arrives looks like a healthy
run: steps pass and every file is written. A warning needs `WINDOW` steps in a row, since a small batch may trigger it
by chance. It is printed once in the terminal and shown at the top of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rlsys.metrics import Metrics
from rlsys.run_state.jsonl import Record

WINDOW = 3  # steps in a row; all steps of a shorter run
SHARE = 0.95  # of completions or groups
DROPPED = 0.5  # of the training problems

Keys = Mapping[str, object]  # the job's values by dotted key; unknown keys are absent


@dataclass(frozen=True, slots=True)
class Check:
    """`share`: from a step's metrics, None without the needed metrics. `hides`: warnings that only follow from it."""

    name: str
    share: Callable[[Metrics, Keys], float | None]
    says: Callable[[float, Metrics, Keys], str]
    bound: float = SHARE
    window: int = WINDOW
    hides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LearningWarning:
    """A warning: its steps, and a sentence with the share in the last of them."""

    name: str
    steps: tuple[int, ...]
    text: str


@dataclass(slots=True)
class _Streak:
    """State of one check: the current run of consecutive steps, and all steps of the warning."""

    now: list[int] = field(default_factory=list)
    all: list[int] = field(default_factory=list)
    text: str = ""

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`."""
        for steps in (self.now, self.all):
            while steps and steps[-1] > step:
                steps.pop()

    def add(self, step: int, window: int) -> bool:
        """Count a step once; returns whether `window` or more steps are now consecutive."""
        self.roll_back(step - 1)
        self.now.append(step)
        if len(self.now) < window:
            return False
        self.all += [past for past in self.now[-window:] if not self.all or past > self.all[-1]]
        return True


class LearningChecks:
    """Checks metrics step by step. `config`: the job as nested mappings; parts may be missing."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._keys = dict(_flat(config))
        steps = self._keys.get("rl.steps")
        self._longest = max(1, steps) if isinstance(steps, int) else WINDOW  # window
        self._streaks = {check.name: _Streak() for check in CHECKS}
        self._reported: set[str] = set()

    def see(self, step: int, metrics: Metrics) -> list[str]:
        """Texts of the warnings that this step completes, each once in the life of this object."""
        hidden: set[str] = set()
        for check in CHECKS:
            share = check.share(metrics, self._keys)
            streak = self._streaks[check.name]
            if share is None:
                continue
            if not share >= check.bound:  # also for NaN
                streak.now.clear()
                continue
            hidden.update(check.hides)
            if check.name in hidden:
                streak.now.clear()
            elif streak.add(step, min(check.window, self._longest)):
                streak.text = check.says(share, metrics, self._keys)
        new = [sign for sign in self.signs() if sign.name not in self._reported]
        self._reported.update(sign.name for sign in new)
        return [sign.text for sign in new]

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`, which are repeated. Warnings already printed are not printed again."""
        for streak in self._streaks.values():
            streak.roll_back(step)

    def signs(self) -> list[LearningWarning]:
        """All warnings so far."""
        found = ((check.name, self._streaks[check.name]) for check in CHECKS)
        return [LearningWarning(name, tuple(streak.all), streak.text) for name, streak in found if streak.all]


def learning_warnings(records: Iterable[Record], config: Mapping[str, object]) -> list[LearningWarning]:
    """Warnings from the lines of metrics.jsonl."""
    checks = LearningChecks(config)
    see_records(checks, records)
    return checks.signs()


def see_records(checks: LearningChecks, records: Iterable[Record]) -> None:
    """Replay recorded steps in the order written; their warnings are not printed again."""
    for record in records:
        if record.get("stage") != "sft":
            checks.see(int(record["step"]), {name: value for name, value in record.items() if "/" in name})


def percent(share: float) -> str:
    """The share as text: only a share of 1 is ``all``."""
    return "all" if share >= 1 else f"{min(99.9, share * 100):.3g} % of the"


def _flat(section: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in section.items():
        yield prefix + name, value
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


def _setting(keys: Keys, key: str) -> str:
    """``rl.sampling.max_tokens (now 48)``."""
    return f"{key} (now {keys[key]})" if key in keys else key


def _over(part: Sequence[str], total: str) -> Callable[[Metrics, Keys], float | None]:
    """Share of the sum of metrics `part` in the metric `total`."""

    def share(metrics: Metrics, _: Keys) -> float | None:
        count = metrics.get(total, 0)
        return sum(metrics.get(name, 0) for name in part) / count if count else None

    return share


def _is(name: str, test: Callable[[float], bool]) -> Callable[[Metrics, Keys], float | None]:
    def share(metrics: Metrics, _: Keys) -> float | None:
        return float(test(metrics[name])) if name in metrics else None

    return share


def _same_reward(metrics: Metrics, _: Keys) -> float | None:
    if "reward/std" not in metrics or "reward/groups" not in metrics:
        return None
    return float(metrics["reward/std"] == 0)


def _format_reward(share: float, metrics: Metrics, keys: Keys) -> str:
    text = f"every completion of the step has the same reward, {metrics['reward/mean']:g}, so the step has no gradient"
    wrong = metrics.get("reward/wrong", -1)
    if wrong == metrics.get("reward/completions"):
        return (
            f"{text}. No completion counts as right. Read some under Rollouts in report.html: if the answers look "
            "right, the grader does not find them (prompt.template, task.columns.answer, rewards.function); if not, "
            "the problems are too hard for this model"
        )
    if wrong == 0:
        return f"{text}. All count as right: the problems are too easy for this model; choose others (task)"
    return f"{text}. Look at what gives the rewards (rewards.function, or the task's grade)"


def _zero_variance(metrics: Metrics, keys: Keys) -> float | None:
    """Without a baseline, zero-variance groups with a reward other than 0 are trained on."""
    if keys.get("rl.advantages.baseline") == "none" and metrics.get("advantages/mean_abs", 0) > 0:
        return 0.0
    groups = metrics.get("reward/groups", 0)
    return metrics.get("reward/agreeing_groups", 0) / groups if groups else None


def _format_zero_variance(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"in {percent(share)} groups all rewards are equal, so these groups have no gradient. Sample "
        f"more completions per problem ({_setting(keys, 'rl.samples_per_problem')}), raise "
        f"{_setting(keys, 'rl.sampling.temperature')}, or choose problems that are neither too easy nor too hard"
    )


def _format_truncated(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} completions were cut off before their end. Raise "
        f"{_setting(keys, 'rl.sampling.max_tokens')} and, where it is the limit, "
        f"{_setting(keys, 'model.max_length')}; if a text continues after its end, the model has another end token "
        "(docs/tokenizers.md) or needs rl.sampling.stop"
    )


def _format_eval_truncated(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} completions of the evaluation were cut off before their end, so its accuracy means little. "
        f"Raise {_setting(keys, 'eval.max_tokens')}, or see docs/tokenizers.md for what ends a completion"
    )


def _format_empty(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"completions have {metrics['sampler/completion_tokens_mean']:.3g} tokens on average: the model stops "
        "immediately. Look at the prompt (prompt.chat, prompt.template) and at rl.sampling.stop"
    )


def _format_failed(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} grades failed or took too long and count as "
        f"{_setting(keys, 'rewards.failed_grade')}. Look at errors.log and at rewards.function, or raise "
        f"{_setting(keys, 'rewards.timeout_s')}"
    )


def _format_replies(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} completions ended because the environment's reply failed or took too long. Look at the "
        f"task's reply, or raise {_setting(keys, 'turns.reply_timeout_s')}"
    )


def _format_turns(share: float, metrics: Metrics, keys: Keys) -> str:
    return f"{percent(share)} completions ran out of turns. Raise {_setting(keys, 'turns.max_turns')}"


def _nothing_trained(metrics: Metrics, _: Keys) -> float | None:
    return float(metrics["policy/tokens"] == 0) if "policy/tokens" in metrics else None


def _format_untrained(share: float, metrics: Metrics, keys: Keys) -> str:
    if keys.get("rl.overlong.handling") == "mask" and metrics.get("sampler/truncated_share", 0) > 0:
        return (
            "no token is trained on: rl.overlong.handling mask drops truncated completions. Raise "
            f"{_setting(keys, 'rl.sampling.max_tokens')}, or set rl.overlong.handling=keep"
        )
    return (
        "no token is trained on: every group was dropped. Look at rl.advantages.drop_agreeing and at the "
        "completions under Rollouts in report.html"
    )


def _format_rate(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"the learning rate is 0, so the policy does not change. Raise {_setting(keys, 'rl.optim.learning_rate')}, or, "
        f"after a schedule's end, {_setting(keys, 'rl.optim.final_share')} or rl.optim.decay_steps"
    )


def _no_gradient(metrics: Metrics, _: Keys) -> float | None:
    if metrics.get("policy/tokens", 0) == 0 or "policy/learning_rate" not in metrics:
        return None
    return float(not metrics.get("policy/grad_norm", 0.0) > 0)


def _format_gradient(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"the gradient of {metrics['policy/tokens']:.0f} tokens is 0, so the policy does not change. Look at rl.loss "
        "(a clip that cuts every token, a parameter of 0) and at rl.optim.learning_rate: a policy with probability 1 "
        "at every token has no gradient"
    )


def _format_clipped(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"the loss clips {percent(share)} tokens, which have no gradient then: the policy is far from the policy "
        f"that sampled. Lower {_setting(keys, 'rl.optim.learning_rate')}, {_setting(keys, 'rl.substeps')} or "
        f"{_setting(keys, 'overlap.max_policy_lag')}, or widen the clip in rl.loss.params"
    )


def _problems(lost: str) -> Callable[[Metrics, Keys], float | None]:
    def share(metrics: Metrics, _: Keys) -> float | None:
        if "task/train_problems" not in metrics:
            return None
        missing = metrics.get(lost, 0)
        return missing / max(1, missing + metrics["task/train_problems"])

    return share


def _format_dropped(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} training problems are dropped, because their prompts are longer than "
        f"{_setting(keys, 'prompt.max_tokens')}; raise it, and model.max_length with it"
    )


def _format_unusable(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} rows of the training data have no prompt or no answer and are dropped; look at "
        f"{_setting(keys, 'task.columns')}"
    )


def _format_held_out(share: float, metrics: Metrics, keys: Keys) -> str:
    return (
        f"{percent(share)} training problems are held-out problems too and are not trained on; give task.train and "
        "task.eval different sources"
    )


# fmt: off
CHECKS = (
    Check("dropped", _problems("task/train_dropped"), _format_dropped, DROPPED, 1),
    Check("unusable", _problems("task/train_unusable"), _format_unusable, DROPPED, 1),
    Check("held_out", _problems("task/train_held_out"), _format_held_out, DROPPED, 1),
    Check("eval_cut_off", lambda metrics, _: metrics.get("eval/truncated_share"), _format_eval_truncated, window=1),
    Check("failed_grades", _over(("reward/timeouts", "reward/errors"), "reward/completions"), _format_failed,
          hides=("same_reward", "agreeing", "untrained")),
    Check("failed_replies", _over(("sampler/reply_timeouts", "sampler/reply_errors"), "sampler/completions"),
          _format_replies),
    Check("out_of_turns", _over(("sampler/out_of_turns",), "sampler/completions"), _format_turns),
    Check("cut_off", lambda metrics, _: metrics.get("sampler/truncated_share"), _format_truncated),
    Check("empty", _is("sampler/completion_tokens_mean", lambda mean: mean < 1.5), _format_empty),
    Check("same_reward", _same_reward, _format_reward, hides=("agreeing", "untrained")),
    Check("agreeing", _zero_variance, _format_zero_variance, hides=("untrained",)),
    Check("untrained", _nothing_trained, _format_untrained),
    Check("learning_rate", _is("policy/learning_rate", lambda rate: rate == 0), _format_rate, window=1),
    Check("gradient", _no_gradient, _format_gradient),
    Check("clipped", lambda metrics, _: metrics.get("policy/clip_fraction"), _format_clipped),
)
# fmt: on
