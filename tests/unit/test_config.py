"""The job's configuration: closed, with the way out in every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config import JobConfig, dump_config, keys, load_config, parse_config
from rlsys.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
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
    # rate 0.8, warm-up of 2: 0.4 and 0.8; then x = 1/4, 1/2, 3/4, 1 over the 4 steps that are left of 6, and 1 after
    (["schedule=linear"], [0.4, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
    # 0.25 + 0.75 (1 - x) = 0.8125, 0.625, 0.4375, 0.25
    (["schedule=linear", "final_share=0.25"], [0.4, 0.8, 0.65, 0.5, 0.35, 0.2, 0.2]),
    # over the 2 steps that are left of 4: x = 1/2, 1
    (["schedule=linear", "decay_steps=4"], [0.4, 0.8, 0.4, 0.0, 0.0, 0.0, 0.0]),
    # (1 + cos(pi x)) / 2 = (1 + sqrt(1/2)) / 2 = 0.853553, 0.5, (1 - sqrt(1/2)) / 2 = 0.146447, 0
    (["schedule=cosine"], [0.4, 0.8, 0.682843, 0.4, 0.117157, 0.0, 0.0]),
    # 0.1 + 0.9 * 0.853553 = 0.868198, 0.55, 0.231802, 0.1
    (["schedule=cosine", "final_share=0.1"], [0.4, 0.8, 0.694558, 0.44, 0.185442, 0.08, 0.08]),
]


@pytest.mark.parametrize(("options", "wanted"), SCHEDULES)
def test_the_learning_rate_comes_down_by_its_schedule(options: list[str], wanted: list[float]) -> None:
    overrides = ["learning_rate=0.8", "warmup_steps=2", *options]
    optim = parse_config(SMALL, [f"rl.optim.{override}" for override in overrides]).rl.optim
    found = [optim.at(step, 6).learning_rate for step in range(7)]
    assert found == pytest.approx(wanted, abs=1e-6)


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
    (["rl.sampling.top_p=0.9"], ["rl.sampling", "top_p: 1.0"]),
    (["rl.sampling.top_k=20"], ["rl.sampling", "top_k: -1"]),
    (["rl.sampling.temperature=0"], ["rl.sampling.temperature", "greater than or equal to 0.01"]),
    (["rl.advantages={baseline: none, normalise: std}"], ["rl.advantages", "baseline: none", "normalise: none"]),
    (["rewards.format_pattern='(a'"], ["rewards.format_pattern", "no regular expression", "missing )"]),
    (["rl.loss.name=grpo"], ["rl.loss.name", "importance_sampling", "'grpo'"]),
    (["lora.rank=64"], ["lora.rank 64", "sampler.max_lora_rank=64"]),
    (["lora.train_attn=false", "lora.train_mlp=false"], ["lora trains nothing", "train_unembed"]),
    (["lora.train_unembed=true", "sampler.num_gpus=1"], ["lora.train_unembed", "set lora.train_unembed=false"]),
    (["model.make.head_dim=16"], ["model.make.head_dim", "16"]),
    (["rl.sampling.max_tokens=128"], ["model.max_length 128", "max_tokens"]),
    (["model.path=some/model"], ["exactly one of model.path", "model.make"]),
    (["model.dtype=float16"], ["model.dtype", "float32", "bfloat16"]),
    (["task.min_operations=9"], ["task.min_operations", "task.max_operations"]),
    (["run.name=a/b"], ["run.name", "pattern"]),
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
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


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
