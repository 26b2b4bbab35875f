"""The job's configuration: closed, with the way out in every refusal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rlsys.config import JobConfig, dump_config, keys, load_config, parse_config
from rlsys.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = "run: {name: a}\nmodel: {make: {}}\n"

# The interface: a key is added or removed here in the same change, with a line in CHANGELOG.md.
FROZEN_KEYS = (Path(__file__).parent / "config_keys.txt").read_text().split()


def test_the_keys_of_a_job_are_the_frozen_list() -> None:
    assert sorted(keys()) == sorted(FROZEN_KEYS)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).run.name


def test_what_is_dumped_loads_to_the_same_job() -> None:
    config = parse_config(SMALL, ["rl.steps=3", "rl.loss.params={clip_ratio: 0.1}", "rl.loss.name=ppo"])
    assert parse_config(dump_config(config)) == config


def test_overrides_beat_the_file_and_make_missing_sections() -> None:
    config = parse_config(SMALL, ["run.seed=7", "rl.optim.learning_rate=1e-3", "rl.sampling.stop=[a, b]"])
    assert (config.run.seed, config.rl.optim.learning_rate, config.rl.sampling.stop) == (7, 1e-3, ["a", "b"])


def test_the_learning_rate_warms_up_linearly_and_stays() -> None:
    optim = parse_config(SMALL, ["rl.optim.learning_rate=0.3", "rl.optim.warmup_steps=3"]).rl.optim
    assert [round(optim.at(step, 25).learning_rate, 12) for step in range(5)] == [0.1, 0.2, 0.3, 0.3, 0.3]


SCHEDULES = [
    # rate 0.8, warm-up of 2: 0.4 and 0.8, which is the first of the 5 steps that are left of 6: x = 0, 1/5, ... 4/5
    (["schedule=linear"], [0.4, 0.8, 0.64, 0.48, 0.32, 0.16, 0.0]),
    # 0.25 + 0.75 (1 - x) = 1, 0.85, 0.7, 0.55, 0.4, and 0.25 after
    (["schedule=linear", "final_share=0.25"], [0.4, 0.8, 0.68, 0.56, 0.44, 0.32, 0.2]),
    # over the 3 steps that are left of 4: x = 0, 1/3, 2/3
    (["schedule=linear", "decay_steps=4"], [0.4, 0.8, 0.533333, 0.266667, 0.0, 0.0, 0.0]),
    # without a warm-up (6 - step) / 6
    (["schedule=linear", "warmup_steps=0"], [0.8, 0.666667, 0.533333, 0.4, 0.266667, 0.133333, 0.0]),
    # (1 + cos(pi x)) / 2 = 1, 0.904508, 0.654508, 0.345492, 0.095492
    (["schedule=cosine"], [0.4, 0.8, 0.723607, 0.523607, 0.276393, 0.076393, 0.0]),
    # 0.1 + 0.9 times the same, and 0.1 after
    (["schedule=cosine", "final_share=0.1"], [0.4, 0.8, 0.731246, 0.551246, 0.328754, 0.148754, 0.08]),
]


@pytest.mark.parametrize(("options", "wanted"), SCHEDULES)
def test_the_learning_rate_comes_down_by_its_schedule(options: list[str], wanted: list[float]) -> None:
    overrides = ["learning_rate=0.8", "warmup_steps=2", *options]  # the last of a key counts
    optim = parse_config(SMALL, [f"rl.optim.{override}" for override in overrides]).rl.optim
    found = [optim.at(step, 6).learning_rate for step in range(7)]
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_every_step_of_a_schedule_teaches_however_few_there_are(schedule: str, warmup: int) -> None:
    options = [f"rl.optim.schedule={schedule}", f"rl.optim.warmup_steps={warmup}", "rl.optim.learning_rate=1"]
    optim = parse_config(SMALL, options).rl.optim
    for steps in range(40, 0, -1):
        rates = [optim.at(step, steps).learning_rate for step in range(steps)]
        assert min(rates) > 0
        assert rates[0] == 1 / max(1, warmup)
        down = rates[max(0, warmup - 1) :]
        assert all(after < before for before, after in itertools.pairwise(down))
        if warmup <= 1 and schedule == "linear":
            assert rates == pytest.approx([(steps - step) / steps for step in range(steps)])


UNEMBEDDING_ON_CUDA = ["lora.train_unembed=true", "sampler.num_gpus=1", "model.dtype=bfloat16"]
WRONG = [
    # overrides, what the message must name: the key, and what would be right
    (["rl.stepz=3"], ["rl.stepz", "did you mean 'steps'"]),
    (["rl.optim.lr=1e-3"], ["rl.optim.lr", "learning_rate"]),
    (["prompt.few_shot=[{prompt: a, answer: b}, {prompt: a, anwser: b}]"], ["prompt.few_shot.1.anwser", "'answer'"]),
    (["task.train={pth: a}"], ["task.train.pth", "did you mean 'path'"]),
    (["learner.learning_rate=1"], ["learner.learning_rate", "did you mean model.make.supervised.learning_rate"]),
    (["samplr.num_workers=2"], ["samplr", "did you mean 'sampler'"]),
    (["rl.steps=-1"], ["rl.steps", "-1", "greater than or equal to 0"]),
    (["rl.steps=many"], ["rl.steps", "'many'", "integer"]),
    (["rl.samples_per_problem=1"], ["rl.samples_per_problem", "greater than or equal to 2"]),
    (["rl.sampling.top_p=0.9"], ["rl.sampling.top_p", "always 1.0"]),
    (["rl.sampling.top_k=20"], ["rl.sampling.top_k", "always -1"]),
    (["watchdog.stages.smaple=60"], ["watchdog.stages", "'smaple'", "start, base, sample", "did you mean 'sample'"]),
    (["rl.sampling.temperature=0"], ["rl.sampling.temperature", "greater than or equal to 0.01"]),
    (["rl.advantages={baseline: none, normalise: std}"], ["rl.advantages", "baseline: none", "normalise: none"]),
    (["rewards.format_pattern='(a'"], ["rewards.format_pattern", "no valid regular expression", "missing )"]),
    (["rl.loss.name=grpo"], ["rl.loss.name", "importance_sampling", "'grpo'"]),
    (["lora.rank=64", "sampler.max_lora_rank=32"], ["lora.rank 64", "sampler.max_lora_rank=64"]),
    (["lora.train_attn=false", "lora.train_mlp=false"], ["no module is trained", "train_unembed"]),
    (UNEMBEDDING_ON_CUDA, ["lora.train_unembed", "set lora.train_unembed=false"]),
    (["model.make.head_dim=16"], ["model.make.head_dim", "16"]),
    (["rl.sampling.max_tokens=128"], ["model.max_length 128", "max_tokens"]),
    (["model.path=some/model"], ["exactly one of model.path", "model.make"]),
    (["model.dtype=float8"], ["model.dtype", "float32", "bfloat16", "float16"]),
    (["task.min_operations=9"], ["task.min_operations", "task.max_operations"]),
    (["run.name=a/b"], ["run.name", "no path"]),
    (["run=3"], ["run", "dictionary", "3"]),
    (["rl.steps"], ["'rl.steps'", "section.key=value"]),
    (["run.name.x=1"], ["run.name.x=1", "name is a value"]),
    (["rl.steps=[1"], ["rl.steps=[1", "YAML"]),
]


@pytest.mark.parametrize(("overrides", "named"), WRONG, ids=lambda value: value[0] if isinstance(value, list) else None)
def test_a_wrong_config_is_refused_with_its_key_and_the_way_out(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL, overrides, source="job.yaml")
    message = str(caught.value)
    assert all(part in message for part in named), message


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL, ["rl.stepz=3", "rl.steps=-1"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("text", "named"), [("run: [", "YAML"), ("- a\n", "list"), ("", "NoneType")])
def test_a_file_that_is_no_job_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sampler_on_cuda_takes_half_precision_and_a_learner_there_any(dtype: str) -> None:
    assert parse_config(SMALL, ["sampler.num_gpus=0.5", f"model.dtype={dtype}"]).sampler_device == "cuda"
    mixed = parse_config(SMALL, ["learner.num_gpus=0.5", "model.dtype=float32"])
    assert (mixed.model.dtype, mixed.sampler_device) == ("float32", "cpu")


def test_a_job_that_names_no_dtype_gets_one_that_its_samplers_can_serve() -> None:
    assert parse_config(SMALL).model.dtype == "float32"
    assert parse_config(SMALL, ["sampler.num_gpus=0"]).model.dtype == "float32"
    for gpus in ("0.5", "1"):
        config = parse_config(SMALL, [f"sampler.num_gpus={gpus}"])
        assert config.model.dtype == "bfloat16"
        assert parse_config(dump_config(config)) == config  # a run directory's copy is of the same job
    with_path = parse_config("run: {name: a}\nmodel: {path: x}\nsampler: {num_gpus: 1}")
    assert with_path.model.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"model\.dtype float32.*set model\.dtype=bfloat16"):
        parse_config(SMALL, ["sampler.num_gpus=1", "model.dtype=float32"])


def test_a_job_cannot_be_changed_once_read() -> None:
    config = parse_config(SMALL)
    assert isinstance(config, JobConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.rl.steps = 3  # type: ignore[misc]  # that it is refused is the claim


@pytest.mark.parametrize("day", ["2026-02-03", "'2026-02-03'"])
def test_a_day_may_be_written_with_or_without_quotes(day: str) -> None:
    config = parse_config(SMALL, [f"prompt.date={day}"])
    assert config.prompt.date == "2026-02-03"
    assert config.dated("2026-02-04").prompt.date == "2026-02-03"
    assert parse_config(SMALL).dated("2026-02-04").prompt.date == "2026-02-04"


def test_a_day_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.date: found 'today'; wanted a day such as 2026-11-29"):
        parse_config(SMALL, ["prompt.date=today"])
