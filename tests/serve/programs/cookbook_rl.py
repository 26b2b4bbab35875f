"""tinker_cookbook.rl.train on its arithmetic environment with settings that the recipe's command line does not have.

    python -m tests.serve.programs.cookbook_rl '{"kl_penalty_coef": 0.1, ...}'

Keys are those of tinker_cookbook.rl.train.Config, and batch_size, group_size, model_name of its arithmetic environment.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder
from tinker_cookbook.rl.train import AsyncConfig, Config, KLReferenceConfig, StreamMinibatchConfig, main

NESTED: dict[str, Any] = {
    "kl_reference_config": KLReferenceConfig,
    "async_config": AsyncConfig,
    "stream_minibatch_config": StreamMinibatchConfig,
}


def config(model_name: str, batch_size: int, group_size: int, renderer_name: str, **settings: Any) -> Config:
    dataset = ArithmeticDatasetBuilder(
        batch_size=batch_size,
        model_name_for_tokenizer=model_name,
        renderer_name=renderer_name,
        n_batches=100,
        include_fewshot=True,
        group_size=group_size,
    )
    more = {key: NESTED[key](**value) if key in NESTED else value for key, value in settings.items()}
    return Config(
        model_name=model_name,
        renderer_name=renderer_name,
        dataset_builder=dataset,
        recipe_name="recipe_math_rl",
        **more,
    )


if __name__ == "__main__":
    asyncio.run(main(config(**json.loads(sys.argv[1]))))
