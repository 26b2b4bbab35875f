"""Keys of earlier revisions: the error about such a key says what takes its place.

A key that is renamed or removed gets a line here in the same change, and a line in CHANGELOG.md. The configuration of
an earlier run may hold such keys: ``rlsys.run_state.saved_config`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

_STAGES = (  # whose watchdog.*_s keys were removed
    "start",
    "base",
    "sample",
    "grade",
    "reference",
    "advantage",
    "learn",
    "sync",
    "save",
)


@dataclass(frozen=True, slots=True)
class Constant:
    """A removed key that decided what a run computes: its only value now, and what to do instead."""

    value: object
    instead: str


CONSTANTS = {
    "rl.sampling.top_p": Constant(
        1.0, "a truncated distribution has no p/q of 1 on policy; see rl.sampling.temperature"
    ),
    "rl.sampling.top_k": Constant(
        -1, "a truncated distribution has no p/q of 1 on policy; see rl.sampling.temperature"
    ),
    "model.make.rope_theta": Constant(10_000.0, "for another, make the model with transformers and set model.path"),
    "model.make.tie_embeddings": Constant(True, "for False, make the model with transformers and set model.path"),
    "model.make.supervised.optimizer": Constant("muon", "set model.make.supervised.learning_rate"),
    "model.make.supervised.beta1": Constant(0.9, "set model.make.supervised.learning_rate"),
    "model.make.supervised.beta2": Constant(0.98, "set model.make.supervised.learning_rate"),
    "model.make.supervised.grad_clip_norm": Constant(1.0, "set model.make.supervised.learning_rate"),
    "task.supervised_min_operations": Constant(1, "set task.supervised_max_operations"),
    "task.max_value": Constant(20, "set task.min_operations and task.max_operations"),
    "task.eval_seed": Constant(99, "set task.eval_problems, or task.eval.path for held-out problems of your choice"),
}

REPLACED = {  # old key -> what to set now
    "run.stage_timeout_s": "set watchdog.limit_s, or a limit per stage in watchdog.stages, such as {sample: 600}",
    "run.start_timeout_s": "set watchdog.stages={start: 900}",
    **{
        f"watchdog.{stage}_s": f"set watchdog.stages={{{stage}: 600}}, or watchdog.limit_s for every stage"
        for stage in _STAGES
    },
    "learner.device": "set learner.num_gpus: the learner computes on a GPU if it has one or a part of one",
    "eval.confidence": "intervals are at 95 %, so remove the key; more task.eval_problems make them narrower",
    **{
        key: f"it is always {constant.value}, so remove the key; {constant.instead}"
        for key, constant in CONSTANTS.items()
    },
}


def replacement(key: str) -> str | None:
    """What to set in place of `key`, or of the keys that the removed section `key` had; None: never a key."""
    if key in REPLACED:
        return f"it was replaced: {REPLACED[key]}"
    inside = [f"{old}: {new}" for old, new in REPLACED.items() if old.startswith(f"{key}.")]
    return f"its keys were replaced: {'; '.join(inside)}" if inside else None
