"""A job's YAML, closed: unknown keys are refused with the nearest right name. pydantic, because text enters here.

Each section is frozen and is handed as it is to the part it configures. Units stand in the names: ``_s`` seconds,
``_gb`` GiB, ``_tokens``. A key is added with its default, its reason, and a line in the frozen list of
tests/unit/config/test_job.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlsys.config import gpu_shares, yaml_text
from rlsys.config.key_types import (
    Address,
    Core,
    Cpus,
    Gpus,
    Name,
    Processes,
    Resources,
    Seconds,
    WandbProject,
    WandbTag,
)
from rlsys.config.overrides import apply, refuse_contradictions
from rlsys.errors import ConfigError
from rlsys.types import LEAST_EPS, AdamParams, SamplingParams
from rlsys.utils.shell_paths import PathText

Precision = Literal["float32", "bfloat16", "float16"]
HALF_ON_CUDA: Precision = "bfloat16"  # the default there; GPUs before compute capability 8.0 have float16 alone


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    name: Name
    dir: PathText = "runs"  # the run directory is dir/name
    seed: int = Field(0, ge=0, lt=2**63)


class ClusterSection(Section):
    address: Address = None  # None: RAY_ADDRESS if set, else a cluster started on this machine for this job
    num_cpus: Processes | None = None  # of a cluster started here; None: all cores
    object_store_gb: float = Field(0.5, ge=0.074, le=1_000_000)  # of a cluster started here; Ray wants 75 MiB

    max_restarts: int = Field(3, ge=0)  # of actors of one kind without a step done in between; 0: a death ends the run


class WatchdogSection(Section):
    """Seconds without progress (not: seconds in all) after which a stage with work left stops the run."""

    start_s: Seconds = 900.0  # loading a base and starting an engine show no progress until they are done
    base_s: Seconds = 300.0  # supervised stage: no step
    sample_s: Seconds = 120.0
    grade_s: Seconds = 120.0
    reference_s: Seconds = 120.0
    advantage_s: Seconds = 120.0
    learn_s: Seconds = 120.0
    sync_s: Seconds = 120.0
    save_s: Seconds = 120.0


class CheckpointSection(Section):
    """What an interrupted run goes on from. In run.dir/name/checkpoints, written while the samplers work."""

    every_steps: int = Field(1, ge=1)
    keep: int = Field(2, ge=1)  # newest ones


class SupervisedSection(Section):
    """Makes a base from nothing: all weights, cross_entropy over every token, until forced worked steps are right."""

    problems: int = Field(20_000, ge=1)  # examples, cycled
    worked_share: float = Field(0.5, ge=0, le=1)  # of answers that show their steps; the rest answer at once
    batch_size: int = Field(64, ge=1)
    optimizer: Literal["adamw", "muon"] = "muon"  # muon for 2-D weights that are no embedding, adamw for the rest
    learning_rate: float = Field(4e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    grad_clip_norm: float = Field(1.0, ge=0)
    warmup_steps: int = Field(50, ge=0)
    first_check_step: int = Field(400, ge=1)
    check_every_steps: int = Field(50, ge=1)
    gate_accuracy: float = Field(0.6, ge=0, le=1)  # greedy, with the worked steps forced, on gate_problems
    gate_problems: int = Field(60, ge=1)
    decay_steps: int = Field(250, ge=1)  # linear to 4 % once the gate is passed, then the stage ends
    max_steps: int = Field(1550, ge=1)  # the gate not passed by then stops the run


class MakeSection(Section):
    """Dimensions of a Qwen3-architecture model made from nothing."""

    vocab_size: int = Field(320, ge=128)
    hidden_size: int = Field(96, ge=8)
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=32, multiple_of=32)  # what vLLM's CPU attention takes
    intermediate_size: int = Field(288, ge=8)
    rope_theta: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True
    supervised: SupervisedSection = SupervisedSection()


class ModelSection(Section):
    path: PathText | None = None  # a Hugging Face folder or hub name; exactly one of path and make
    make: MakeSection | None = None
    # of the frozen base, in learner and sampler alike; the adapter is fp32 in the learner. Where a job names none and
    # its samplers are on CUDA: bfloat16
    dtype: Precision = "float32"
    max_length: int = Field(128, ge=8, lt=2**24)  # tokens of prompt + completion

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.make is None):
            raise ValueError(
                "give exactly one of model.path (an existing model) and model.make (one made from nothing)"
            )
        return self


class SourceSection(Section):
    """Rows of a data set: a local file or folder (jsonl, json, csv, parquet), or a name on the Hub."""

    path: PathText
    subset: str | None = None  # of a data set that has several, such as "main" of openai/gsm8k
    split: str = "train"  # of a Hub data set or of a folder that has several


class ColumnSection(Section):
    """Which columns of a data set hold what."""

    prompt: str = "question"
    answer: str = "answer"


class ExampleSection(Section):
    """One worked example of a few-shot prompt."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class PromptSection(Section):
    """From a problem's text to the tokens that the model reads."""

    chat: bool | None = None  # through the tokenizer's chat template; None: where it has one
    system: str | None = None
    template: str = "{prompt}"  # around every question, few-shot ones too; {prompt} is the question
    few_shot: list[ExampleSection] = Field(default_factory=list)
    max_tokens: int | None = Field(None, ge=1)  # longer prompts are left out, and counted; None: one stops the run
    template_options: dict[str, Any] = Field(default_factory=dict)  # to the chat template: {enable_thinking: false}
    date: str | None = None  # YYYY-MM-DD that a template writes as today's; None: the day on which the run began

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_day(cls, day: object) -> str | None:
        """YAML reads an unquoted day as a date of its own."""
        try:
            return None if day is None else date.fromisoformat(str(day)).isoformat()
        except ValueError:
            raise ValueError(f"found {day!r}; wanted a day such as 2026-11-29, or nothing") from None

    @model_validator(mode="after")
    def _holds_the_question(self) -> PromptSection:
        if "{prompt}" not in self.template:
            raise ValueError(
                f"template: found {self.template!r}; wanted a text with {{prompt}} where the question goes"
            )
        if self.chat is False and self.system is not None:
            raise ValueError("system: a system prompt needs a chat template; put it into prompt.template instead")
        return self


class TurnSection(Section):
    """Tasks whose environment answers: replies run in killable processes, beside the samplers."""

    max_turns: int = Field(8, ge=1)  # of the model; the tokens of all, replies included, share rl.sampling.max_tokens
    reply_timeout_s: Seconds = 5.0  # of one reply; one that takes longer ends the completion, and is counted
    workers: Processes = 1  # processes that reply, of each sampler
    python_tool: bool = False  # let the task "python" run what the model writes; see docs/tasks.md for the limits


class TaskSection(Section):
    name: str = "arithmetic"  # a task of rlsys.tasks, or one of your own as "package.module:Class"
    train_problems: int | None = Field(None, ge=1)  # at most; None: all of a data set, 4096 of one that is made
    eval_problems: int | None = Field(None, ge=1)  # at most; None: all of a data set, 200 of one that is made
    train: SourceSection | None = None  # None: what the task itself names
    eval: SourceSection | None = None  # None: what the task itself names, else a part of train that is kept apart
    columns: ColumnSection | None = None  # None: what the task itself names
    eval_share: float = Field(0.05, gt=0, lt=1)  # of train, kept apart by a hash of the prompt, where there is no eval
    options: dict[str, Any] = Field(default_factory=dict)  # of a task of your own
    min_operations: int = Field(3, ge=1)  # of train and eval problems
    max_operations: int = Field(4, ge=1)
    supervised_min_operations: int = Field(1, ge=1)
    supervised_max_operations: int = Field(4, ge=1)
    max_value: int = Field(20, ge=2)  # every running value lies in 0..max_value
    eval_seed: int = 99  # fixed, so that runs with other seeds are compared on the same problems


class LoraSection(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False


Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]  # Ray's, of a placement group


class LearnerSection(Section):
    device: Literal["cpu", "cuda"] = "cpu"
    num_workers: int = Field(1, ge=1)  # data-parallel ranks
    shard_base: bool = False  # FSDP2 over the frozen base; every rank holds the whole adapter
    num_cpus: Cpus = 1  # of each
    num_gpus: Gpus = 0
    resources: Resources = Field(default_factory=dict)  # custom resources of each, such as {learner_node: 0.01}
    nodes: list[str] = Field(default_factory=list)  # node addresses, taken in turn; empty: wherever there is room
    placement: Strategy = "PACK"
    threads: Processes = 1  # torch intra-op threads
    cores: list[Core] = Field(default_factory=list)  # processors that it may use; empty: any. One worker, on CPU
    token_budget: int = Field(4096, ge=1)  # of one packed micro-batch; a longer sequence is a micro-batch of its own
    share_prompts: bool = True  # sequences that begin alike run over their common beginning once
    logprob_chunk_tokens: int = Field(1024, ge=1)  # rows of logits that exist at once, fewer for a large vocabulary
    gradient_checkpointing: bool = False  # layers keep their inputs alone and run again in the backward pass
    custom_graph_gb: float | None = Field(None, ge=0)  # of a custom loss's graphs; None: half of what is free; 0: none
    entropy: bool = False  # of the policy at the tokens that are learned from, as policy/entropy

    @model_validator(mode="after")
    def _device_and_gpus_agree(self) -> LearnerSection:
        if self.device == "cuda" and self.num_gpus == 0:
            raise ValueError(
                "device cuda, num_gpus 0: Ray would seat the learner without counting its GPU, which others may have; "
                "set learner.num_gpus=1, or a part of one, or learner.device=cpu"
            )
        if self.num_gpus > 1:
            raise ValueError(
                f"num_gpus {self.num_gpus:g}: a rank computes on one GPU and would leave the others idle; set "
                f"learner.num_gpus=1, and learner.num_workers={self.num_gpus:g} for as many ranks"
            )
        if self.device == "cpu" and self.num_gpus > 0:
            raise ValueError(
                f"device cpu, num_gpus {self.num_gpus:g}: the learner would compute on the CPU and leave its GPU idle; "
                "set learner.device=cuda, or learner.num_gpus=0"
            )
        return self


class SamplerSection(Section):
    num_workers: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)  # workers of one engine; on GPUs num_gpus has to be the same
    colocate: bool = False  # sampler i shares the GPU of learner rank i and sleeps while that one learns
    num_cpus: Cpus = 1  # of each
    num_gpus: Gpus = 0
    resources: Resources = Field(default_factory=dict)
    nodes: list[str] = Field(default_factory=list)
    placement: Strategy = "PACK"
    threads: Processes = 1
    cores: list[Core] = Field(default_factory=list)  # processors that it may use; empty: any. One worker, on CPU
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(4096, ge=1)
    max_lora_rank: int = Field(16, ge=1, le=512)  # rounded up to a slot width of vLLM
    max_live_adapters: int = Field(3, ge=2)  # 2 double-buffer one run's versions, 1 for the start-up probe
    kv_cache_gb: float = Field(1.0, gt=0)  # CPU
    gpu_memory_utilization: float = Field(0.6, gt=0, le=1)
    enforce_eager: bool = False  # CPU engines are always eager

    @model_validator(mode="after")
    def _a_gpu_for_each_worker_of_an_engine(self) -> SamplerSection:
        parallel, gpus = self.tensor_parallel_size, self.num_gpus
        if gpus > 0 and gpus != parallel and (parallel > 1 or gpus > 1):
            raise ValueError(
                f"sampler.tensor_parallel_size {parallel} needs as many whole GPUs for each sampler; found "
                f"sampler.num_gpus {gpus:g}; set sampler.num_gpus={parallel}"
            )
        return self

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.num_gpus > 0 else "cpu"


class RewardSection(Section):
    """The reward is correct * grade + format * form + length * brevity - overlong penalty; each has its own curve.

    A grade is any finite number, such as a negative cost; graders of right and wrong give 1 and 0.
    """

    correct: float = 1.0  # weight of the task's grade
    solved_at: float = 1.0  # the grade from which on a completion counts as right
    # where the grader timed out or failed; where grades may be negative, set it as low as the worst of them
    failed_grade: float = 0.0
    format: float = 0.0  # weight of 1 for a completion of the right form, else 0
    format_pattern: str | None = None  # regular expression that is searched; None: it has a final answer
    length: float = Field(0.0, ge=0)  # weight of brevity within the group, Kimi k1.5, arXiv:2501.12599 section 2.3.3
    workers: Processes = 2  # processes, each killable
    timeout_s: Seconds = 3.0  # of one grade
    max_failed_share: float = Field(0.5, ge=0, le=1)  # timeouts and exceptions above this share of a batch stop the run
    function: str | None = None  # "package.module:function" of (completion, answer) -> float; None: the task's own

    @field_validator("format_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            regex.compile(pattern or "")
        except regex.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern


class AdvantageSection(Section):
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"  # leave_one_out: RLOO, arXiv:2402.14740
    normalise: Literal["none", "std"] = "none"  # std: GRPO, arXiv:2402.03300
    # what a token's advantage is divided by. sum: nothing (Dr. GRPO, arXiv:2503.20783); length: the tokens of its
    # completion (GRPO with normalise std, arXiv:2402.03300); max_tokens: rl.sampling.max_tokens
    aggregate: Literal["sum", "length", "max_tokens"] = "sum"
    # groups whose advantages are all 0: rewards agree, and with baseline none are 0; ignored while kl_coef > 0
    drop_agreeing: bool = True
    kl_coef: float = Field(0.0, ge=0)  # KL in the reward, Tinker cookbook incorporate_kl_penalty
    kl_discount: float = Field(0.0, ge=0, lt=1)  # of the future sum of the KL term; 0: none
    reference_refresh_steps: int = Field(0, ge=0)  # the policy becomes the reference every so often; 0: it is the base

    @model_validator(mode="after")
    def _spread_around_something(self) -> AdvantageSection:
        if self.baseline == "none" and self.normalise == "std":
            raise ValueError(
                "normalise: std divides what a baseline has centred; with baseline: none set normalise: none"
            )
        return self


class SamplingSection(Section):
    max_tokens: int = Field(48, ge=1)
    temperature: float = Field(1.0, ge=0.01)  # below, vLLM clamps; the learner's p is computed at the same temperature
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    # Texts that end a completion beside the model's own end tokens (rlsys/tokenization/stop_conditions.py); the text of
    # a special token is that token. []: none, and that nothing else may end a completion of this model is known
    stop: list[str] | None = None

    @model_validator(mode="after")
    def _not_truncated(self) -> SamplingSection:
        if self.top_p != 1.0 or self.top_k != -1:
            raise ValueError(
                "top_p and top_k cut the distribution, so the ratio p/q would be the mass kept and not 1 on policy; "
                "for training leave top_p: 1.0 and top_k: -1 (temperature is followed by the learner)"
            )
        return self

    def params(self, seed: int | None = None) -> SamplingParams:
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, self.top_k, seed, self.stop or None)


class LossSection(Section):
    name: Literal["importance_sampling", "ppo", "cispo", "dro"] = "importance_sampling"
    params: dict[str, float] = Field(default_factory=dict)
    # truncated importance sampling (fengyao.notion.site/off-policy-rl, "TIS"): the ratio is taken to the learner before
    # the step, and a token's weight is min(that learner's p / q, cap). None: the ratio is p / q
    importance_cap: float | None = Field(None, gt=0)


class OverlongSection(Section):
    """Completions that reach rl.sampling.max_tokens. DAPO, arXiv:2503.14476, sections 3.4."""

    handling: Literal["keep", "mask", "penalty"] = "keep"  # mask: they teach nothing; penalty: soft, in the reward
    buffer_tokens: int = Field(0, ge=0)  # penalty: grows linearly from 0 to `penalty` over the last so many tokens
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
    decay_steps: int | None = Field(
        None, ge=1
    )  # steps over which the rate comes down, warm-up included; None: rl.steps
    final_share: float = Field(0.0, ge=0, le=1)  # of learning_rate, in every step after those

    def at(self, step: int, total_steps: int) -> AdamParams:
        """AdamW for step 0, 1, ... of `total_steps`: linear warm-up over `warmup_steps`, then the schedule.

        x = (step - top) / (N - top), N being `decay_steps` or `total_steps` and `top` the first step at the whole rate:
        0 there, and below 1 at the last of N, so that step teaches too. linear: final + (1 - final) * (1 - x), without
        a warm-up (N - step) / N; cosine: final + (1 - final) * (1 + cos(pi x)) / 2 (SGDR, arXiv:1608.03983, equation 5,
        without restarts). From step N on the rate is `final_share`.
        """
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
    substeps: int = Field(1, ge=1)  # optimizer steps per step; each takes its share of the groups
    # dynamic sampling (DAPO, arXiv:2503.14476 section 3.2): groups that rl.advantages.drop_agreeing leaves out are
    # replaced by further problems, in at most so many rounds of sampling; 0: they are not
    refill_rounds: int = Field(0, ge=0)
    overlong: OverlongSection = OverlongSection()
    sampling: SamplingSection = SamplingSection()
    loss: LossSection = LossSection()
    advantages: AdvantageSection = AdvantageSection()
    optim: OptimSection = OptimSection()


class EvalSection(Section):
    """Greedy accuracy, and pass@k from further completions that are sampled."""

    every_steps: int = Field(5, ge=0)  # 0: only before the first and after the last step
    max_tokens: int = Field(48, ge=1)
    samples: int = Field(0, ge=0)  # completions per problem for pass@k; 0: none are sampled
    pass_k: list[int] = Field(default_factory=lambda: [1])  # each at most `samples`
    temperature: float = Field(1.0, ge=0.01)  # of those
    confidence: float = Field(0.95, gt=0, lt=1)  # of the intervals

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSection:
        if self.samples and not (self.pass_k and all(1 <= k <= self.samples for k in self.pass_k)):
            raise ValueError(
                f"pass_k: found {self.pass_k}; wanted numbers from 1 to eval.samples = {self.samples}, at least one"
            )
        return self


class OverlapSection(Section):
    """Sampling goes on while the learner learns (rlsys/async_loop.py); without max_policy_lag, one waits for the
    other."""

    max_policy_lag: int | None = Field(None, ge=0)  # steps: a completion starts at most so many before its own
    minibatches: int = Field(1, ge=1)  # pieces of each optimizer step, learned from as they arrive
    continue_on_new_weights: bool = False  # move what is running to each new version, its cache computed anew


class CheckSection(Section):
    """Bounds (nats, mean over tokens) beyond which the run stops; None: four times the noise of learner and engine on
    this model, at least 1e-3 in float32, 5e-3 in float16 and 1e-2 in bfloat16 (rlsys/weight_sync/canary.py)."""

    max_mean_logprob_diff: float | None = Field(None, gt=0)  # |p - q| of on-policy tokens, every step
    max_canary_diff: float | None = Field(None, gt=0)  # |sampler - learner| of the canary, every sync


class TrackingSection(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in, else offline
    project: WandbProject = "rlsys"
    tags: list[WandbTag] = Field(default_factory=list)  # as wandb takes them
    tensorboard: bool = False  # event files in run.dir/name/tensorboard, beside wandb
    rollouts_per_step: int = Field(4, ge=0)  # rows of the rollouts table: the best and the worst
    rollout_steps: int = Field(20, ge=0)  # newest steps whose rollouts are kept whole, for `rlsys replay`; 0: none
    log_adapter: bool = False  # as a wandb artifact, at the end


class JobConfig(Section):
    """One job: sections of the same names."""

    run: RunSection
    cluster: ClusterSection = ClusterSection()
    watchdog: WatchdogSection = WatchdogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    model: ModelSection
    task: TaskSection = TaskSection()
    prompt: PromptSection = PromptSection()
    turns: TurnSection = TurnSection()
    lora: LoraSection = LoraSection()
    learner: LearnerSection = LearnerSection()
    sampler: SamplerSection = SamplerSection()
    rewards: RewardSection = RewardSection()
    rl: RlSection = RlSection()
    overlap: OverlapSection = OverlapSection()
    eval: EvalSection = EvalSection()
    checks: CheckSection = CheckSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _half_precision_on_cuda(cls, tree: Any) -> Any:
        """A job that names no dtype gets one that its samplers can serve."""
        model, sampler = (tree.get(name) if isinstance(tree, dict) else None for name in ("model", "sampler"))
        if not isinstance(model, dict) or not isinstance(sampler, dict) or "dtype" in model:
            return tree
        gpus = sampler.get("num_gpus", 0)
        on_cuda = isinstance(gpus, int | float) and gpus > 0
        return {**tree, "model": {**model, "dtype": HALF_ON_CUDA}} if on_cuda else tree

    @model_validator(mode="after")
    def _fits_together(self) -> JobConfig:
        if self.lora.rank > self.sampler.max_lora_rank:
            raise ValueError(
                f"lora.rank {self.lora.rank} is above sampler.max_lora_rank {self.sampler.max_lora_rank}; "
                f"set sampler.max_lora_rank={self.lora.rank}"
            )
        longest = max(self.rl.sampling.max_tokens, self.eval.max_tokens)
        if longest >= self.model.max_length:
            raise ValueError(
                f"model.max_length {self.model.max_length} leaves no room for a prompt before {longest} sampled tokens "
                "(rl.sampling.max_tokens, eval.max_tokens)"
            )
        if self.sampler.max_num_seqs > max(self.sampler.max_num_batched_tokens, self.model.max_length + 1):
            raise ValueError(
                f"sampler.max_num_seqs {self.sampler.max_num_seqs} is above sampler.max_num_batched_tokens "
                f"{self.sampler.max_num_batched_tokens}, which vLLM refuses; set "
                f"sampler.max_num_seqs={self.sampler.max_num_batched_tokens}"
            )
        self._refuse_contradictions()
        if self.task.min_operations > self.task.max_operations:
            raise ValueError("task.min_operations is above task.max_operations")
        if self.lora.train_unembed and self.sampler_device == "cuda":
            raise ValueError(
                "lora.train_unembed: vLLM on CUDA scores prompts wrongly under an adapter of the unembedding (it maps "
                "adapter rows by sampled position), so it is served on CPU only; set lora.train_unembed=false"
            )
        refuse_dtype(self.model.dtype, self.sampler, "model.dtype")
        if self.sampler.colocate and self.sampler.num_workers != self.learner.num_workers:
            raise ValueError(
                f"sampler.colocate pairs each sampler with a learner rank; found sampler.num_workers "
                f"{self.sampler.num_workers} and learner.num_workers {self.learner.num_workers}; make them equal"
            )
        for problem in gpu_shares.problems(self.learner, self.sampler):
            raise ValueError(problem)
        if self.sampler.colocate and self.sampler.nodes:
            raise ValueError("sampler.nodes has no meaning with sampler.colocate: a sampler goes where its rank is")
        if self.learner.shard_base and self.learner.num_workers == 1:
            raise ValueError("learner.shard_base shares the base among ranks; set learner.num_workers to 2 or more")
        if not (self.lora.train_attn or self.lora.train_mlp or self.lora.train_unembed):
            raise ValueError("lora trains nothing: set at least one of train_attn, train_mlp, train_unembed to true")
        return self

    def _refuse_contradictions(self) -> None:
        """Among options that know of each other."""
        rl, advantages, overlap = self.rl, self.rl.advantages, self.overlap
        if self.task.name == "python" and not self.turns.python_tool:
            raise ValueError(
                "task.name 'python' runs what the model writes, without network and with limits (docs/tasks.md); "
                "set turns.python_tool: true to allow that"
            )
        if rl.substeps > rl.problems_per_step:
            raise ValueError(
                f"rl.substeps {rl.substeps} share {rl.problems_per_step} groups (rl.problems_per_step); wanted at "
                "least one group each"
            )
        if rl.refill_rounds and (advantages.kl_coef > 0 or not advantages.drop_agreeing):
            raise ValueError(
                "rl.refill_rounds replaces groups that are left out; it needs rl.advantages.drop_agreeing: true and "
                "rl.advantages.kl_coef: 0, with which no group is"
            )
        if advantages.reference_refresh_steps and advantages.kl_coef == 0:
            raise ValueError(
                "rl.advantages.reference_refresh_steps: there is no reference without rl.advantages.kl_coef"
            )
        if rl.overlong.handling == "penalty" and not 0 < rl.overlong.buffer_tokens <= rl.sampling.max_tokens:
            raise ValueError(
                f"rl.overlong.buffer_tokens: found {rl.overlong.buffer_tokens}; the penalty grows over so many tokens, "
                f"wanted 1 to rl.sampling.max_tokens = {rl.sampling.max_tokens}"
            )
        if overlap.max_policy_lag is None:
            if overlap.minibatches > 1 or overlap.continue_on_new_weights:
                raise ValueError(
                    "overlap.minibatches and overlap.continue_on_new_weights have a meaning only in overlapped "
                    "running; set overlap.max_policy_lag, such as 1"
                )
            return
        if overlap.minibatches * rl.substeps > rl.problems_per_step:
            raise ValueError(
                f"overlap.minibatches {overlap.minibatches} times rl.substeps {rl.substeps} pieces of "
                f"{rl.problems_per_step} groups (rl.problems_per_step); wanted at least one group each"
            )
        if self.sampler.colocate:
            raise ValueError(
                "overlap: with sampler.colocate samplers sleep while the learner learns; choose one of the two"
            )
        versions = overlap.max_policy_lag + 2  # in use at once, and one for what is left over where something was lost
        if self.sampler.max_live_adapters < versions:
            raise ValueError(
                f"sampler.max_live_adapters {self.sampler.max_live_adapters}: overlap.max_policy_lag "
                f"{overlap.max_policy_lag} needs room for {versions} versions; set sampler.max_live_adapters={versions}"
            )
        if rl.refill_rounds and overlap.minibatches * rl.substeps > 1:
            raise ValueError(
                "rl.refill_rounds in overlapped running fills up a whole batch; set rl.substeps and "
                "overlap.minibatches to 1"
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    def dated(self, day: str) -> JobConfig:
        """With the day that chat templates write as today's, where the job names none."""
        if self.prompt.date is not None:
            return self
        return self.model_copy(update={"prompt": self.prompt.model_copy(update={"date": day})})

    @property
    def sampler_device(self) -> Literal["cpu", "cuda"]:
        return self.sampler.device


def refuse_dtype(dtype: Precision, sampler: SamplerSection, key: str) -> None:
    """
    Raises:
        ValueError: the sampler's device cannot serve adapters in `dtype`, which `key` sets.
    """
    if dtype == "float32" and sampler.device == "cuda":
        raise ValueError(
            f"{key} float32: vLLM's LoRA kernels on CUDA take half precision alone (sampler.num_gpus "
            f"{sampler.num_gpus:g}); set {key}=bfloat16, or {key}=float16 on a GPU older than compute capability 8.0, "
            "or sampler.num_gpus=0 for a sampler on the CPU"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a YAML file and ``section.key=value`` overrides describe.

    Raises:
        ConfigError: no such file, no YAML, an unknown key (with the nearest right one), or a value out of its range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    return parse_config(text, overrides, source=str(path))


def load_command(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """As ``load_config``, of a command line: a key given twice there with different values is refused."""
    refuse_contradictions(overrides, JobConfig)
    return load_config(path, overrides)


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "config") -> JobConfig:
    """As ``load_config``, from text."""
    tree = yaml_text.read(text, JobConfig, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: found {type(tree).__name__} at the top; wanted sections such as 'run:'")
    apply(tree, overrides, JobConfig)
    try:
        return JobConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(detail)}" for detail in error.errors())) from None


def dump_config(config: JobConfig) -> str:
    """The resolved job as YAML, defaults included: what a run directory keeps."""
    return yaml_text.dump(config.model_dump(mode="json"))


def keys(section: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a job may set."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from keys(inner, f"{prefix}{name}.")


REQUIRED = {
    "run": "; give every run a name, such as run: {name: first}",
    "run.name": "; such as run.name=first",
    "model": "; such as model: {path: Qwen/Qwen3-0.6B}, or model: {make: {}} for one made from nothing",
}


def _explain(detail: Mapping[str, Any]) -> str:
    """One line: which key, what was found, what would be right."""
    where = [str(part) for part in detail["loc"]]
    dotted = ".".join(where)
    if detail["type"] == "extra_forbidden":
        return f"{dotted} is no key of {'.'.join(where[:-1]) or 'a job'!r}; {_nearest(where)}"
    if detail["type"] == "missing":
        return f"{dotted} is required{REQUIRED.get(dotted, '')}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" or isinstance(detail["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    found = "nothing" if detail["input"] is None else repr(detail["input"])
    return f"{dotted}: found {found}; {message[0].lower()}{message[1:]}"


def _nearest(where: Sequence[str]) -> str:
    section: type[BaseModel] = JobConfig
    for part in where[:-1]:
        if part in section.model_fields:  # what is no key is a place in a list
            section = _section_of(section.model_fields[part].annotation) or section
    siblings = list(section.model_fields)
    close = difflib.get_close_matches(where[-1], siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}? It takes {', '.join(siblings)}"
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == where[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]}? {'.'.join(where[:-1]) or 'A job'} takes {', '.join(siblings)}"
    return f"it takes {', '.join(siblings)}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, alone or in a list."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
