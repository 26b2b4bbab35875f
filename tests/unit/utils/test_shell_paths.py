"""A path means what it means in a shell, at every key and in every command."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.cli import app
from actors.doctor import token_file
from rlsys.client.config import ServiceConfig
from rlsys.client.paths import given
from rlsys.config import ModelSection, dump_config, parse_config
from rlsys.data.row_files import read_file
from rlsys.errors import ConfigError
from rlsys.tracking.progress import closing_rows
from rlsys.tracking.system_metrics import environment
from rlsys.utils.env_variables import drop_empty_variables, env_variable, set_default
from rlsys.utils.shell_paths import as_written, command, expand
from rlsys.utils.text_files import LFS_POINTER

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
        assert shlex.split(command("rlsys", "stop", word)) == ["rlsys", "stop", word]


def test_a_variable_that_is_empty_counts_as_unset() -> None:
    assert env_variable("EMPTY") is env_variable("UNSET") is None
    assert env_variable("user") == "u"


def test_a_default_takes_the_place_of_an_empty_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSET", "")  # so that it is restored
    for name in ("EMPTY", "UNSET", "user"):
        set_default(name, "x")
    assert [env_variable("EMPTY"), env_variable("UNSET"), env_variable("user")] == ["x", "x", "u"]


LIBRARIES = [
    "RAY_TMPDIR",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TMPDIR",
    "VLLM_LOGGING_LEVEL",
    "HOME",
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
]


def test_libraries_find_no_empty_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LIBRARIES, "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_PROJECT", "p")
    drop_empty_variables()
    assert not {*LIBRARIES} & os.environ.keys()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # which hides every GPU
    assert os.environ["WANDB_PROJECT"] == "p"


def test_scripts_of_a_cluster_take_an_empty_variable_for_an_unset_one() -> None:
    script = Path(__file__).parents[3] / "deploy" / "env.sh"
    names = ["RAY_AUTH_MODE", "RAY_USE_TLS", "RAY_TMPDIR", "RLSYS_PORT", "RLSYS_RAY_OPTIONS", "TMPDIR", "RAY_ADDRESS"]
    show = "; ".join(f'echo "${{{name}-unset}}"' for name in names)
    done = subprocess.run(
        ["bash", "-euc", f'source "$0"; {show}', str(script)],
        env={"PATH": os.environ["PATH"], "HOME": "/h", **dict.fromkeys(names, "")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["token", "0", "unset", "6379", "unset", "unset", "unset"]


def test_offers_of_commands_have_quotes_round_paths_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a model's folder"
    folder.mkdir()
    closing = closing_rows(
        folder, accuracy_before=0, accuracy_after=1, steps=1, seconds=1, wandb_dir=folder, wandb_url=None, adapter=None
    )
    offers = [dict(closing)["wandb (offline)"]]
    token = folder / "token"
    token.touch()
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    offers.append(token_file().remedy)
    rows = folder / "rows.jsonl"
    rows.write_bytes(LFS_POINTER)
    with pytest.raises(ConfigError) as caught:
        list(read_file(rows, ["prompt"], "task.train"))
    offers.append(str(caught.value).split("`")[1])
    monkeypatch.setattr("sys.argv", ["/usr/bin/rlsys", "train", "a b.yaml", "prompt.template={prompt} ..."])
    offers.append(environment()["command"])
    assert [shlex.split(offer) for offer in offers] == [
        ["wandb", "sync", str(folder)],
        ["chmod", "600", str(token)],
        ["git", "-C", str(folder), "lfs", "pull"],
        ["rlsys", "train", "a b.yaml", "prompt.template={prompt} ..."],
    ]
