"""Values that a later part cannot take are refused at once by their key, and what is accepted works there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlsys.architectures.support import refuse_unsupported_job
from rlsys.client.config import ServiceConfig
from rlsys.config import LoraSection, SourceSection, parse_config
from rlsys.config.key_types import checked_address
from rlsys.data.problems import Epochs
from rlsys.errors import ConfigError, DatumError, LossError, SamplingError
from rlsys.losses import resolve
from rlsys.run_state.ledger import Ledger
from rlsys.sampler.engine_args import numpy_seed
from rlsys.sampler.requests import group_seeds
from rlsys.tasks import build
from rlsys.types import AdamParams, Datum, ModelInput, SamplingParams

SMALL = "run: {name: a}\nmodel: {make: {}}\n"

REFUSED = [
    # override, the key; the part that could not take it is in the comment
    ("run.seed=-1", "run.seed"),  # numpy
    ("run.seed=9223372036854775808", "run.seed"),  # the ledger's head, int64
    ("watchdog.stages.learn=1e10", "watchdog.stages.learn"),  # poll()
    ("rewards.timeout_s=1e300", "rewards.timeout_s"),
    ("cluster.object_store_gb=0.01", "cluster.object_store_gb"),  # Ray
    ("cluster.address=head:99999", "cluster.address"),  # a socket
    ("cluster.address=head:0", "cluster.address"),
    ("cluster.address=head", "cluster.address"),
    ("learner.num_cpus=0.00001", "learner.num_cpus"),  # Ray
    ("learner.num_gpus=1.5", "learner.num_gpus"),
    ("learner.resources={CPU: 1}", "learner.resources"),
    ("sampler.resources={node: -1}", "sampler.resources"),
    ("sampler.resources={node: 0}", "sampler.resources"),
    ("learner.threads=1000000000000", "learner.threads"),  # torch
    ("learner.cores=[-1]", "learner.cores.0"),  # the system
    ("sampler.max_num_seqs=100000", "sampler.max_num_seqs"),  # vLLM
    ("sampler.max_lora_rank=1000", "sampler.max_lora_rank"),
    ("model.max_length=1000000000000", "model.max_length"),
    ("rl.optim.eps=0", "rl.optim.eps"),  # AdamW: 0/0
    ("rl.optim.eps=1e-60", "rl.optim.eps"),
    ("tracking.project=a/b", "tracking.project"),  # wandb
    ("tracking.project=", "tracking.project"),
    (f"tracking.project={'a' * 129}", "tracking.project"),
    ("tracking.tags=['']", "tracking.tags.0"),
    (f"tracking.tags=[{'a' * 65}]", "tracking.tags.0"),
]


@pytest.mark.parametrize(("override", "key"), REFUSED, ids=[row[0][:40] for row in REFUSED])
def test_what_a_later_part_cannot_take_is_refused_by_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^job\.yaml: {key}\b") as caught:
        parse_config(SMALL, [override], "job.yaml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.make.num_heads=3", "set model.make.num_kv_heads=1"),
        ("model.make.head_dim=320", "model.make.head_dim: head_dim is 320"),
        ("sampler.tensor_parallel_size=8", "set sampler.tensor_parallel_size=4"),
    ],
)
def test_a_model_that_no_engine_could_serve_is_refused_before_it_is_made(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_unsupported_job(parse_config(SMALL, [override]))
    assert named in str(caught.value)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1])
def test_a_large_seed_serves_every_part(seed: int) -> None:
    config = parse_config(SMALL, [f"run.seed={seed}", "task.train_problems=64", "task.eval_problems=8"])
    assert build(config.task, seed).problems("train")
    epochs = Epochs(64, 8, seed)
    ledger = Ledger(epochs)
    ledger.draw(1, 8)
    assert Ledger.from_bytes(ledger.to_bytes(), epochs).step == ledger.step
    params = config.rl.sampling.params(seed=seed * 1_000_003 + 25)
    assert params.seed is not None
    assert all(0 <= one < 2**63 - 1000 for one in group_seeds(params.seed, np.arange(4)))  # vLLM adds the child


@pytest.mark.parametrize("seed", [0, 21_000, 2**32 - 1, 2**32, (2**63 - 1) * 1000 + 7])
def test_a_seed_of_an_engine_is_one_that_numpy_takes(seed: int) -> None:
    np.random.RandomState(numpy_seed(seed))  # as numpy.random.seed, which an engine calls
    assert numpy_seed(seed) == seed or seed >= 2**32


ADDRESSES = ["10.0.0.1:6379", "head.example:1", "[::1]:6379", "ray://head:10001", "auto", "local", None]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_of_ray_is_taken(address: str | None) -> None:
    assert checked_address(address) == address


@pytest.mark.parametrize(
    "address", ["head:", ":6379", "http://head:8265", "a b:1", "head:65536", "head:-1", "head:x", "\n"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="as Ray's address; wanted host:port"):
        checked_address(address)


NOT_FINITE = [math.inf, -math.inf, math.nan]
FLOATS = [
    "rl.optim.learning_rate",
    "rl.optim.weight_decay",
    "rl.optim.grad_clip_norm",
    "rl.optim.eps",
    "rl.sampling.temperature",
    "rl.advantages.kl_coef",
    "rl.overlong.penalty",
    "rl.loss.importance_cap",
    "rl.loss.params.clip",
    "rewards.correct",
    "rewards.format",
    "rewards.length",
    "rewards.solved_at",
    "rewards.failed_grade",
    "rewards.timeout_s",
    "eval.temperature",
    "lora.alpha",
    "checks.max_canary_diff",
    "checks.max_mean_logprob_diff",
    "learner.num_cpus",
    "learner.num_gpus",
    "learner.resources.x",
    "learner.custom_graph_gb",
    "sampler.kv_cache_gb",
    "cluster.object_store_gb",
    "watchdog.limit_s",
    "turns.reply_timeout_s",
    "task.eval_share",
    "model.make.supervised.learning_rate",
    "task.options.x",
    "prompt.template_options.x",
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_a_key_takes_finite_numbers_alone(key: str, text: str) -> None:
    for overrides in ([f"{key}={text}"], [f"{key.rpartition('.')[0]}={{{key.rpartition('.')[2]}: {text}}}"]):
        with pytest.raises(ConfigError, match=rf"{key}\b.*finite number"):
            parse_config(SMALL, overrides)


@pytest.mark.parametrize("key", [key for key in FLOATS if ".options." not in key and "template" not in key])
@pytest.mark.parametrize("text", ["'nan'", "inf", "Infinity", "'1e999'"])
def test_a_number_in_words_is_no_way_round(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}\b.*(finite number|valid number)"):
        parse_config(SMALL, [f"{key}={text}"])


@pytest.mark.parametrize("value", [*NOT_FINITE, 10**400, np.float32("nan"), np.float64("inf"), True, "1"])
def test_a_client_takes_finite_numbers_alone(value: float) -> None:
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        with pytest.raises(ConfigError, match=rf"AdamParams\.{name}: found"):
            AdamParams(**{name: value})
    for name in ("temperature", "top_p"):
        with pytest.raises(SamplingError, match=rf"SamplingParams\.{name}: found"):
            SamplingParams(**{name: value})  # type: ignore[arg-type]  # the names are those of numbers
    with pytest.raises(LossError, match="wanted a finite number"):
        resolve("ppo", {"clip_low_threshold": value})


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_clients_sections_and_datums_take_finite_numbers_alone(value: float) -> None:
    for name in ("lora_alpha", "start_timeout_s", "room_timeout_s", "gap_timeout_s"):
        with pytest.raises(ValueError, match=rf"{name}\n.*finite number"):
            ServiceConfig(**{name: value})
    with pytest.raises(ValueError, match="finite number"):
        LoraSection(alpha=value)
    for name in ("logprobs", "advantages", "weights"):
        with pytest.raises(DatumError, match=name):
            Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], name: [0.0, value]})


def test_stop_ids_are_ids() -> None:
    for stop in ([-1], [2**31], [2**70]):
        with pytest.raises(SamplingError, match="stop"):
            SamplingParams(stop=stop)
    assert SamplingParams(stop=[0, 2**31 - 1]).stop == [0, 2**31 - 1]


def test_a_path_of_a_data_set_is_one() -> None:
    with pytest.raises(ValueError, match="wanted a path"):
        SourceSection(path="")
