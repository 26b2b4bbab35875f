"""What README and docs/ name exists: links, files, commands with their options, keys of a job, make's targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from actors.cli import app
from rlsys.config import JobConfig, keys, load_config, parse_config
from rlsys.serve.load import load_serve_config
from tests.unit.docs import pages
from tests.unit.docs.pages import PAGES, ROOT

NAMED = re.compile(r"(?<![\w/.:~-])(?:rlsys|actors|tests|benchmarks|deploy|examples|configs|docs)/[\w./*-]*\w")
ELSEWHERE = {"rlsys/weights/name"}  # of a checkpoint's address
KEY = re.compile(rf"(?:{'|'.join(JobConfig.model_fields)})(?:\.[a-z_0-9*]+)+")
NO_KEYS = re.compile(r".*\.(json|jsonl|yaml|safetensors|txt|log)$|model\.language_model\.")
NUMBERS = {"N": "1"}  # what a command's placeholder stands for


every_page = pytest.mark.parametrize("page", [pytest.param(page, id=pages.name(page)) for page in PAGES])


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in pages.links(page):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = page.parent / target if target else page
        assert found.exists(), f"{link}: no such file"
        assert not anchor or anchor in pages.anchors(found), f"{link}: no such heading"


@every_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in set(NAMED.findall(pages.text(page))) - ELSEWHERE:
        assert list(ROOT.glob(name)), f"{name}: no such file"


@every_page
def test_every_command_of_rlsys_is_one_with_keys_that_a_job_has(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for program, verb, *words in pages.commands(page):
        if program != "rlsys" or not words:
            continue
        command = group.commands.get(verb)
        assert command is not None, f"rlsys {verb}: no such command"
        if all(word.startswith("--") for word in words):  # prose that names an option
            words += ["x" for param in command.params if param.param_type_name == "argument" and param.required]
        read = command.make_context(verb, [NUMBERS.get(word, word) for word in words]).params
        config, overrides = read.get("config"), read.get("overrides") or []
        if verb == "serve":
            load_serve_config(None, overrides, {"models": {"x": "x"}})
        elif config is not None and str(config).startswith("configs/"):
            load_config(ROOT / config, overrides)
        else:
            parse_config("{run: {name: a}, model: {path: x}}", overrides)


@every_page
def test_every_target_of_make_is_one(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[0] for program, *words in pages.commands(page) if program == "make"}
    assert named <= targets


@every_page
def test_every_benchmark_is_a_module_with_the_options_named(page: Path) -> None:
    code = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    lines = [f"python {line}" for line in re.findall(r"python -m (benchmarks\.\w[^`\n]*)", pages.text(page))]
    for line in lines:
        module, *words = line.removeprefix("python ").split("  #")[0].split()
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        for option in (word for word in words if re.fullmatch(r"--[a-z-]+", word)):
            assert f'"{option}"' in code, f"{module} {option}"


@every_page
def test_every_key_that_is_named_is_a_key_of_a_job(page: Path) -> None:
    known = list(keys())
    for span in pages.spans(page):
        for word in re.split(r"[ ,]+", span):
            key = word.partition("=")[0].rstrip(":.")
            if KEY.fullmatch(key) and not NO_KEYS.match(key):
                pattern = re.escape(key).replace(r"\*", r"\w*") + r"(\..*)?"
                assert any(re.fullmatch(pattern, one) for one in known), f"{key}: no such key"


def test_the_index_names_each_page_once() -> None:
    listed = [link for link in pages.links(ROOT / "docs" / "README.md") if not link.startswith("..")]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


def test_the_readme_stays_short() -> None:
    assert len(pages.text(ROOT / "README.md").splitlines()) <= 150


def test_pages_are_read_for_what_they_hold() -> None:
    readme = ROOT / "README.md"
    found = list(pages.commands(readme))
    assert ["make", "quickstart"] in found and ["make", "test"] in found
    assert ["rlsys", "plan", "configs/gsm8k-qwen3-0.6b.yaml", "--gpu-memory-gb", "24"] in found
    assert "docs/start.md" in pages.links(readme) and "docs/report-desktop.png" not in pages.links(readme)
    assert "report-desktop.png" in pages.links(ROOT / "docs" / "jobs.md")
    assert "on-a-gpu" in pages.anchors(ROOT / "docs" / "performance.md")
    assert sum(1 for page in PAGES for program, *_ in pages.commands(page) if program == "rlsys") > 40
