"""Bodies and answers of /v1 against the source of vLLM's own models, which is read and not imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsys.serve.openai.requests import ChatBody, CompletionBody, SampledBody

FOLDER = "entrypoints/openai"
BODIES: list[tuple[type[SampledBody], str, str]] = [
    (CompletionBody, f"{FOLDER}/completion/protocol.py", "CompletionRequest"),
    (ChatBody, f"{FOLDER}/chat_completion/protocol.py", "ChatCompletionRequest"),
]
# OpenAI's own parameters that vLLM's models lack
OF_OPENAI = {
    "audio", "best_of", "function_call", "functions", "metadata", "modalities", "prediction", "prompt_cache_key",
    "safety_identifier", "service_tier", "store", "verbosity", "web_search_options",
}  # fmt: skip


def fields(path: str, name: str) -> dict[str, ast.expr | None]:
    """Fields of a model and those that it inherits in its module -> default."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed here")
    tree = ast.parse((Path(found.origin).parent / path).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return dict(_fields(classes, name))


def _fields(classes: dict[str, ast.ClassDef], name: str) -> Iterator[tuple[str, ast.expr | None]]:
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(classes, base.id)
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            yield node.target.id, _default(node.value)


def _default(value: ast.expr | None) -> ast.expr | None:
    """Also that of Field(default=...)."""
    if isinstance(value, ast.Call):
        return next((each.value for each in value.keywords if each.arg == "default"), None)
    return value


@pytest.mark.parametrize(("body", "path", "name"), BODIES)
def test_every_parameter_of_vllm_is_served_or_refused_by_name(body: type[SampledBody], path: str, name: str) -> None:
    theirs = set(fields(path, name)) - {"model_config"}
    ours = set(body.model_fields) | set(body.UNSERVED)
    assert theirs - ours == set(), "neither served nor refused"
    assert ours - theirs <= OF_OPENAI, "no parameter of vLLM or OpenAI"


@pytest.mark.parametrize(("body", "path", "name"), BODIES)
def test_vllms_default_of_a_parameter_that_is_not_served_asks_for_nothing(
    body: type[SampledBody], path: str, name: str
) -> None:
    for field, default in fields(path, name).items():
        if field in body.UNSERVED and isinstance(default, ast.Constant) and default.value is not None:
            assert default.value in body.UNSERVED[field], field
