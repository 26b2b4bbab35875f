"""``section.key=value``: a text is taken as the shell hands it over, and nothing is lost in silence."""

from __future__ import annotations

import shlex

import pytest

from rlsys.config import JobConfig, load_command, parse_config
from rlsys.config.overrides import refuse_contradictions
from rlsys.errors import ConfigError

SMALL = "run: {name: a}\nmodel: {make: {}}\n"

TEMPLATES = [
    "{prompt} ...",
    "{prompt}: now",
    "Q: {prompt}",
    "{prompt} # think",
    "# {prompt}",
    "[INST] {prompt} [/INST]",
    "*{prompt}*",
    "&now {prompt}",
    "!{prompt}",
    "@{prompt}",
    "%{prompt}%",
    "`{prompt}`",
    "- {prompt}",
    "? {prompt}",
    "| {prompt}",
    "> {prompt}",
    "'{prompt}' it is",
    "{prompt}\nAnswer:\n",
    " {prompt} ",
    "--- {prompt}",
    "{prompt}\\n",
    "{{prompt}}",
    "<|user|>{prompt}",
    "{prompt}, {prompt}",
    "it's {prompt}",
    '"{prompt}',
    "\t{prompt}",
    "..., {prompt}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_is_taken_as_it_is(template: str) -> None:
    assert parse_config(SMALL, [f"prompt.template={template}"]).prompt.template == template


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("'{prompt}'", "{prompt}"),
        ('"{prompt}\\n"', "{prompt}\n"),
        ("'it''s {prompt}'", "it's {prompt}"),
        ("'# {prompt}' ", "# {prompt}"),
    ],
)
def test_a_text_that_stands_in_quotes_as_a_whole_is_read_as_yaml(given: str, text: str) -> None:
    assert parse_config(SMALL, [f"prompt.template={given}"]).prompt.template == text


@pytest.mark.parametrize("text", ["yes", "no", "none", "1e-4", "2026", "[a", "{a: b}", "a # b", "# a", "*", "'null'"])
def test_no_text_becomes_another_thing(text: str) -> None:
    found = parse_config(SMALL, [f"prompt.system={text}", f"rl.sampling.stop=['{text.strip(chr(39))}', yes]"])
    assert found.prompt.system == text.strip("'")
    assert found.rl.sampling.stop == [text.strip("'"), "yes"]


@pytest.mark.parametrize("null", ["", "null", "~"])
def test_an_optional_text_can_be_unset(null: str) -> None:
    assert parse_config(SMALL + "prompt: {system: s}\n", [f"prompt.system={null}"]).prompt.system is None


REFUSED = [
    ("rl.sampling.stop=###", """'rl.sampling.stop=["###"]'"""),
    ("rl.steps=3 # not 4", "everything after '#' would be dropped"),
    ("task.options.pattern={a} b", """'task.options.pattern="{a} b"'"""),
    ("task.options.pattern=a: b: c", """'task.options.pattern="a: b: c"'"""),
    ("task.options.pattern=it's: a: b", "written as " + shlex.quote('''task.options.pattern="it's: a: b"''')),
    ("rl={steps: 3, steps: 4}", "rl.steps: given twice"),
    ("rl=null", "rl is a section"),
    ("rl=", "rl is a section"),
    ("rl.steps=", "rl.steps: found nothing"),
    ("=3", "wanted section.key=value"),
    ("task.options={a: .nan}", "task.options.a: found .nan; wanted a finite number"),
]


@pytest.mark.parametrize(("override", "named"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_meant_is_refused_with_the_way_to_write_it(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL, [override])
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_refusal_offers_to_paste_is_taken() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL, ["task.options.pattern=it's: a: b"])
    [offered] = shlex.split(str(caught.value).partition("is written as ")[2])
    assert parse_config(SMALL, [offered]).task.options == {"pattern": "it's: a: b"}


def test_a_section_given_whole_changes_the_keys_that_it_names() -> None:
    text = f"{SMALL}rl: {{steps: 7, optim: {{beta1: 0.5, eps: 1}}}}\n"
    found = parse_config(text, ["rl={substeps: 2, optim: {beta1: 0.25}}", "learner={}"]).rl
    assert (found.steps, found.substeps, found.optim.beta1, found.optim.eps) == (7, 2, 0.25, 1)
    assert parse_config(text, ["model.make=null", "model.path=org/name"]).model.path == "org/name"


CONTRADICTIONS = [
    ["rl.steps=3", "rl.steps=4"],
    ["rl={steps: 3}", "rl.steps=4"],
    ["run.name=a", "rl.steps=3", "run.name=b"],
    ["task.options={a: 1}", "task.options.b=2"],
    ["rl.optim={beta1: 0.5}", "rl={optim: {beta1: 0.25}}"],
    ["model.make=null", "model.make.num_layers=2"],
    ["rl.loss.params.clip=0.1", "rl.loss.params={clip: 0.2}"],
    ["eval.samples=4", "eval.samples=8"],
]


@pytest.mark.parametrize("overrides", CONTRADICTIONS, ids=" ".join)
def test_a_command_that_contradicts_itself_is_refused_with_both_sides(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_contradictions(overrides, JobConfig)
    assert sum(override in str(caught.value) for override in overrides) == 2


@pytest.mark.parametrize(
    "overrides",
    [["rl.steps=3", "rl.steps=3"], ["rl={steps: 3}", "rl.substeps=2"], ["model.make={}", "model.make.num_layers=2"]],
    ids=" ".join,
)
def test_a_command_may_say_the_same_twice(overrides: list[str]) -> None:
    refuse_contradictions(overrides, JobConfig)


def test_commands_refuse_contradictions_before_they_read_the_file() -> None:
    with pytest.raises(ConfigError, match=r"rl\.steps is given twice"):
        load_command("no such file.yaml", ["rl.steps=1", "rl.steps=2"])
