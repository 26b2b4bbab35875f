"""Plans: what fits, what does not and by how much, and what is said about it."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from actors.cli import app
from rlsys.architectures.model_shape import known_models, model_shape, of_config
from rlsys.config import JobConfig, parse_config
from rlsys.errors import ConfigError
from rlsys.planning.fit import Node
from rlsys.planning.memory import (
    CUDA_CONTEXT,
    CUDA_GRAPHS,
    GIB,
    MIB,
    activations,
    adapter_parameters,
    engine_asleep,
    kv_bytes_per_token,
    kv_cache_bytes,
    learner_memory,
    micro_batch_tokens,
    sampler_memory,
)
from rlsys.planning.plan import Plan, plan
from tests.waiting import run

ROOT = Path(__file__).parents[3]
SMALL = "run: {name: a}\nmodel: {make: {}}\n"
BIG = Node("here", {"CPU": 8.0}, 64 * GIB)


def job(*overrides: str) -> JobConfig:
    return parse_config(SMALL, overrides)


def planned(*overrides: str, nodes: list[Node] | None = None) -> Plan:
    config = job(*overrides)
    return plan(config, model_shape(config.model), nodes or [BIG])


def test_the_kept_dimensions_give_the_published_numbers_of_parameters() -> None:
    published = {
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
    }
    assert {name: dims.parameters for name, dims in known_models().items()} == published


def test_dimensions_count_every_parameter_that_the_model_has(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    dims = model_shape(parse_config(f"run: {{name: a}}\nmodel: {{path: {tmp_path}}}").model)
    assert dims.parameters == Qwen3ForCausalLM(config).num_parameters()
    assert str(tmp_path) in dims.source


def test_without_the_hub_the_kept_list_is_used_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    dims = model_shape(parse_config("run: {name: a}\nmodel: {path: Qwen/Qwen3-8B}").model)
    assert dims.num_layers == 36
    assert "cannot be reached" in dims.source and "HF_HUB_OFFLINE" in dims.source


def test_a_model_that_nobody_knows_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"Qwen/Qwen3-06B.*did you mean 'Qwen/Qwen3-0.6B'"):
        model_shape(parse_config("run: {name: a}\nmodel: {path: Qwen/Qwen3-06B}").model)


def test_an_architecture_without_a_formula_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'mamba'.*qwen2, qwen3"):
        of_config({"model_type": "mamba"}, "config.json of x")


def test_a_damaged_config_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        model_shape(parse_config(f"run: {{name: a}}\nmodel: {{path: {tmp_path}}}").model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %, of lengths that differ; the heap's slack is no tensor's."""
    import numpy as np
    import torch

    from rlsys import losses
    from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
    from rlsys.datums import DatumBatch
    from rlsys.learner.learner import Learner
    from rlsys.modeling.base_model import initial_model

    config = job(f"model.dtype={dtype}")
    assert config.model.make
    initial_model(config.model.make, build_tokenizer(["1 + 2 = 3"], 320), 128, 0, tmp_path / "base")
    learner = Learner(tmp_path / "base", config.model, config.learner)
    learner.runs.create("a", config.lora, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in learner._model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    offsets = np.concatenate([[0], np.cumsum([66, 65, 64, 63, 62, 61, 60])])
    tokens = int(offsets[-1])
    ids = np.random.default_rng(0).integers(0, 4, tokens).astype(np.int32)  # nothing begins alike
    columns = {name: np.ones(tokens, np.float32) for name in ("logprobs", "advantages", "weights")}
    batch = DatumBatch(ids, ids, offsets, columns)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.forward_backward("a", batch, losses.resolve("importance_sampling", {}))
    assert sum(p.numel() for p in learner.runs["a"].parameters.values()) == adapter_parameters(
        config.lora, model_shape(config.model)
    )
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    monkeypatch.setattr("rlsys.planning.memory.HEAP_SLACK", 1.0)
    assert activations(config, model_shape(config.model), tokens) == pytest.approx(found, rel=0.05)


def test_a_micro_batch_is_the_budget_or_the_whole_batch_or_one_long_sequence() -> None:
    assert micro_batch_tokens(job("learner.token_budget=1000")) == 1000
    assert micro_batch_tokens(job("learner.token_budget=1000000")) == 32 * 8 * 127
    assert micro_batch_tokens(job("learner.token_budget=10")) == 127
    assert micro_batch_tokens(job("learner.token_budget=1000000", "learner.num_workers=2")) == 16 * 8 * 127


def test_memory_grows_with_what_it_is_for() -> None:
    small, dims = job(), model_shape(job().model)

    def learner(*overrides: str) -> int:
        return learner_memory(job(*overrides), dims).peak.total

    def sampler(*overrides: str) -> int:
        return sampler_memory(job(*overrides), dims).peak.total

    assert learner("learner.token_budget=8192") > learner() == learner_memory(small, dims).peak.total
    assert sampler("sampler.kv_cache_gb=0.02") - sampler("sampler.kv_cache_gb=0.01") == GIB // 100
    assert sampler("sampler.max_live_adapters=9") > sampler()
    assert adapter_parameters(job("lora.rank=8").lora, dims) * 2 == adapter_parameters(small.lora, dims)


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_a_kv_cache_is_at_most_twice_what_the_longest_sequences_need(parallel: int) -> None:
    config = job("model.max_length=100", "sampler.max_num_seqs=10", "sampler.num_cpus=1")
    dims = dataclasses.replace(model_shape(config.model), num_layers=3, num_kv_heads=2, head_dim=16)
    section = config.sampler.model_copy(update={"tensor_parallel_size": parallel})
    blocks = 10 * 4 * 32  # of 10 sequences, whose 101 tokens are in 4 blocks of 32
    copies = {1: 1, 2: 1, 4: 2}[parallel]  # 2 heads on 4 workers
    needed = blocks * copies * 3 * 2 * (2 * 16) * 4  # layers, key and value, their size, float32
    assert kv_cache_bytes(section, config.model, dims) == 2 * needed
    small = section.model_copy(update={"kv_cache_gb": needed / GIB})
    assert kv_cache_bytes(small, config.model, dims) == needed


@pytest.mark.parametrize("kernels", [True, False])
def test_an_engine_on_a_cpu_without_kernels_for_bfloat16_is_planned_in_float32(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlsys.architectures.precision.multiplies_bfloat16", lambda: kernels)
    half, full = job("model.dtype=bfloat16"), job("model.dtype=float32")
    dims = model_shape(half.model)
    parts = {name: sampler_memory(config, dims).peak.parts for name, config in (("half", half), ("full", full))}
    for part in ("weights", "packed embeddings", "KV cache", "LoRA slots", "activations"):
        assert parts["half"][part] * (2 if kernels else 1) == parts["full"][part], part
    assert kv_bytes_per_token(half.model, dims, "cuda") * 2 == kv_bytes_per_token(full.model, dims, "cuda")
    said = [one for one in planned("model.dtype=bfloat16").warnings if "no fast kernels" in one]
    assert ["the learner and the sampler round the weights" in one for one in said] == ([] if kernels else [True])


def test_a_sharded_base_leaves_each_rank_a_share() -> None:
    dims = known_models()["Qwen/Qwen3-8B"]
    text = "run: {name: a}\nmodel: {path: x, dtype: bfloat16}\n"

    def weights(*overrides: str) -> int:
        parts = learner_memory(parse_config(text, overrides), dims).phases[-1].parts
        return sum(size for name, size in parts.items() if "weights" in name)

    whole = weights("learner.num_workers=4")
    assert weights("learner.num_workers=4", "learner.shard_base=true") < 0.5 * whole


def test_a_job_that_fits_has_no_shortfall() -> None:
    assert planned().shortfalls == ()


ON_CUDA = ["sampler.num_gpus=1", "model.dtype=bfloat16"]
WRONG_PLACES = [
    # overrides, nodes, what the shortfall must name
    (["sampler.num_cpus=20"], [BIG], ["21 CPU needed, 8 found, 13 too few", "sampler.num_cpus=4"]),
    (ON_CUDA, [BIG], ["1 GPU needed, 0 found", "sampler.num_gpus=0"]),
    (["learner.resources={big: 1}"], [BIG], ["1 big needed, 0 found", "learner.resources"]),
    (["sampler.nodes=[10.0.0.9]"], [BIG], ["no node '10.0.0.9'", "nodes are here"]),
    (["learner.num_cpus=6"], [Node("a", {"CPU": 4.0}, GIB), Node("b", {"CPU": 4.0}, GIB)], ["no single node", "6 CPU"]),
    (
        ["sampler.num_workers=2", "sampler.placement=STRICT_SPREAD"],
        [BIG],
        ["STRICT_SPREAD needs 2 nodes, found 1", "SPREAD"],
    ),
    (
        ["sampler.num_workers=3", "sampler.placement=STRICT_PACK", "sampler.num_cpus=2"],
        [Node("a", {"CPU": 4.0}, GIB), Node("b", {"CPU": 4.0}, GIB)],
        ["STRICT_PACK needs 6 CPU on one node", "use PACK"],
    ),
    (
        ["sampler.num_workers=2", "sampler.num_cpus=3", "learner.num_cpus=2"],
        [Node("a", {"CPU": 4.0}, GIB), Node("b", {"CPU": 4.0}, GIB)],
        ["enough resources in total, but the actors do not fit onto them"],
    ),
    (
        ["sampler.kv_cache_gb=100", "model.max_length=8192", "sampler.max_num_seqs=8192"],
        [BIG],
        ["memory:", "64.00 GiB found", "sampler.kv_cache_gb"],
    ),
    (
        [*ON_CUDA, "model.make.vocab_size=150000", "sampler.gpu_memory_utilization=0.05"],
        [Node("a", {"CPU": 8.0, "GPU": 1.0}, 64 * GIB, GIB)],
        ["GPU memory (unmeasured prediction)", "sampler.gpu_memory_utilization"],
    ),
    (["model.make.num_heads=5"], [BIG], ["model.make.num_heads 5", "model.make.num_kv_heads=1"]),
    (
        ["sampler.tensor_parallel_size=3", "sampler.num_gpus=3", "model.dtype=bfloat16"],
        [Node("a", {"CPU": 8.0, "GPU": 8.0}, 64 * GIB, 80 * GIB)],
        ["sampler.tensor_parallel_size 3", "sampler.tensor_parallel_size=2"],
    ),
]


@pytest.mark.parametrize(("overrides", "nodes", "named"), WRONG_PLACES, ids=lambda value: str(value)[:40])
def test_a_shortfall_says_what_is_missing_and_what_to_set(
    overrides: list[str], nodes: list[Node], named: list[str]
) -> None:
    text = "\n".join(planned(*overrides, nodes=nodes).shortfalls)
    assert all(part in text for part in named), text


WARNED = [
    (["sampler.max_num_seqs=8"], ["sampler.max_num_seqs 8", "sampler.max_num_seqs=256"]),
    (["sampler.kv_cache_gb=0.01"], ["sampler.kv_cache_gb"]),
    (["model.max_length=60"], ["model.max_length 60 leaves 12 tokens"]),
    (["sampler.max_lora_rank=256"], ["sampler.max_lora_rank=16"]),
    (["lora.rank=100", "sampler.max_lora_rank=128"], ["lora.rank=64"]),
    ([*ON_CUDA, "sampler.enforce_eager=true"], ["sampler.enforce_eager=false"]),
    (["rl.optim={schedule: linear, decay_steps: 10}"], ["rl.optim.decay_steps 10", "rl.optim.decay_steps=25"]),
    (["learner.threads=4"], ["learner.num_cpus=4"]),
    (["learner.threads=2", "overlap.max_policy_lag=1"], ["learner.num_cpus=2"]),
    (["model.make.vocab_size=150000"], ["learner.logprob_chunk_tokens=256"]),
]


@pytest.mark.parametrize(("overrides", "named"), WARNED, ids=lambda value: str(value)[:40])
def test_a_setting_that_does_not_serve_the_job_is_named_with_a_better_one(
    overrides: list[str], named: list[str]
) -> None:
    text = "\n".join(planned(*overrides).warnings)
    assert all(part in text for part in named), text


def test_the_token_budget_suggested_fits_and_four_times_as_much_does_not() -> None:
    tight = [Node("here", {"CPU": 8.0}, 7 * GIB)]
    many = "rl.problems_per_step=4096"
    budget = planned(many, nodes=tight).token_budget
    assert budget is not None and budget > 4096
    assert not planned(many, f"learner.token_budget={budget}", nodes=tight).shortfalls
    assert "memory:" in planned(many, f"learner.token_budget={4 * budget}", nodes=tight).shortfalls[0]


def test_a_machine_that_is_too_small_gets_no_budget() -> None:
    assert planned(nodes=[Node("here", {"CPU": 8.0}, 100 * MIB)]).token_budget is None


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command in this process; an error of rlsys is the result's exception."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(ROOT)
    return lambda *arguments: CliRunner().invoke(app, ["plan", *arguments])


def without_a_cluster() -> dict[str, str]:
    """Other tests of the session may have one running, and would have the plan look at it."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def test_the_command_says_what_fits_within_its_time_and_loads_no_heavy_library() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "rlsys", "plan", "configs/quickstart.yaml"]
    done = run(command, cwd=ROOT, env=without_a_cluster())
    assert done.returncode == 0, done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20
    assert "threads: learner 1, sampler 1 (a model of hidden size 96 gains" in done.stdout.replace("\n", " ")
    assert "the job fits" in done.stdout and "KV cache 120" in done.stdout and "token budget" in done.stdout
    script = (
        "import sys; from actors.cli import app; app(['plan', 'configs/quickstart.yaml'], standalone_mode=False); "
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    loaded = run([sys.executable, "-c", script], cwd=ROOT, env=without_a_cluster())
    assert loaded.stdout.strip().endswith("[]"), loaded.stdout + loaded.stderr


def test_the_command_ends_with_code_1_where_the_job_does_not_fit(command: Command) -> None:
    done = command("configs/quickstart.yaml", "sampler.num_cpus=4000")
    assert done.exit_code == 1
    assert "4001 CPU needed" in done.stdout.replace("\n", " ")


def test_predictions_for_a_gpu_are_marked_as_unmeasured(command: Command) -> None:
    done = command("configs/quickstart.yaml", "learner.num_gpus=1", *ON_CUDA)
    assert "UNMEASURED" in done.stdout and done.exit_code == 1


IN_TURNS = [
    "learner.num_gpus=0.5", "sampler.num_gpus=0.5", "sampler.colocate=true",
    "sampler.gpu_memory_utilization=0.5", "model.dtype=bfloat16",
]  # fmt: skip


def on_gpu(gib_of_gpu: float, *overrides: str) -> str:
    node = Node("a", {"CPU": 8.0, "GPU": 1.0}, 64 * GIB, int(gib_of_gpu * GIB))
    return "\n".join(planned(*IN_TURNS, *overrides, nodes=[node]).shortfalls)


def test_contexts_graphs_and_the_copy_of_a_sleeping_engine_are_lines_of_the_plan() -> None:
    config, dims = job(*IN_TURNS), model_shape(job().model)
    assert learner_memory(config, dims).peak.parts["CUDA context"] == CUDA_CONTEXT
    sampler = sampler_memory(config, dims).peak.parts
    assert (sampler["CUDA context"], sampler["CUDA graphs"]) == (CUDA_CONTEXT, CUDA_GRAPHS)
    eager = job(*IN_TURNS, "sampler.enforce_eager=true")
    assert "CUDA graphs" not in sampler_memory(eager, dims).peak.parts
    assert engine_asleep(config) == CUDA_CONTEXT + CUDA_GRAPHS and engine_asleep(eager) == CUDA_CONTEXT
    (_, row) = planned(*IN_TURNS).rows
    assert row.pinned == sampler["weights"] + sampler["LoRA slots"] and row.host_bytes == row.imports + row.pinned
    (_, apart) = planned(*IN_TURNS, "sampler.colocate=false").rows
    assert apart.pinned == 0, "an engine with a GPU of its own never sleeps"
    assert not {"CUDA context", "CUDA graphs"} & learner_memory(job(), dims).peak.parts.keys(), "nor on a CPU"


def test_a_pair_that_takes_turns_fits_beside_what_each_keeps() -> None:
    assert on_gpu(8) == ""
    assert "learner keeps" in on_gpu(4, "sampler.gpu_memory_utilization=0.95")
    assert "set sampler.gpu_memory_utilization=0.8" in on_gpu(4, "sampler.gpu_memory_utilization=0.95")
    assert on_gpu(4, "sampler.gpu_memory_utilization=0.8") == ""
    asleep = on_gpu(
        2, "learner.num_gpus=0.9", "sampler.num_gpus=0.1", "learner.token_budget=65536", "rl.problems_per_step=512"
    )
    assert "a sleeping sampler keeps 1.50 GiB" in asleep and "learner.token_budget" in asleep


def test_a_kv_cache_for_few_of_the_sequences_is_warned_of() -> None:
    node = Node("a", {"CPU": 8.0, "GPU": 1.0}, 64 * GIB, 4 * GIB)
    many = ["model.max_length=4096", "sampler.max_num_seqs=256", "model.make.num_layers=16"]
    (said,) = [one for one in planned(*IN_TURNS, *many, nodes=[node]).warnings if "KV" in one]
    assert "sampler.gpu_memory_utilization 0.5" in said and "of 256 concurrent ones" in said
    assert not [one for one in planned(*IN_TURNS, nodes=[node]).warnings if "KV" in one]


def test_a_machine_that_somebody_has_in_mind_can_be_planned_for(command: Command) -> None:
    there = ["configs/gsm8k-qwen2.5-0.5b.yaml", "--cpus", "8", "--memory-gb", "32"]
    done = command(*there, "--gpu-memory-gb", "24")
    assert done.exit_code == 0 and "8 CPU, 1 GPU" in done.stdout, done.output
    done = command(*there, "--gpu-memory-gb", "8")
    assert done.exit_code == 1 and "unmeasured prediction" in done.stdout
    done = command(*there, "--gpus", "2")
    assert isinstance(done.exception, ConfigError) and "without --gpu-memory-gb" in str(done.exception)


def test_every_kept_model_has_a_source() -> None:
    assert all("config.json" in dims.source for dims in known_models().values())
