"""Section ``learner``: the ranks that train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsys.config.key_types import Core, Cpus, Gpus, Processes, Resources, Strategy
from rlsys.config.section import Section


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
