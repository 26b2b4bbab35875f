"""The code blocks of Tinker's tutorial 202, "Loss Functions", in their order; the model's name alone is another.

One line cannot run with any SDK from 0.6 to 0.38: `ce_logprobs[-3:]`, since a TensorData takes no index. Here its
tensor is asked.
"""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

warnings.filterwarnings("ignore", message="IProgress not found")

import numpy as np  # noqa: E402
import tinker  # noqa: E402
import torch  # noqa: E402
from tinker import TensorData  # noqa: E402

from tests.serve.programs import formulas  # noqa: E402
from tests.serve.programs.sdk import inputs_of, logprobs_of  # noqa: E402
from tests.serve.programs.seen import MODEL, check, end, step  # noqa: E402

MODEL_NAME = MODEL
CLOSE = 1e-4


async def tutorial() -> dict[str, Any]:
    service_client = tinker.ServiceClient()
    training_client = await service_client.create_lora_training_client_async(base_model=MODEL_NAME, rank=16)
    tokenizer = training_client.get_tokenizer()
    print(f"Training client ready for {MODEL_NAME}")

    # -- SFT datum (for cross_entropy) --
    prompt_text = "The capital of France is"
    target_text = " Paris."

    prompt_ids = tokenizer.encode(prompt_text)
    target_ids = tokenizer.encode(target_text)
    all_ids = prompt_ids + target_ids

    model_input_sft = tinker.ModelInput.from_ints(all_ids[:-1])
    # Target tokens: the next token at each position
    sft_target_tokens = all_ids[1:]
    # Weights: 0 for prompt positions, 1 for completion positions
    sft_weights = [0.0] * (len(prompt_ids) - 1) + [1.0] * len(target_ids)

    sft_datum = tinker.Datum(
        model_input=model_input_sft,
        loss_fn_inputs={
            "target_tokens": TensorData.from_torch(torch.tensor(sft_target_tokens)),
            "weights": TensorData.from_torch(torch.tensor(sft_weights)),
        },
    )

    # -- RL datum (for importance_sampling, ppo, cispo) --
    # Simulate a sampled completion with fake logprobs and advantages
    model_input_rl = tinker.ModelInput.from_ints(all_ids[:-1])
    rl_target_tokens = all_ids[1:]
    # Fake sampling logprobs (as if from a sampler)
    rl_logprobs = [0.0] * (len(prompt_ids) - 1) + [-1.5] * len(target_ids)
    # Positive advantage: this completion was good
    rl_advantages = [0.0] * (len(prompt_ids) - 1) + [1.0] * len(target_ids)

    rl_datum = tinker.Datum(
        model_input=model_input_rl,
        loss_fn_inputs={
            "target_tokens": TensorData.from_torch(torch.tensor(rl_target_tokens)),
            "logprobs": TensorData.from_torch(torch.tensor(rl_logprobs)),
            "advantages": TensorData.from_torch(torch.tensor(rl_advantages)),
        },
    )

    print(f"SFT datum: {len(all_ids) - 1} tokens, {sum(sft_weights):.0f} completion tokens")
    print(f"RL datum: {len(all_ids) - 1} tokens, advantage=+1.0 on completion")

    # Cross-entropy (SFT)
    ce_future = await training_client.forward_backward_async([sft_datum], loss_fn="cross_entropy")
    ce_result = await ce_future.result_async()
    print(f"cross_entropy loss:sum = {ce_result.metrics['loss:sum']:.4f}")

    # Importance sampling (REINFORCE with IS correction)
    is_future = await training_client.forward_backward_async([rl_datum], loss_fn="importance_sampling")
    is_result = await is_future.result_async()
    print(f"importance_sampling loss:sum = {is_result.metrics['loss:sum']:.4f}")

    # PPO (clipped objective)
    ppo_future = await training_client.forward_backward_async([rl_datum], loss_fn="ppo")
    ppo_result = await ppo_future.result_async()
    print(f"ppo loss:sum = {ppo_result.metrics['loss:sum']:.4f}")

    # CISPO (clipped ratio weighting the log-prob)
    cispo_future = await training_client.forward_backward_async([rl_datum], loss_fn="cispo")
    cispo_result = await cispo_future.result_async()
    print(f"cispo loss:sum = {cispo_result.metrics['loss:sum']:.4f}")

    # Cross-entropy returns logprobs of target tokens
    ce_logprobs = ce_result.loss_fn_outputs[0]["logprobs"].to_torch()
    print("cross_entropy logprobs (last 3 tokens):", ce_logprobs[-3:])

    # Importance sampling also returns logprobs
    is_logprobs = is_result.loss_fn_outputs[0]["logprobs"].to_torch()
    print("importance_sampling logprobs (last 3):", is_logprobs[-3:])

    # Tighter clipping
    ppo_tight_future = await training_client.forward_backward_async(
        [rl_datum],
        loss_fn="ppo",
        loss_fn_config={"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    )
    ppo_tight = await ppo_tight_future.result_async()
    print(f"PPO (tight clip) loss:sum = {ppo_tight.metrics['loss:sum']:.4f}")

    # Wider clipping (more like vanilla IS)
    ppo_wide_future = await training_client.forward_backward_async(
        [rl_datum],
        loss_fn="ppo",
        loss_fn_config={"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
    )
    ppo_wide = await ppo_wide_future.result_async()
    print(f"PPO (wide clip) loss:sum = {ppo_wide.metrics['loss:sum']:.4f}")

    def logprob_squared_loss(data: Any, logprobs_list: Any) -> Any:
        """Sum of squared target-token logprobs. Penalizes low-confidence predictions."""
        total_loss = torch.tensor(0.0)
        for logprobs in logprobs_list:
            # logprobs close to 0 = high confidence (small penalty)
            # logprobs << 0 = low confidence (large penalty)
            total_loss = total_loss + (logprobs**2).sum()
        return total_loss, {"logprob_sq": total_loss.item()}

    custom_future = await training_client.forward_backward_custom_async([sft_datum], logprob_squared_loss)
    custom_result = await custom_future.result_async()
    print(f"Custom loss metrics: {custom_result.metrics}")

    def dpo_loss(data: Any, logprobs_list: Any) -> Any:
        # data[0] = preferred, data[1] = rejected
        preferred_lp = logprobs_list[0].sum()
        rejected_lp = logprobs_list[1].sum()
        beta = 0.1
        loss = -torch.nn.functional.logsigmoid(beta * (preferred_lp - rejected_lp))
        return loss, {"dpo_loss": loss.item()}

    # The tutorial defines dpo_loss and leaves the call to the reader: the pair of one datum with itself.
    dpo_future = await training_client.forward_backward_custom_async([sft_datum, sft_datum], dpo_loss)
    return {
        "sft": sft_datum,
        "rl": rl_datum,
        "cross_entropy": ce_result,
        "importance_sampling": is_result,
        "ppo": ppo_result,
        "cispo": cispo_result,
        "tight": ppo_tight,
        "wide": ppo_wide,
        "custom": custom_result,
        "dpo": await dpo_future.result_async(),
    }


def compare(saw: dict[str, Any]) -> None:
    """Each number against the formula in the tutorial, from the log-probabilities that came with it."""
    sft, rl = inputs_of(saw["sft"]), inputs_of(saw["rl"])
    (p,) = logprobs_of(saw["cross_entropy"])
    for loss, name, config in (
        ("cross_entropy", "cross_entropy", {}),
        ("importance_sampling", "importance_sampling", {}),
        ("ppo", "ppo", {}),
        ("cispo", "cispo", {}),
        ("ppo", "tight", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("ppo", "wide", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}),
    ):
        (q,) = logprobs_of(saw[name])
        check(f"{name}: the same log-probabilities", q, p, 1e-5)
        wanted = formulas.of(loss, q, sft if loss == "cross_entropy" else rl, config)
        check(f"{name}: loss:sum", saw[name].metrics["loss:sum"], wanted, CLOSE)
    check("the custom loss", saw["custom"].metrics["logprob_sq"], float((p**2).sum()), CLOSE)
    check("dpo_loss of a pair of equals", saw["dpo"].metrics["dpo_loss"], float(np.log(2.0)), CLOSE)


if __name__ == "__main__":
    with step("tutorial 202"):
        compare(asyncio.run(tutorial()))
    end()
