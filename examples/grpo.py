"""GRPO in forty lines: sample groups, compute rewards and advantages, make one importance-sampling step.

The reward is the share of a completion's tokens with an id below 20,480.

python examples/grpo.py MODEL_FOLDER [STEPS]
"""

import sys

import numpy as np

import rlsys
from rlsys import types


def main(base_model: str, steps: int = 8, groups: int = 4, group_size: int = 8, max_tokens: int = 8) -> list[float]:
    policy = rlsys.ServiceClient().create_lora_training_client(base_model=base_model, rank=8)
    prompt = policy.get_tokenizer().encode("The capital of France is")
    params = types.SamplingParams(max_tokens=max_tokens, stop=[])
    history = []
    for step in range(steps):
        sampler = policy.save_weights_and_get_sampling_client()
        futures = [sampler.sample(types.ModelInput.from_ints(prompt), group_size, params) for _ in range(groups)]
        data, rewards = [], []
        for future in futures:
            sequences = future.result().sequences
            rewards_G = np.array([np.mean(np.array(sequence.tokens) < 20_480) for sequence in sequences])
            rewards.append(rewards_G.mean())
            for sequence, advantage in zip(sequences, rewards_G - rewards_G.mean(), strict=True):
                ids, context = [*prompt, *sequence.tokens], len(prompt) - 1  # positions that predict prompt tokens
                inputs = {
                    "target_tokens": ids[1:],
                    "logprobs": [0.0] * context + sequence.logprobs,
                    "advantages": [0.0] * context + [advantage] * len(sequence.tokens),
                    "weights": [0.0] * context + [1.0] * len(sequence.tokens),
                }
                data.append(types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs))
        gradients = policy.forward_backward(data, "importance_sampling")
        policy.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        history.append(float(np.mean(rewards)))
        print(f"step {step}: reward {history[-1]:.3f}, ratio {gradients.result().metrics['ratio:mean']:.4f}")
    return history


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
