"""MinT's example custom_loss.py: pairs of a preferred and a rejected answer, trained with a Bradley-Terry loss.

python examples/pairwise_preference.py MODEL_FOLDER [STEPS]
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F

import rlsys
from rlsys import types

PAIRS = [
    ("The capital of France is", " Paris.", " Rome."),
    ("The capital of Italy is", " Rome.", " Paris."),
    ("One plus one is", " two.", " Paris."),
]


def _to_float_tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32)


def sequence_logprob(logprobs: torch.Tensor, weights: Any) -> torch.Tensor:
    logprob_tensor = logprobs.flatten().float()
    weight_tensor = _to_float_tensor(weights)
    return torch.dot(logprob_tensor, weight_tensor)


def pairwise_preference_loss(
    data: list[types.Datum], logprobs_list: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    if len(data) % 2 != 0:
        raise ValueError("Expected (chosen, rejected) pairs.")

    chosen_scores = []
    rejected_scores = []

    for chosen_datum, rejected_datum, chosen_logprobs, rejected_logprobs in zip(
        data[::2], data[1::2], logprobs_list[::2], logprobs_list[1::2], strict=True
    ):
        chosen_scores.append(sequence_logprob(chosen_logprobs, chosen_datum.loss_fn_inputs["weights"]))
        rejected_scores.append(sequence_logprob(rejected_logprobs, rejected_datum.loss_fn_inputs["weights"]))

    chosen_scores_tensor = torch.stack(chosen_scores)
    rejected_scores_tensor = torch.stack(rejected_scores)
    margins = chosen_scores_tensor - rejected_scores_tensor
    loss = -F.logsigmoid(margins).mean()
    metrics = {
        "loss": float(loss.detach().cpu()),
        "pair_accuracy": float((margins > 0).float().mean().detach().cpu()),
        "mean_margin": float(margins.mean().detach().cpu()),
    }
    return loss, metrics


def datum(tokenizer: Any, prompt: str, answer: str) -> types.Datum:
    """A datum with weight only on the answer's tokens."""
    prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    ids = prompt_ids + answer_ids
    weights = [0.0] * (len(prompt_ids) - 1) + [1.0] * len(answer_ids)
    return types.Datum(types.ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": weights})


def main(base_model: str, steps: int = 10) -> list[dict[str, float]]:
    training_client = rlsys.ServiceClient().create_lora_training_client(base_model=base_model, rank=8)
    tokenizer = training_client.get_tokenizer()
    data = [datum(tokenizer, prompt, answer) for prompt, *answers in PAIRS for answer in answers]
    history = []
    for step in range(steps):
        passed = training_client.forward_backward_custom(data, pairwise_preference_loss)
        training_client.optim_step(types.AdamParams(learning_rate=5e-3))
        history.append(dict(passed.result().metrics))
        print(step, history[-1])
    return history


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
