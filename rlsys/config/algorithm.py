"""Sections ``rl``, ``overlap`` and ``eval``: sampling, loss, advantages, optimizer, and how the policy is evaluated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rlsys.config.section import Section
from rlsys.limits import LEAST_EPS

if TYPE_CHECKING:
    from rlsys.types import AdamParams, SamplingParams


class AdvantageSection(Section):
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"  # leave_one_out: RLOO, arXiv:2402.14740
    normalise: Literal["none", "std"] = "none"  # std: GRPO, arXiv:2402.03300
    # divisor of a token's advantage. sum: 1 (Dr. GRPO, arXiv:2503.20783); length: the tokens of its
    # completion (GRPO with normalise std, arXiv:2402.03300); max_tokens: rl.sampling.max_tokens
    aggregate: Literal["sum", "length", "max_tokens"] = "sum"
    # zero-variance groups, whose advantages are all 0 (with baseline none: whose rewards are all 0); ignored while
    # kl_coef > 0
    drop_agreeing: bool = True
    kl_coef: float = Field(0.0, ge=0)  # KL in the reward, Tinker cookbook incorporate_kl_penalty
    kl_discount: float = Field(0.0, ge=0, lt=1)  # of the future sum of the KL term; 0: none
    reference_refresh_steps: int = Field(
        0, ge=0
    )  # steps after which the policy becomes the reference; 0: the base stays the reference

    @model_validator(mode="after")
    def _spread_around_something(self) -> AdvantageSection:
        if self.baseline == "none" and self.normalise == "std":
            raise ValueError(
                "normalise: std needs rewards that a baseline has centred; with baseline: none set normalise: none"
            )
        return self


class SamplingSection(Section):
    """From the complete distribution: under top_p or top_k, p/q would not be 1 on policy but the mass kept."""

    max_tokens: int = Field(48, ge=1)
    temperature: float = Field(1.0, ge=0.01)  # vLLM clamps lower values; the learner computes p at the same temperature
    # Texts that end a completion, besides the model's end tokens (rlsys/tokenization/stop_conditions.py); the text of a
    # special token is that token. []: no text, and the job accepts a model without end tokens
    stop: list[str] | None = None

    def params(self, seed: int | None = None) -> SamplingParams:
        from rlsys.types import SamplingParams  # imports numpy, which a refused job does not need

        return SamplingParams(self.max_tokens, self.temperature, seed=seed, stop=self.stop or None)


class LossSection(Section):
    name: Literal["importance_sampling", "ppo", "cispo", "dro", "gspo"] = "importance_sampling"
    params: dict[str, float] = Field(default_factory=dict)
    # truncated importance sampling (fengyao.notion.site/off-policy-rl, "TIS"): the ratio is taken to the learner before
    # the step, and a token's weight is min(that learner's p / q, cap). None: the ratio is p / q
    importance_cap: float | None = Field(None, gt=0)


class OverlongSection(Section):
    """Completions that reach rl.sampling.max_tokens. DAPO, arXiv:2503.14476, sections 3.4."""

    handling: Literal["keep", "mask", "penalty"] = "keep"  # mask: not trained on; penalty: soft, in the reward
    buffer_tokens: int = Field(0, ge=0)  # penalty: grows linearly from 0 to `penalty` over this many last tokens
    penalty: float = Field(1.0, gt=0)


class OptimSection(Section):
    learning_rate: float = Field(2e-3, ge=0)
    warmup_steps: int = Field(3, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=LEAST_EPS)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip_norm: float = Field(1.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    decay_steps: int | None = Field(None, ge=1)  # steps until the schedule ends, warm-up included; None: rl.steps
    final_share: float = Field(0.0, ge=0, le=1)  # of learning_rate, after decay_steps

    def at(self, step: int, total_steps: int) -> AdamParams:
        """AdamW for step 0, 1, ... of `total_steps`: linear warm-up over `warmup_steps`, then the schedule.

        x = (step - top) / (N - top), N being `decay_steps` or `total_steps` and `top` the first step at the full rate:
        0 there, and below 1 at the last of N, whose rate is above 0 too. linear: final + (1 - final) * (1 - x), without
        a warm-up (N - step) / N; cosine: final + (1 - final) * (1 + cos(pi x)) / 2 (SGDR, arXiv:1608.03983, equation 5,
        without restarts). From step N on the rate is `final_share`.
        """
        from rlsys.types import AdamParams  # as above

        factor = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule != "constant":
            end, top = self.decay_steps or total_steps, max(0, self.warmup_steps - 1)
            x = 1.0 if step >= end else max(0, step - top) / max(1, end - top)
            left = (1 + math.cos(math.pi * x)) / 2 if self.schedule == "cosine" else 1 - x
            factor *= self.final_share + (1 - self.final_share) * left
        return AdamParams(
            self.learning_rate * factor, self.beta1, self.beta2, self.eps, self.weight_decay, self.grad_clip_norm
        )


class RlSection(Section):
    steps: int = Field(25, ge=0)
    problems_per_step: int = Field(32, ge=1)
    samples_per_problem: int = Field(8, ge=2)
    substeps: int = Field(1, ge=1)  # optimizer steps per step; each takes an equal share of the groups
    # dynamic sampling (DAPO, arXiv:2503.14476 section 3.2): groups that rl.advantages.drop_agreeing drops are replaced
    # by further problems, in at most this many rounds of sampling; 0: not replaced
    refill_rounds: int = Field(0, ge=0)
    overlong: OverlongSection = OverlongSection()
    sampling: SamplingSection = SamplingSection()
    loss: LossSection = LossSection()
    advantages: AdvantageSection = AdvantageSection()
    optim: OptimSection = OptimSection()


class OverlapSection(Section):
    """Overlapped sampling and learning (rlsys/async_loop.py); without max_policy_lag, they alternate."""

    max_policy_lag: int | None = Field(None, ge=0)  # maximum policy lag in steps; null: synchronous
    minibatches: int = Field(1, ge=1)  # parts of each optimizer step, trained as they arrive
    continue_on_new_weights: bool = False  # switch running completions to each new version; recomputes their KV cache


class EvalSection(Section):
    """Greedy accuracy, and pass@k from additional sampled completions."""

    every_steps: int = Field(5, ge=0)  # 0: only before the first and after the last step
    max_tokens: int = Field(48, ge=1)
    samples: int = Field(0, ge=0)  # completions per problem for pass@k; 0: none are sampled
    pass_k: list[int] = Field(default_factory=lambda: [1])  # each at most `samples`
    temperature: float = Field(1.0, ge=0.01)  # of those

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSection:
        if self.samples and not (self.pass_k and all(1 <= k <= self.samples for k in self.pass_k)):
            raise ValueError(
                f"pass_k: found {self.pass_k}; wanted numbers from 1 to eval.samples = {self.samples}, at least one"
            )
        return self
