"""The TRL side of benchmarks/grpo_step.py: a GRPOTrainer that makes one step of its training loop per turn.

    python -m benchmarks.trl_side FILE     # JSON of the arguments

Its folder comes first on PYTHONPATH (benchmarks/grpo_step.py installs it there); torch, transformers, PEFT and
accelerate are those that rlsys uses. A step lasts from on_step_begin to the next on_step_begin, so it includes all work
of the trainer: generation, rewards, advantages, loss, backward, AdamW.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo_task import REWARDS
from benchmarks.sides import Turn

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Timed(GRPOTrainer):
    """Says how long generation took, and all that comes before the forward pass of the loss."""

    generate_s = rollout_s = mean_length = groups_dropped = 0.0

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = super()._generate_single_turn(*args, **options)
        self.generate_s = time.perf_counter() - began
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        began = time.perf_counter()
        found = super()._generate_and_score_completions(inputs)
        self.rollout_s = time.perf_counter() - began
        metrics = self._metrics["train"]  # emptied at the end of training, before on_train_end
        self.mean_length = metrics["completions/mean_length"][-1]
        self.groups_dropped = metrics["frac_reward_zero_std"][-1]
        return found


class Turns(TrainerCallback):
    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.trainer: Timed

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._over()
        self.turn.wait()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._over()

    def _over(self) -> None:
        trainer = self.trainer
        facts = {
            "generate_s": trainer.generate_s,
            "rollout_s": trainer.rollout_s,
            "mean_length": trainer.mean_length,
            "groups_dropped": trainer.groups_dropped,
        }
        self.turn.over(**facts)


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])
    turns, of = Turns(Turn()), REWARDS[given["reward"]]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [of(completion, "") for completion in completions]

    micro = given["micro_batch"]
    config = GRPOConfig(
        output_dir=given["folder"],
        max_steps=given["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=given["completions"] // micro,
        num_generations=given["group"],
        max_completion_length=given["max_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=given["autocast"],
        use_cpu=True,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": given["dtype"]},
        **given["more"],
    )
    trainer = Timed(
        model=given["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": given["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(given["model"], padding_side="left"),
        peft_config=LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules=LINEARS),
        callbacks=[turns],
    )
    turns.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
