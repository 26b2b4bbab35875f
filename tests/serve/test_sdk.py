"""Unmodified SDKs from 0.6 to 0.38 against one server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.clients import EACH_SDK, ENDS, MINT, SDKS, Server, seen


@pytest.mark.parametrize("sdk", EACH_SDK)
def test_every_call_of_the_sdk_does_what_its_documentation_says(sdk: str, server: Server, tmp_path: Path) -> None:
    seen(server, sdk, "walk", tmp_path)


@pytest.mark.parametrize("sdk", ENDS)
def test_tutorial_202_runs_and_its_numbers_are_those_of_its_formulas(sdk: str, server: Server, tmp_path: Path) -> None:
    seen(server, sdk, "tutorial_202", tmp_path)


def test_a_model_can_be_asked_for_by_a_name_that_other_programs_know(server: Server, tmp_path: Path) -> None:
    (tmp_path / "Qwen").mkdir()
    (tmp_path / server.alias).symlink_to(server.model)  # a client's own copy of the tokenizer, under that name
    seen(server, SDKS[-1], "walk", tmp_path, "training", RLSYS_SERVE_MODEL=server.alias)


@pytest.mark.parametrize("form", ["tml-", "sk-"])
def test_the_pages_of_mint_run_with_its_toolkit(form: str, server: Server, tmp_path: Path) -> None:
    key = {"tml-": server.key, "sk-": server.sk_key}[form]
    assert key.startswith(form)
    seen(server, MINT, "mint_pattern", tmp_path, MINT_API_KEY=key, MINT_BASE_URL=server.url)


@pytest.mark.parametrize("sdk", [SDKS[0], SDKS[-1]])
def test_a_wrong_key_is_refused_at_once(sdk: str, server: Server, tmp_path: Path) -> None:
    seen(server, sdk, "wrong_key", tmp_path, TINKER_API_KEY="tml-wrong-0123456789")
