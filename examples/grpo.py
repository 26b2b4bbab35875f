"""GRPO in forty lines: sample groups, reward, centre, one importance-sampling step.

The reward is the share of tokens from the lower half of the vocabulary.

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
        asked = [sampler.sample(types.ModelInput.from_ints(prompt), group_size, params) for _ in range(groups)]
        data, rewards = [], []
        for answer in asked:
            sequences = answer.result().sequences
            rewards_G = np.array([np.mean(np.array(one.tokens) < 20_480) for one in sequences])
            rewards.append(rewards_G.mean())
            for one, advantage in zip(sequences, rewards_G - rewards_G.mean(), strict=True):
                ids, before = [*prompt, *one.tokens], len(prompt) - 1  # positions that predict prompt tokens
                inputs = {
                    "target_tokens": ids[1:],
                    "logprobs": [0.0] * before + one.logprobs,
                    "advantages": [0.0] * before + [advantage] * len(one.tokens),
                    "weights": [0.0] * before + [1.0] * len(one.tokens),
                }
                data.append(types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs))
        passed = policy.forward_backward(data, "importance_sampling")
        policy.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        history.append(float(np.mean(rewards)))
        print(f"step {step}: reward {history[-1]:.3f}, ratio {passed.result().metrics['ratio:mean']:.4f}")
    return history


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
