"""The operator's page of a running server, in Chromium."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests import waiting
from tests.browser.test_report import overflow
from tests.unit.conftest import tiny_model as tiny_model  # a fixture
from tests.unit.tiny_learner import Models

KEY = {"X-API-Key": "tml-one"}
SHOWN_MS = 30_000


@pytest.fixture(scope="module")
def server(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, str]]:
    """Process, the clients' address and the operator's."""
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "tests.unit.serve.server_process", str(tiny_model(True)), str(folder)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        find = re.compile(r"status and metrics: (\S+)\n(?:.*\n)*.*TINKER_BASE_URL=(\S+)")
        found = waiting.until(lambda: find.search(log.read_text()), "the addresses", process=process)
        assert found is not None
        yield process, found[2], found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page(browser: Browser, server: tuple[Any, str, str], request: pytest.FixtureRequest) -> Iterator[Page]:
    """Whatever the page complains about, and each request to elsewhere, fails the test."""
    troubles: list[str] = []
    options = getattr(request, "param", {})
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
    page.on("request", lambda each: troubles.append(each.url) if not each.url.startswith(server[2]) else None)
    page.goto(server[2])
    yield page
    page.close()
    assert [each for each in troubles if "ERR_CONNECTION_REFUSED" not in each] == []


def post(url: str, path: str, body: Any) -> Any:
    return httpx.post(f"{url}/api/v1/{path}", json=body, headers=KEY, timeout=60, trust_env=False).json()


PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "color_scheme": "dark"}


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, PHONE], indirect=True, ids=["desktop", "phone"])
def test_the_page_shows_a_server_and_fits_its_window(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("ready", timeout=SHOWN_MS)
    expect(page.locator("#bases tr")).to_have_count(1)
    expect(page.locator("#bases")).to_contain_text("tiny")
    expect(page.locator("dl div")).to_have_count(11)
    assert overflow(page) == []
    style = "getComputedStyle(document.body)"
    ground, ink = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (light(ground) > light(ink)) != dark


def light(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_the_page_follows_the_server_by_itself(page: Page, server: tuple[Any, str, str]) -> None:
    _, url, _ = server
    expect(page.locator("#tenants tr")).to_have_count(0, timeout=SHOWN_MS)
    session = post(url, "create_session", {"tags": ["<img src=x onerror=alert(1)>"]})["session_id"]
    expect(page.locator("dl div", has_text="sessions")).to_contain_text("1", timeout=SHOWN_MS)
    expect(page.locator("#tenants")).to_contain_text("local")
    post(url, f"sessions/{session}/finish", {"reason": {"type": "success"}})
    expect(page.locator("#tenants tr")).to_have_count(0, timeout=SHOWN_MS)


def test_the_command_prints_the_same_as_json(server: tuple[Any, str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlsys", "serve", "--status", server[2]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bases"][0]["name"] == "tiny"
    wrong = subprocess.run([*command[:-1], server[1]], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 1 and "answered 401" in wrong.stderr


def test_the_page_says_when_the_server_does_not_answer(page: Page, server: tuple[Any, str, str]) -> None:
    expect(page.locator("#state")).to_have_text("ready", timeout=SHOWN_MS)
    server[0].terminate()
    expect(page.locator("#state")).to_contain_text(re.compile("no answer|stopping"), timeout=SHOWN_MS)
    waiting.exit_code(server[0], "the server")
    expect(page.locator("#state")).to_contain_text("no answer", timeout=SHOWN_MS)
    expect(page.locator("#state")).to_have_class("bad")
