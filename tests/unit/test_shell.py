"""A path means what it means in a shell, at every key and in every command."""

from __future__ import annotations

import pwd
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlsys.cli import app
from rlsys.client.config import ServiceConfig
from rlsys.client.paths import given
from rlsys.config import ModelSection, dump_config, parse_config
from rlsys.errors import ConfigError
from rlsys.shell import as_written, command, expand, variable

SMALL = "run: {name: a}\nmodel: {make: {}}\n"
ROOT_HOME = pwd.getpwnam("root").pw_dir


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/h", "SCRATCH": "/s p", "user": "u", "EMPTY": "", "DOLLAR": "a$b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/h"),
        ("~/", "/h/"),
        ("~/runs", "/h/runs"),
        ("~root/x", f"{ROOT_HOME}/x"),
        ("$SCRATCH/x", "/s p/x"),
        ("${SCRATCH}x", "/s px"),
        ("/data/$user/x", "/data/u/x"),
        ("a/$user.d", "a/u.d"),
        ("a~", "a~"),
        ("a/~/b", "a/~/b"),
        ("./~/b", "./~/b"),
        ("~/$user", "/h/u"),
        (r"a\$user", "a$user"),
        ("a$", "a$"),
        ("$DOLLAR", "a$b"),
        ("a b", "a b"),
        (r"a\\$user", r"a\u"),
        ("org/name", "org/name"),
        ("$5", "$5"),
    ],
)
def test_a_path_is_what_a_shell_makes_of_it(text: str, path: str) -> None:
    assert expand(text) == path
    assert expand(as_written(path)) == path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("$UNSET/runs", "UNSET is not set"),
        ("${UNSET}", "UNSET is not set"),
        ("$EMPTY/runs", "EMPTY is not set or empty"),
        ("~nosuchuser0/x", "./~nosuchuser0"),
        ("", "wanted a path"),
        ("a\0b", "wanted a path"),
        ("${user:-x}", "${NAME}"),
        ("$(pwd)/x", "$NAME"),
        ("${}", "${NAME}"),
    ],
)
def test_a_path_that_would_have_a_hole_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(text)
    assert named in str(caught.value)


def test_a_home_that_is_set_but_empty_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pwd.getpwuid(0).pw_dir
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setenv("HOME", "")
    assert expand("~/runs") == f"{own}/runs"
    monkeypatch.delenv("HOME")
    assert expand("~/runs") == f"{own}/runs"


@pytest.mark.parametrize("text", ["~/x", "$SCRATCH/x", "${SCRATCH}/x"])
def test_every_key_that_is_a_path_takes_the_same_spellings(text: str) -> None:
    path = expand(text)
    job = parse_config(
        "run: {name: a}\nmodel: {}\n",
        [f"run.dir={text}", f"model.path={text}", f"task.train.path={text}", f"task.eval.path={text}"],
    )
    assert job.task.train is not None and job.task.eval is not None
    assert [job.run.dir, job.model.path, job.task.train.path, job.task.eval.path] == [path] * 4
    assert job.run_dir == Path(path) / "a"
    service = ServiceConfig(checkpoints=text, models={"m": text})
    assert [service.checkpoints, service.models["m"], service.source("m"), service.source(text)] == [path] * 4
    assert given(text) == path
    assert given("rlsys://a/weights/$b") == "rlsys://a/weights/$b"


def test_in_a_file_a_lone_tilde_is_the_home_where_a_path_has_to_be() -> None:
    assert parse_config("run: {name: a, dir: ~}\nmodel: {make: {}}\n").run.dir == "/h"


def test_what_a_run_keeps_names_the_same_path_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    job = parse_config(SMALL, [r"run.dir=$SCRATCH/\$UNSET/\\"])
    assert job.run.dir == "/s p/$UNSET/\\"
    monkeypatch.delenv("SCRATCH")
    assert parse_config(dump_config(job)).run.dir == job.run.dir


def test_a_refused_path_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^job\.yaml: run\.dir: found '\$UNSET/runs', and the environment variable"):
        parse_config(SMALL, ["run.dir=$UNSET/runs"], "job.yaml")
    with pytest.raises(ValueError, match=r"UNSET"):
        ModelSection(path="$UNSET")


COMMANDS = [
    ["train", "{}"],
    ["eval", "{}"],
    ["plan", "{}"],
    ["doctor", "{}"],
    ["eval", "j.yaml", "--checkpoint={}"],
    ["eval", "j.yaml", "--out={}"],
    ["export", "{}", "o"],
    ["export", "c", "{}"],
    ["export", "c", "o", "--merged", "--base={}"],
    ["scale", "{}", "--samplers=1"],
    ["ledger", "{}"],
    ["replay", "{}", "--step=1"],
    ["replay", "r", "--step=1", "--out={}"],
    ["report", "{}"],
    ["stop", "{}"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_path_on_a_command_line_is_expanded(words: list[str]) -> None:
    done = CliRunner().invoke(app, [word.format("$UNSET/x") for word in words])
    assert isinstance(done.exception, ConfigError)
    assert "UNSET is not set" in str(done.exception)


def test_a_command_that_is_offered_can_be_pasted() -> None:
    for word in ["a b", "it's", "$HOME", "x;y", "*", ""]:
        assert shlex.split(command("rlsys", "stop", word).strip("`")) == ["rlsys", "stop", word]


def test_a_variable_that_is_empty_counts_as_unset() -> None:
    assert variable("EMPTY") is variable("UNSET") is None
    assert variable("user") == "u"
