"""A job: its sections, and the checks across them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from rlsys.config import gpu_shares
from rlsys.config.algorithm import EvalSection, OverlapSection, RlSection
from rlsys.config.learner import LearnerSection
from rlsys.config.model import HALF_ON_CUDA, MAX_LORA_RANK, LoraSection, ModelSection
from rlsys.config.run import (
    CheckpointSection,
    CheckSection,
    ClusterSection,
    RunSection,
    TrackingSection,
    WatchdogSection,
)
from rlsys.config.sampler import SamplerSection, refuse_dtype
from rlsys.config.section import Section
from rlsys.config.task import PromptSection, RewardSection, TaskSection, TurnSection


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
    def _half_precision_on_cuda(cls, tree: object) -> object:
        """Without a dtype, a job gets one that its samplers can serve."""
        if not isinstance(tree, dict):
            return tree
        model, sampler = (tree.get(name) for name in ("model", "sampler"))
        if not isinstance(model, dict) or not isinstance(sampler, dict) or "dtype" in model:
            return tree
        gpus = sampler.get("num_gpus", 0)
        on_cuda = isinstance(gpus, int | float) and gpus > 0
        return {**tree, "model": {**model, "dtype": HALF_ON_CUDA}} if on_cuda else tree

    @model_validator(mode="before")
    @classmethod
    def _slots_for_the_adapter(cls, tree: object) -> object:
        """Without sampler.max_lora_rank, a sampler has slots of the adapter's rank."""
        if not isinstance(tree, dict):
            return tree
        lora, sampler = (tree.get(name, {}) for name in ("lora", "sampler"))
        if not isinstance(lora, dict) or not isinstance(sampler, dict):
            return tree
        rank = lora.get("rank")
        is_served = isinstance(rank, int) and 1 <= rank <= MAX_LORA_RANK  # otherwise lora.rank is refused
        return {**tree, "sampler": {"max_lora_rank": rank, **sampler}} if is_served else tree

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
            raise ValueError("sampler.nodes does not apply with sampler.colocate: a sampler is placed with its rank")
        if self.learner.shard_base and self.learner.num_workers == 1:
            raise ValueError("learner.shard_base shards the base over ranks; set learner.num_workers to 2 or more")
        if not (self.lora.train_attn or self.lora.train_mlp or self.lora.train_unembed):
            raise ValueError(
                "lora: no module is trained; set at least one of train_attn, train_mlp, train_unembed to true"
            )
        return self

    def _refuse_contradictions(self) -> None:
        """Options that exclude or need each other."""
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
                "rl.refill_rounds replaces dropped groups; it needs rl.advantages.drop_agreeing: true and "
                "rl.advantages.kl_coef: 0, since otherwise no group is dropped"
            )
        if advantages.reference_refresh_steps and advantages.kl_coef == 0:
            raise ValueError(
                "rl.advantages.reference_refresh_steps: there is no reference without rl.advantages.kl_coef"
            )
        if rl.overlong.handling == "penalty" and not 0 < rl.overlong.buffer_tokens <= rl.sampling.max_tokens:
            raise ValueError(
                f"rl.overlong.buffer_tokens: found {rl.overlong.buffer_tokens}; the penalty grows over them, "
                f"wanted 1 to rl.sampling.max_tokens = {rl.sampling.max_tokens}"
            )
        if overlap.max_policy_lag is None:
            if overlap.minibatches > 1 or overlap.continue_on_new_weights:
                raise ValueError(
                    "overlap.minibatches and overlap.continue_on_new_weights apply only to overlapped "
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
                "overlap: with sampler.colocate samplers sleep while the learner trains; set only one of them"
            )
        versions = overlap.max_policy_lag + 2  # in use at the same time, plus 1 for work that is redone after a failure
        if self.sampler.max_live_adapters < versions:
            raise ValueError(
                f"sampler.max_live_adapters {self.sampler.max_live_adapters}: overlap.max_policy_lag "
                f"{overlap.max_policy_lag} needs room for {versions} versions; set sampler.max_live_adapters={versions}"
            )
        if rl.refill_rounds and overlap.minibatches * rl.substeps > 1:
            raise ValueError(
                "rl.refill_rounds with overlap refills complete batches; set rl.substeps and overlap.minibatches to 1"
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    def dated(self, day: str) -> JobConfig:
        """The job with `day` as prompt.date, unless it has one."""
        if self.prompt.date is not None:
            return self
        return self.model_copy(update={"prompt": self.prompt.model_copy(update={"date": day})})

    def with_threads(self, learner: int | None, sampler: int | None) -> JobConfig:
        """The job with these thread counts where it sets none."""
        of_learner = self.learner.model_copy(update={"threads": self.learner.threads or learner})
        of_sampler = self.sampler.model_copy(update={"threads": self.sampler.threads or sampler})
        return self.model_copy(update={"learner": of_learner, "sampler": of_sampler})

    @property
    def sampler_device(self) -> Literal["cpu", "cuda"]:
        return self.sampler.device
