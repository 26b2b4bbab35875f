"""Bodies and answers of /v1 against the source of vLLM's own models, which is read and not imported."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.openai.requests import ChatBody, CompletionBody, SampledBody
from tests.unit.serve.http_client import Http
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.openai.test_door import ask, events

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
    """Also that of Field(default=...), or what makes it."""
    if isinstance(value, ast.Call):
        return next((each.value for each in value.keywords if each.arg in ("default", "default_factory")), None)
    return value


@pytest.mark.parametrize(("body", "path", "name"), BODIES)
def test_every_parameter_of_vllm_is_served_or_refused_by_name(body: type[SampledBody], path: str, name: str) -> None:
    theirs = set(fields(path, name)) - {"model_config"}
    ours = set(body.model_fields) | set(body.UNSERVED)
    assert theirs - ours == set(), "neither served nor refused"
    assert ours - theirs <= OF_OPENAI, "no parameter of vLLM or OpenAI"


TEXT, CHAT = f"{FOLDER}/completion/protocol.py", f"{FOLDER}/chat_completion/protocol.py"
COMMON = "entrypoints/serve/engine/protocol.py"


def test_answers_have_fields_of_vllms_answers(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            common = {"model": "tiny", "temperature": 0, "max_tokens": 2, "return_token_ids": True}
            text = {**common, "prompt": [4, 5], "logprobs": 0}
            chat = {**common, "messages": [{"role": "user", "content": "w5"}], "logprobs": True}
            stream = {"stream": True, "stream_options": {"include_usage": True}}
            whole = (await ask(http, "completions", text)).json()
            of_class(whole, TEXT, "CompletionResponse")
            of_class(whole["choices"][0], TEXT, "CompletionResponseChoice")
            of_class(whole["choices"][0]["logprobs"], TEXT, "CompletionLogProbs")
            of_class(whole["usage"], COMMON, "UsageInfo")
            first, *_, last = events(await ask(http, "completions", {**text, **stream}))
            of_class(first, TEXT, "CompletionStreamResponse")
            of_class(first["choices"][0], TEXT, "CompletionResponseStreamChoice")
            of_class(last["usage"], COMMON, "UsageInfo")
            whole = (await ask(http, "chat/completions", chat)).json()
            of_class(whole, CHAT, "ChatCompletionResponse")
            of_class(whole["choices"][0], CHAT, "ChatCompletionResponseChoice")
            of_class(whole["choices"][0]["message"], CHAT, "ChatMessage")
            of_class(whole["choices"][0]["logprobs"]["content"][0], CHAT, "ChatCompletionLogProbsContent")
            first, *_ = events(await ask(http, "chat/completions", {**chat, **stream}))
            of_class(first, CHAT, "ChatCompletionStreamResponse")
            of_class(first["choices"][0], CHAT, "ChatCompletionResponseStreamChoice")
            of_class((await ask(http, "models")).json()["data"][0], COMMON, "ModelCard")
            of_class((await ask(http, "models/none")).json()["error"], COMMON, "ErrorInfo")

    asyncio.run(main())


OF_OPENAI_ALONE = {"refusal", "prompt_token_ids"}  # vLLM gives the second once for a chat, here each choice has it


def of_class(value: dict[str, Any], path: str, name: str) -> None:
    """Fields of `value` are fields of vLLM's class, and include all that the class has no default for."""
    theirs = fields(path, name)
    assert set(value) - set(theirs) <= OF_OPENAI_ALONE, name
    assert {field for field, default in theirs.items() if default is None} - set(value) <= {"model_config"}, name


@pytest.mark.parametrize(("body", "path", "name"), BODIES)
def test_vllms_default_of_a_parameter_that_is_not_served_asks_for_nothing(
    body: type[SampledBody], path: str, name: str
) -> None:
    for field, default in fields(path, name).items():
        if field in body.UNSERVED and isinstance(default, ast.Constant) and default.value is not None:
            assert default.value in body.UNSERVED[field], field
