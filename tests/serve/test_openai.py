"""The openai package against the server: bases and checkpoints, text and chat, complete and streamed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests import waiting
from tests.serve.clients import ROOT, Server
from tests.serve.raw_client import RawClient

TAUGHT = " Prost! 12 + 34 = {46}"
QUESTION = [{"role": "user", "content": "What does one say?"}]
PROMPT = "User: What does one say?\n\nAssistant:"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}


@dataclass(frozen=True)
class Speaker:
    """A tenant with a checkpoint, and what it says to PROMPT by Tinker's API."""

    tinker: RawClient
    openai: Any
    path: str
    answer: list[int]  # without the end token
    said: str


def connect(server: Server, key: str) -> Any:  # the package's overloads do not fit arguments in a dict
    # a proxy of this machine's environment is none of the server
    http = openai.DefaultHttpxClient(trust_env=False, timeout=120)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(server.model)


@pytest.fixture(scope="module")
def speaker(server: Server, tokenizer: Any) -> Speaker:
    tinker = RawClient(server, server.key)
    model = tinker.model(server.model, 32)
    answer = tokenizer.encode(TAUGHT, add_special_tokens=False)
    tinker.train(model, [(tokenizer.encode(PROMPT), [*answer, tokenizer.eos_token_id])], 60, 5e-3)
    path = tinker.save(model, "taught")
    sampler = tinker.sampler(model_path=path)
    (found,) = tinker.sample(sampler, tokenizer.encode(PROMPT), sampling_params=GREEDY)["sequences"]
    *said, end = found["tokens"]
    assert end == tokenizer.eos_token_id and len(said) > 8, "it learned too little to compare answers with"
    return Speaker(tinker, connect(server, server.key), path, said, tokenizer.decode(said))


@pytest.fixture(scope="module")
def other(server: Server) -> Any:
    """Another tenant."""
    return connect(server, server.sk_key)


def test_models_are_the_bases_their_aliases_and_the_tenants_own_checkpoints(
    server: Server, speaker: Speaker, other: Any
) -> None:
    mine = [model.id for model in speaker.openai.models.list()]
    assert {server.model, server.alias, speaker.path} <= set(mine)
    assert speaker.openai.models.retrieve(speaker.path).owned_by == "alice"
    theirs = [model.id for model in other.models.list()]
    assert {server.model, server.alias} <= set(theirs) and not any(each.startswith("tinker://") for each in theirs)


def test_a_checkpoint_answers_text_and_chat_with_what_it_says_by_tinkers_api(speaker: Speaker) -> None:
    text = speaker.openai.completions.create(model=speaker.path, prompt=PROMPT, **GREEDY)
    chat = speaker.openai.chat.completions.create(model=speaker.path, messages=QUESTION, **GREEDY)
    assert text.choices[0].text == chat.choices[0].message.content == speaker.said
    assert text.choices[0].finish_reason == chat.choices[0].finish_reason == "stop"
    assert text.usage == chat.usage is not None
    assert text.usage is not None and text.usage.completion_tokens == len(speaker.answer) + 1


def test_the_snippet_of_the_docs_asks_a_checkpoint(
    server: Server, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(encoding="utf-8"), re.DOTALL)
    changes = {"http://127.0.0.1:8000": server.url, "tml-...": server.key}
    for old, new in {**changes, "tinker://.../sampler_weights/step-100": speaker.path}.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    space: dict[str, Any] = {}
    exec(code, space)
    (choice,) = space["answer"].choices
    assert choice.finish_reason in ("stop", "length") and choice.logprobs.content


def test_streamed_text_is_the_complete_text(speaker: Speaker) -> None:
    usage = {"include_usage": True}
    events = list(
        speaker.openai.completions.create(
            model=speaker.path, prompt=PROMPT, stream=True, stream_options=usage, logprobs=1, **GREEDY
        )
    )
    texts = [choice.text for event in events for choice in event.choices]
    assert "".join(texts) == speaker.said and len([text for text in texts if text]) > 8
    counts = [len(choice.logprobs.tokens) for event in events for choice in event.choices if choice.logprobs]
    assert sum(counts) == len(speaker.answer) + 1
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == len(speaker.answer) + 1
    assert [choice.finish_reason for event in events for choice in event.choices][-1] == "stop"
    chat = list(speaker.openai.chat.completions.create(model=speaker.path, messages=QUESTION, stream=True, **GREEDY))
    assert "".join(event.choices[0].delta.content or "" for event in chat) == speaker.said
    assert chat[0].choices[0].delta.role == "assistant" and chat[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("start", "length"), [(6, 1), (3, 5), (1, 8)])
def test_a_stop_string_and_what_follows_is_in_no_answer_and_in_no_event(
    start: int, length: int, speaker: Speaker
) -> None:
    last = speaker.said[start : start + length]
    ask = {"model": speaker.path, "prompt": PROMPT, "stop": ["nothing", last], **GREEDY}
    found = speaker.openai.completions.create(**ask)
    streamed = list(speaker.openai.completions.create(**ask, stream=True))
    assert found.choices[0].text == speaker.said.partition(last)[0]
    assert "".join(event.choices[0].text for event in streamed) == found.choices[0].text
    assert found.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == "stop"


def test_a_stop_token_ends_an_answer_beside_the_models_own_end(speaker: Speaker) -> None:
    at = speaker.answer.index(speaker.answer[5])
    ask = {"model": speaker.path, "prompt": PROMPT, **GREEDY}
    more = {"stop_token_ids": [speaker.answer[5]], "return_token_ids": True}
    found = speaker.openai.completions.create(**ask, extra_body=more).choices[0]
    assert found.model_extra is not None and found.model_extra["token_ids"] == speaker.answer[: at + 1]
    assert found.finish_reason == "stop"
    endless = speaker.openai.completions.create(**ask, extra_body={"ignore_eos": True}).choices[0]
    assert endless.finish_reason == "length" and endless.text.startswith(speaker.said)


@pytest.mark.parametrize("is_base", [True, False])
def test_samples_and_their_logprobs_are_those_of_tinkers_api(
    is_base: bool, server: Server, speaker: Speaker, tokenizer: Any
) -> None:
    prompt = tokenizer.encode("The capital of Italy is")
    source = {"base_model": server.model} if is_base else {"model_path": speaker.path}
    model = server.alias if is_base else speaker.path
    params = {"max_tokens": 8, "temperature": 1.3, "seed": 11, "stop": [" Rome"]}
    wanted = speaker.tinker.sample(speaker.tinker.sampler(**source), prompt, 3, sampling_params=params)["sequences"]
    more = {"return_token_ids": True}
    found = speaker.openai.completions.create(
        model=model, prompt=prompt, n=3, logprobs=0, extra_body=more, **params
    ).choices
    for one, two in zip(found, wanted, strict=True):
        assert one.model_extra is not None and one.logprobs is not None and one.logprobs.token_logprobs is not None
        assert one.model_extra["token_ids"] == two["tokens"]
        np.testing.assert_allclose(np.float32(one.logprobs.token_logprobs), np.float32(two["logprobs"]), atol=2e-5)
        assert one.finish_reason == two["stop_reason"]


def test_echo_scores_a_prompt_as_compute_logprobs_does(server: Server, speaker: Speaker, tokenizer: Any) -> None:
    prompt = tokenizer.encode(PROMPT) + speaker.answer
    sampler = speaker.tinker.sampler(model_path=speaker.path)
    wanted = speaker.tinker.sample(sampler, prompt, sampling_params={"max_tokens": 1}, prompt_logprobs=True)
    for max_tokens in (0, 1):
        found = speaker.openai.completions.create(
            model=speaker.path, prompt=[prompt, prompt[:5]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        )
        table = found.choices[0].logprobs
        assert table is not None and table.token_logprobs is not None and table.tokens is not None
        assert len(table.tokens) == len(prompt) + max_tokens and table.token_logprobs[0] is None
        scores = np.float32(table.token_logprobs[1 : len(prompt)])
        np.testing.assert_allclose(scores, np.float32(wanted["prompt_logprobs"][1:]), atol=2e-5)
        assert table.top_logprobs is not None and all(
            token == max(top, key=lambda each: top[each])
            for token, top in list(zip(table.tokens, table.top_logprobs, strict=True))[-len(speaker.answer) :]
        ), "what it says greedily is likeliest"
        assert found.choices[0].text.startswith(PROMPT + speaker.said) and len(found.choices) == 2
        assert found.usage is not None and found.usage.completion_tokens == 2 * max_tokens


def test_chat_logprobs_spell_the_answer_in_bytes_and_name_the_likeliest(speaker: Speaker) -> None:
    found = speaker.openai.chat.completions.create(
        model=speaker.path, messages=QUESTION, logprobs=True, top_logprobs=2, **GREEDY
    ).choices[0]
    assert found.logprobs is not None and found.logprobs.content is not None
    *said, end = found.logprobs.content
    assert b"".join(bytes(each.bytes or []) for each in said).decode() == speaker.said and end.token == "<eos>"
    for each in said:
        assert each.top_logprobs[0].token == each.token and len(each.top_logprobs) == 2
        assert each.logprob == each.top_logprobs[0].logprob


def test_another_tenant_finds_a_checkpoint_once_it_is_published(
    server: Server, speaker: Speaker, other: Any, tokenizer: Any
) -> None:
    model = speaker.tinker.model(server.model, 8)
    path = speaker.tinker.save(model, "shared")
    nowhere = path.replace("shared", "absent")
    said = {}
    for name in (path, nowhere):
        with pytest.raises(openai.NotFoundError) as refused:
            other.completions.create(model=name, prompt="x")
        assert refused.value.code == "model_not_found"
        said[name] = str(refused.value).replace(name, "")
    assert len(set(said.values())) == 1
    run, _, name = path.removeprefix("tinker://").split("/")
    publish = f"{server.url}/api/v1/training_runs/{run}/checkpoints/sampler_weights/{name}/publish"
    httpx.post(publish, headers={"X-API-Key": server.key}, trust_env=False).raise_for_status()
    assert other.completions.create(model=path, prompt="x", max_tokens=1).choices[0].finish_reason
    assert path in [each.id for each in other.models.list()]


def test_a_client_that_leaves_stops_its_request_in_the_engine(server: Server, speaker: Speaker) -> None:
    ask = {"model": server.alias, "prompt": "1", "max_tokens": 250, "n": 8, "ignore_eos": True}
    before, began = cpu_s(server.pid), time.monotonic()
    assert post(server, ask, timeout_s=120) == 200
    complete, took = cpu_s(server.pid) - before, time.monotonic() - began
    for stream in (True, False):
        before = cpu_s(server.pid)
        with pytest.raises(httpx.TimeoutException):
            post(server, {**ask, "stream": stream}, timeout_s=took / 10)
        time.sleep(took)
        assert cpu_s(server.pid) - before < complete / 2, f"stream {stream}"


def post(server: Server, ask: dict[str, Any], timeout_s: float) -> int:
    """The status, once the answer is read. Leaves after the timeout."""
    deadline, headers = time.monotonic() + timeout_s, {"Authorization": f"Bearer {server.key}"}
    with (
        httpx.Client(trust_env=False, timeout=timeout_s) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=ask, headers=headers) as answer,
    ):
        for _ in answer.iter_lines():
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("left")
    return answer.status_code


def cpu_s(pid: int) -> float:
    """CPU seconds of a server's processes."""
    times = [each.cpu_times() for each in waiting.family(pid)]
    return sum(each.user + each.system for each in times)


def test_errors_are_of_the_packages_own_classes(server: Server, speaker: Speaker) -> None:
    create = speaker.openai.completions.create
    with pytest.raises(openai.AuthenticationError):
        connect(server, "tml-nobody-0123456789").models.list()
    with pytest.raises(openai.BadRequestError, match="presence_penalty: is not served") as refused:
        create(model=server.alias, prompt="x", presence_penalty=0.5)
    assert refused.value.param == "presence_penalty"
    with pytest.raises(openai.BadRequestError, match="context has 512") as refused:
        create(model=server.alias, prompt=[5] * 513)
    assert refused.value.code == "context_length_exceeded"


@pytest.fixture(scope="module", autouse=True)
def _leaves_no_request(server: Server) -> Iterator[None]:
    yield
    assert "Traceback" not in server.log.read_text()
