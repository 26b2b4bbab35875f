"""Thirty wrong jobs and more: each is refused before anything starts, with the key's name and what would be right."""

from __future__ import annotations

import pytest

from rlsys.config import parse_config
from rlsys.errors import ConfigError

SMALL = "run: {name: a}\nmodel: {make: {}}\n"
NAMED = "run: {name: a}\nmodel: {path: Qwen/Qwen3-0.6B}\n"

WRONG = [
    # what is wrong: text, overrides, the key that the message names, the suggestion that it makes
    ("a misspelled key", SMALL, ["rl.stepz=3"], "rl.stepz", "did you mean 'steps'"),
    ("a misspelled section", SMALL, ["samplr.num_workers=2"], "samplr", "did you mean 'sampler'"),
    ("another library's name", SMALL, ["rl.optim.lr=1e-3"], "rl.optim.lr", "learning_rate"),
    ("a key of another section", SMALL, ["learner.kv_cache_gb=2"], "learner.kv_cache_gb", "sampler.kv_cache_gb"),
    ("a key at the top", SMALL, ["token_budget=2048"], "token_budget", "learner.token_budget"),
    (
        "a key that is gone",
        SMALL,
        ["run.stage_timeout_s=60"],
        "run.stage_timeout_s",
        "replaced: set watchdog.limit_s, or a limit per stage",
    ),
    ("a plural", SMALL, ["sampler.num_worker=2"], "sampler.num_worker", "did you mean 'num_workers'"),
    ("text for a number", SMALL, ["rl.steps=many"], "rl.steps", "valid integer"),
    ("a fraction for a count", SMALL, ["rl.problems_per_step=3.5"], "rl.problems_per_step", "valid integer"),
    ("a list for a number", SMALL, ["learner.threads=[1]"], "learner.threads", "valid integer"),
    ("text for a switch", SMALL, ["sampler.colocate=perhaps"], "sampler.colocate", "valid boolean"),
    ("a number for a list", SMALL, ["sampler.nodes=3"], "sampler.nodes", "valid list"),
    ("text for resources", SMALL, ["learner.resources=gpu"], "learner.resources", "valid dictionary"),
    ("a value for a section", SMALL, ["rl=3"], "rl", "dictionary"),
    ("fewer than no steps", SMALL, ["rl.steps=-1"], "rl.steps", "greater than or equal to 0"),
    ("a group of one", SMALL, ["rl.samples_per_problem=1"], "rl.samples_per_problem", "greater than or equal to 2"),
    ("no learner", SMALL, ["learner.num_workers=0"], "learner.num_workers", "greater than or equal to 1"),
    ("no sampler", SMALL, ["sampler.num_workers=0"], "sampler.num_workers", "greater than or equal to 1"),
    ("no core", SMALL, ["learner.num_cpus=0"], "learner.num_cpus", "equal to 0.0001"),
    (
        "more than the GPU",
        SMALL,
        ["sampler.gpu_memory_utilization=1.5"],
        "gpu_memory_utilization",
        "less than or equal",
    ),
    ("one live adapter", SMALL, ["sampler.max_live_adapters=1"], "sampler.max_live_adapters", "equal to 2"),
    ("a rank that vLLM lacks", SMALL, ["sampler.max_lora_rank=1024"], "sampler.max_lora_rank", "equal to 512"),
    ("no checkpoint kept", SMALL, ["checkpoint.keep=0"], "checkpoint.keep", "greater than or equal to 1"),
    ("a watchdog that never sleeps", SMALL, ["watchdog.stages.sample=0"], "watchdog.stages.sample", "greater than 0"),
    ("greedy training", SMALL, ["rl.sampling.temperature=0"], "rl.sampling.temperature", "equal to 0.01"),
    ("a discount of one", SMALL, ["rl.advantages.kl_discount=1"], "rl.advantages.kl_discount", "less than 1"),
    ("a cut distribution", SMALL, ["rl.sampling.top_p=0.9"], "top_p", "it is always 1.0"),
    ("top_k in training", SMALL, ["rl.sampling.top_k=20"], "top_k", "it is always -1"),
    ("an unknown loss", SMALL, ["rl.loss.name=grpo"], "rl.loss.name", "'importance_sampling', 'ppo'"),
    (
        "an unknown baseline",
        SMALL,
        ["rl.advantages.baseline=median"],
        "rl.advantages.baseline",
        "'mean', 'leave_one_out' or 'none'",
    ),
    ("an unknown precision", SMALL, ["model.dtype=float8"], "model.dtype", "'float32', 'bfloat16' or 'float16'"),
    ("a stage that is none", SMALL, ["watchdog.stages={learning: 60}"], "'learning'", "advantage, learn, sync, save"),
    ("an unknown placement", SMALL, ["sampler.placement=TIGHT"], "sampler.placement", "'STRICT_PACK'"),
    ("a head that CPU attention lacks", SMALL, ["model.make.head_dim=48"], "model.make.head_dim", "multiple of 32"),
    ("a name with a slash", SMALL, ["run.name=a/b"], "run.name", "no path"),
    ("two models", SMALL, ["model.path=some/model"], "model.path", "exactly one"),
    ("no model", "run: {name: a}\nmodel: {}\n", [], "model.path", "exactly one"),
    ("no model section", "run: {name: a}\n", [], "model is required", "model: {make: {}}"),
    ("no run section", "model: {make: {}}\n", [], "run is required", "run: {name: first}"),
    ("no name", "run: {}\nmodel: {make: {}}\n", [], "run.name is required", "run.name=first"),
    (
        "an adapter wider than its slot",
        SMALL,
        ["lora.rank=64", "sampler.max_lora_rank=16"],
        "lora.rank 64",
        "set sampler.max_lora_rank=64",
    ),
    ("nothing to train", SMALL, ["lora.train_attn=false", "lora.train_mlp=false"], "train_unembed", "to true"),
    ("no room for a prompt", SMALL, ["rl.sampling.max_tokens=128"], "model.max_length 128", "max_tokens"),
    ("a longest below the shortest", SMALL, ["task.min_operations=9"], "task.min_operations", "task.max_operations"),
    (
        "an output layer on a GPU sampler",
        NAMED,
        ["lora.train_unembed=true", "sampler.num_gpus=1", "model.dtype=bfloat16"],
        "lora.train_unembed",
        "set lora.train_unembed=false",
    ),
    (
        "parallel without its GPUs",
        NAMED,
        ["sampler.tensor_parallel_size=4", "sampler.num_gpus=1", "model.dtype=bfloat16"],
        "sampler.tensor_parallel_size 4",
        "set sampler.num_gpus=4",
    ),
    (
        "pairs that do not pair",
        NAMED,
        ["sampler.colocate=true", "sampler.num_workers=2"],
        "sampler.num_workers 2",
        "make them equal",
    ),
    (
        "a place for who follows another",
        NAMED,
        ["sampler.colocate=true", "sampler.nodes=[10.0.0.1]"],
        "sampler.nodes",
        "is placed with its rank",
    ),
    (
        "float32 on a GPU sampler",
        NAMED,
        ["sampler.num_gpus=1", "model.dtype=float32"],
        "model.dtype float32",
        "set model.dtype=bfloat16",
    ),
    (
        "a part of a GPU in float32",
        NAMED,
        ["sampler.num_gpus=0.5", "model.dtype=float32"],
        "model.dtype float32",
        "model.dtype=float16 on a GPU older than compute capability 8.0, or sampler.num_gpus=0",
    ),
    ("several GPUs for one rank", NAMED, ["learner.num_gpus=2"], "learner", "learner.num_workers=2"),
    (
        "a base shared by one",
        NAMED,
        ["learner.shard_base=true"],
        "learner.shard_base",
        "set learner.num_workers to 2 or more",
    ),
]


@pytest.mark.parametrize(
    ("text", "overrides", "key", "suggestion"), [row[1:] for row in WRONG], ids=[r[0] for r in WRONG]
)
def test_a_wrong_job_is_refused_with_its_key_and_a_suggestion(
    text: str, overrides: list[str], key: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, source="job.yaml")
    message = str(caught.value)
    assert key in message and suggestion in message, message
    assert len(message.splitlines()) == 1, "one mistake is one line"


def test_there_are_thirty_and_more() -> None:
    assert len(WRONG) >= 30
