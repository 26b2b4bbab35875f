"""Section ``learner``: data-parallel ranks that train the adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsys.config.key_types import Core, Cpus, Gpus, Processes, Resources, Strategy
from rlsys.config.section import Section


class LearnerSection(Section):
    num_workers: int = Field(1, ge=1)  # data-parallel ranks
    shard_base: bool = False  # FSDP2 over the frozen base; every rank holds all of the adapter
    num_cpus: Cpus = 1  # of each
    num_gpus: Gpus = 0  # of each: one GPU or a fraction; 0: it computes on the CPU
    resources: Resources = Field(default_factory=dict)  # custom resources of each, such as {learner_node: 0.01}
    nodes: list[str] = Field(default_factory=list)  # node addresses, used round-robin; empty: any node with room
    placement: Strategy = "PACK"
    threads: Processes | None = None  # torch intra-op threads; None: chosen when a run starts
    cores: list[Core] = Field(default_factory=list)  # processors to pin it to; empty: any. Needs one worker on CPU
    token_budget: int = Field(4096, ge=1)  # of one packed micro-batch; a longer sequence is a micro-batch by itself
    share_prompts: bool = True  # compute a prefix that sequences share only once
    logprob_chunk_tokens: int = Field(1024, ge=1)  # rows of logits in memory at a time; fewer for a large vocabulary
    gradient_checkpointing: bool = False  # layers keep only their inputs and recompute in the backward pass
    custom_graph_gb: float | None = Field(
        None, ge=0
    )  # for a custom loss's graphs; None: half of the free memory; 0: none
    entropy: bool = False  # log the policy's entropy at trained tokens, as policy/entropy

    @model_validator(mode="after")
    def _one_gpu_for_each_rank(self) -> LearnerSection:
        if self.num_gpus > 1:
            raise ValueError(
                f"num_gpus {self.num_gpus:g}: a rank computes on one GPU and would leave the others idle; set "
                f"learner.num_gpus=1, and learner.num_workers={self.num_gpus:g} for as many ranks"
            )
        return self

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.num_gpus > 0 else "cpu"
