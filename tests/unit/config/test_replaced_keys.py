"""A key of an earlier revision is refused with the key that replaces it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlsys.config import keys, parse_config
from rlsys.config.replaced_keys import REPLACED, replacement
from rlsys.errors import ConfigError

SMALL = "run: {name: a}\nmodel: {make: {}}\n"
CHANGELOG = Path(__file__).parents[3] / "CHANGELOG.md"
DOTTED = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)+\b")


def test_the_keys_that_were_replaced_are_known() -> None:
    assert {"run.stage_timeout_s", "run.start_timeout_s"} <= REPLACED.keys()


@pytest.mark.parametrize("key", REPLACED)
def test_a_replaced_key_is_refused_with_the_new_spelling(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(SMALL, [f"{key}=60"], source="job.yaml")
    assert f"job.yaml: {key} is no key" in str(refused.value)
    assert REPLACED[key] in str(refused.value)


@pytest.mark.parametrize("key", REPLACED)
def test_what_replaces_a_key_is_a_key_of_today_and_the_old_one_is_not(key: str) -> None:
    today = set(keys())
    named = DOTTED.findall(REPLACED[key])
    assert named and set(named) <= today
    assert key not in today


@pytest.mark.parametrize("key", REPLACED)
def test_the_changelog_names_each_replaced_key(key: str) -> None:
    assert f"`{key}`" in CHANGELOG.read_text("utf-8")


def test_a_section_that_is_gone_names_the_replacement_of_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPLACED, "engine.threads", "set sampler.threads")
    with pytest.raises(ConfigError, match=r"engine is no key of 'a job'; its keys were .*set sampler\.threads"):
        parse_config(f"{SMALL}engine: {{threads: 2}}\n")
    assert replacement("engin") is None
