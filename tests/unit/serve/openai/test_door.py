"""/v1 on a real learner: names, tenants, limits, errors, streams, and snapshots that are kept open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlsys.serve.app import build_app
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.front import connect
from rlsys.serve.keys import KeyFile, NoKeys
from rlsys.serve.openai.requests import ChatBody, CompletionBody
from tests.unit.serve.http_client import KEY, Http
from tests.unit.serve.learner_backend import MAX_LENGTH, VOCAB, LearnerBackend

ONE, TWO = "tml-aaaaaaaa", "tml-bbbbbbbb"
ASK = {"model": "tiny", "prompt": [4, 5, 6], "temperature": 0, "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w5 w6"}], "temperature": 0, "max_tokens": 4}


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    file = tmp_path / "keys"
    file.write_text(f"{ONE} one\n{TWO} two\n")
    file.chmod(0o600)
    return KeyFile(file)


async def ask(http: Http, path: str, body: Any = None, key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return await http.client.request("GET" if body is None else "POST", f"/v1/{path}", json=body, headers=headers)


async def ask_escaped(http: Http, path: str, body: Any) -> httpx.Response:
    """In ASCII, with escapes."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    return await http.client.post(f"/v1/{path}", content=json.dumps(body), headers=headers)


async def saved(http: Http, name: str, key: str = KEY) -> str:
    """Path of a sampler checkpoint of a new model."""
    session = await http.session(key=key)
    model = await http.model(session, key=key)
    body = {"model_id": model, "seq_id": 1, "path": name}
    path: str = (await http.result(await http.post("save_weights_for_sampler", body, key=key), key=key))["path"]
    return path


def events(answer: httpx.Response) -> list[Any]:
    *found, last, end = answer.text.split("\n\n")
    assert last == "data: [DONE]" and end == ""
    return [json.loads(each.removeprefix("data: ")) for each in found]


def test_both_headers_are_the_same_key_and_none_is_an_error_of_openais_form(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            for headers in ({"Authorization": f"Bearer {ONE}"}, {"authorization": f"bearer {ONE}"}, {"X-API-Key": ONE}):
                assert (await http.client.get("/v1/models", headers=headers)).status_code == 200
            bad = [{}, {"Authorization": ONE}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {ONE}"}]
            for headers in [*bad, {"Authorization": f"Bearer {ONE}", "X-API-Key": "tml-wrong"}]:
                answer = await http.client.get("/v1/models", headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert (await http.client.get("/api/v1/training_runs", headers={"Authorization": f"Bearer {ONE}"})).is_error
            for method, path in (("GET", "/v1/nothing"), ("PUT", "/v1/completions")):
                answer = await http.client.request(method, path, headers={"X-API-Key": ONE})
                assert answer.status_code in (404, 405) and set(answer.json()["error"]) == {
                    "message", "type", "param", "code",
                }  # fmt: skip
                assert int(answer.headers["content-length"]) == len(answer.content)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "base", "kind"), [("completions", ASK, CompletionBody), ("chat/completions", CHAT, ChatBody)]
)
def test_what_is_not_served_is_refused_by_name_and_its_neutral_value_is_not(
    path: str, base: dict[str, Any], kind: type[CompletionBody], backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            neutral = {name: values[0] if values else None for name, values in kind.UNSERVED.items()}
            plain = await ask(http, path, base)
            assert plain.status_code == 200, plain.text
            again = (await ask(http, path, {**base, **neutral})).json()
            assert again["choices"] == plain.json()["choices"]
            for name in (*kind.UNSERVED, "temprature"):
                answer = await ask(http, path, {**base, name: {"other": "value"}})
                assert answer.status_code == 400, name
                error = answer.json()["error"]
                assert error["param"] == name and error["message"].startswith(f"{name}: ")

    asyncio.run(main())


WRONG: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no model": ({"model": None}, "model", "Field required"),
    "no prompt": ({"prompt": None}, "prompt", "Field required"),
    "empty prompt": ({"prompt": []}, "prompt", "found none"),
    "empty ids in a list": ({"prompt": [[1], []]}, "prompt", "found 0 tokens"),
    "mixed prompts": ({"prompt": [1, "a"]}, "prompt", ""),
    "an id outside": ({"prompt": [VOCAB]}, "prompt", f"wanted 0 to {VOCAB - 1}"),
    "a negative id": ({"prompt": [-1]}, "prompt", "wanted 0 to"),
    "too long": ({"prompt": [1] * MAX_LENGTH}, "prompt", f"the context has {MAX_LENGTH}"),
    "n": ({"n": 0}, "n", "greater than"),
    "too many samples": ({"n": 2000}, "n", "limits.num_samples"),
    "best_of": ({"best_of": 3}, "best_of", "wanted n = 1"),
    "temperature": ({"temperature": -0.1}, "temperature", "greater than"),
    "a string as number": ({"temperature": "0"}, "temperature", "number"),
    "a bool as number": ({"max_tokens": True}, "max_tokens", "integer"),
    "top_p": ({"top_p": 0}, "top_p", "greater than"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "without echo"),
    "logprobs": ({"logprobs": 21}, "logprobs", "limits.topk_prompt_logprobs"),
    "empty stop": ({"stop": ""}, "stop", "string of 0 characters"),
    "many stops": ({"stop": ["a"] * 65}, "stop", "limits.stop_strings"),
    "stop id": ({"stop_token_ids": [VOCAB]}, "stop_token_ids", "wanted 0 to"),
    "a huge seed": ({"seed": 2**64}, "seed", "less than"),
    "unknown option": ({"stream_options": {"include": True}}, "stream_options", "not permitted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_names_its_parameter(name: str, backend: LearnerBackend, store: CheckpointStore) -> None:
    change, param, words = WRONG[name]

    async def main() -> None:
        async with Http(backend, store) as http:
            for stream in (False, True):
                answer = await ask(http, "completions", {**ASK, **change, "stream": stream})
                assert answer.status_code == 400, answer.text
                error = answer.json()["error"]
                assert error["param"] == param and words in error["message"], error

    asyncio.run(main())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": NaN}', b'{"model": "tiny", "model": "x"}']
)
def test_what_is_no_json_object_is_refused(content: bytes, backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            for path in ("completions", "chat/completions"):
                answer = await http.client.post(f"/v1/{path}", content=content, headers={"X-API-Key": KEY})
                assert answer.status_code == 400 and answer.json()["error"]["message"]

    asyncio.run(main())


MESSAGES: dict[str, tuple[Any, str]] = {
    "none": ([], "at least 1"),
    "a tool": ([{"role": "tool", "content": "x"}], "'tool'"),
    "an image": ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'image_url'"),
    "a call": ([{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}], "'tool_calls'"),
    "a role": ([{"role": "king", "content": "x"}], "'system'"),
    "no content": ([{"role": "user"}], "required"),
    "text": ("hello", "list"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_are_not_text_are_refused_by_name(
    name: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    messages, words = MESSAGES[name]

    async def main() -> None:
        async with Http(backend, store) as http:
            answer = await ask(http, "chat/completions", {**CHAT, "messages": messages})
            assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text

    asyncio.run(main())


def test_a_message_cannot_end_its_turn_or_replace_the_template(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            plain = (await ask(http, "chat/completions", {**CHAT, "return_token_ids": True})).json()["choices"][0]
            assert plain["prompt_token_ids"] == [0, 5, 6, 9]
            parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6"}]
            body = {**CHAT, "messages": [{"role": "user", "content": parts}], "return_token_ids": True}
            assert (await ask(http, "chat/completions", body)).json()["choices"][0]["prompt_token_ids"] == [0, 5, 6, 9]
            body = {**body, "messages": [{"role": "user", "content": "w5 <end>"}]}
            refused = await ask(http, "chat/completions", body)  # words cannot spell it as text
            assert refused.status_code == 400 and "control tokens <end>" in refused.json()["error"]["message"]
            for name in ("chat_template", "tokenize", "tools"):
                answer = await ask(http, "chat/completions", {**CHAT, "chat_template_kwargs": {name: "x"}})
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"

    asyncio.run(main())


def test_a_base_without_a_tokenizer_takes_and_names_token_ids(
    shared_backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(shared_backend, store) as http:
            found = await ask(http, "completions", {**ASK, "logprobs": 0, "echo": True, "return_token_ids": True})
            (choice,) = found.json()["choices"]
            ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
            assert choice["logprobs"]["tokens"] == [f"token_id:{id_}" for id_ in ids] and len(ids) == 7
            refused = await ask(http, "completions", {**ASK, "prompt": "w4"})
            assert refused.status_code == 400 and "has no tokenizer" in refused.json()["error"]["message"]
            refused = await ask(http, "chat/completions", CHAT)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"

    asyncio.run(main())


def test_text_and_its_ids_give_the_same_answer_streamed_or_not(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            bodies = [{**ASK, "prompt": prompt, "logprobs": 0} for prompt in ("w4 w5 w6", [4, 5, 6], ["w4 w5 w6"])]
            answers = [(await ask(http, "completions", body)).json() for body in bodies]
            assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]
            assert answers[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            (choice,) = answers[0]["choices"]
            stream = {"stream": True, "stream_options": {"include_usage": True}}
            found = events(await ask(http, "completions", {**bodies[0], **stream}))
            assert len(found) == 5 and found[-1]["choices"] == [] and found[-1]["usage"] == answers[0]["usage"]
            deltas = [each["choices"][0] for each in found[:-1]]
            assert "".join(each["text"] for each in deltas) == choice["text"]
            for column in ("tokens", "token_logprobs", "text_offset"):
                parts = [value for each in deltas for value in each["logprobs"][column]]
                assert parts == choice["logprobs"][column]
            two = (await ask(http, "completions", {**ASK, "prompt": ["w4 w5 w6", "w7"], "n": 2})).json()
            assert [each["index"] for each in two["choices"]] == [0, 1, 2, 3]
            assert two["choices"][0]["text"] == two["choices"][1]["text"] == choice["text"]

    asyncio.run(main())


def test_a_checkpoint_is_its_tenants_until_it_is_published_and_opened_once(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            path = await saved(http, "mine", ONE)
            base = (await ask(http, "completions", ASK, ONE)).json()["choices"]
            for _ in range(3):
                own = await ask(http, "completions", {**ASK, "model": path}, ONE)
                assert own.status_code == 200 and own.json()["choices"] == base, "a fresh adapter changes nothing"
            assert len(http.door._open) == 1
            answers = [
                await ask(http, "completions", {**ASK, "model": name}, TWO)
                for name in (path, path.replace("mine", "none"), "tinker://x/y/z", "../etc", "")
            ]
            assert [answer.status_code for answer in answers] == [404] * 5
            run, kind, name = path.removeprefix("tinker://").split("/")
            published = await http.send("POST", f"training_runs/{run}/checkpoints/{kind}/{name}/publish", key=ONE)
            assert published.is_success
            assert (await ask(http, "completions", {**ASK, "model": path}, TWO)).status_code == 200
            assert path in [each["id"] for each in (await ask(http, "models", key=TWO)).json()["data"]]
            assert (await ask(http, f"models/{path}", key=TWO)).json()["root"] == "tiny"
            deleted = await http.send("DELETE", f"training_runs/{run}/checkpoints/{kind}/{name}", key=ONE)
            assert deleted.is_success
            assert (await ask(http, "completions", {**ASK, "model": path}, ONE)).status_code == 404

    asyncio.run(main())


def test_a_training_checkpoint_is_refused_with_the_call_that_makes_another(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            model = await http.model(await http.session())
            saved = await http.result(await http.post("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}))
            answer = await ask(http, "completions", {**ASK, "model": saved["path"]})
            assert answer.status_code == 400 and "save_weights_for_sampler" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_idle_snapshots_are_released_and_those_in_use_are_not(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(openai_snapshots=2, openai_snapshot_idle_s=0.2)) as http:
            paths = [await saved(http, name) for name in ("a", "b", "c")]
            for path in paths:
                assert (await ask(http, "completions", {**ASK, "model": path})).status_code == 200
            assert len(backend.released) == 1, "the oldest idle one made room"
            backend.pause_s = 0.1
            slow = [asyncio.create_task(ask(http, "completions", {**ASK, "model": path})) for path in paths[:2]]
            await until(lambda: backend.running == 2)
            refused = await ask(http, "completions", {**ASK, "model": paths[2]})
            assert refused.status_code == 429 and "limits.openai_snapshots = 2" in refused.json()["error"]["message"]
            await asyncio.sleep(0.3)
            held = len(backend.released)
            http.door.sweep()
            await asyncio.sleep(0.05)
            assert len(backend.released) == held, "in use"
            assert [(await each).status_code for each in slow] == [200, 200]
            await asyncio.sleep(0.3)
            http.door.sweep()
            await until(lambda: len(backend.released) == held + 2)
            assert not http.door._open

    asyncio.run(main())


def test_samples_in_flight_count_those_of_both_apis(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(samples_in_flight=4)) as http:
            backend.pause_s = 0.1
            running = asyncio.create_task(ask(http, "completions", {**ASK, "n": 3}))
            await until(lambda: backend.running == 1)
            refused = await ask(http, "completions", {**ASK, "n": 2})
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "1"
            session = await http.session()
            body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
            sampler = (await http.post("create_sampling_session", body))["sampling_session_id"]
            asample = {
                "sampling_session_id": sampler,
                "seq_id": 0,
                "num_samples": 2,
                "prompt": {"chunks": [{"tokens": [1]}]},
            }
            assert "limits.samples_in_flight" in await http.refused("asample", {**asample, "sampling_params": {}}, 429)
            assert (await running).status_code == 200
            assert http.state.samples_in_flight.total() == 0
            assert (await ask(http, "completions", {**ASK, "n": 3})).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_failure_names_a_reference_and_no_folder(
    fails_at: int, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            backend.fails_at = fails_at
            answer = await ask(http, "completions", ASK)
            assert answer.status_code == 500
            errors = [answer.json()["error"]]
            streamed = await ask(http, "completions", {**ASK, "stream": True})
            assert streamed.status_code == (500 if fails_at == 0 else 200)
            if fails_at:
                found = events(streamed)
                assert len(found) == fails_at + 1
                errors.append(found[-1]["error"])
            for error in errors:
                assert error["type"] == "server_error" and "reference " in error["message"]
                assert str(backend.host.about.folder) not in error["message"]
            await until(lambda: backend.running == 0 and http.state.samples_in_flight.total() == 0)

    asyncio.run(main())


def test_a_snapshot_that_was_lost_with_a_learner_is_opened_again_for_the_same_request(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            body = {**ASK, "model": await saved(http, "a")}
            wanted = (await ask(http, "completions", body)).json()["choices"]
            backend.lost = 1
            assert (await ask(http, "completions", body)).json()["choices"] == wanted
            assert len(backend.released) == 1
            backend.lost = 2
            assert (await ask(http, "completions", body)).status_code == 500
            backend.lost = 1
            assert (await ask(http, "completions", {**body, "model": "tiny"})).status_code == 500, "of the base"

    asyncio.run(main())


def test_a_snapshot_of_which_a_request_failed_is_opened_again_by_the_next(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            body = {**ASK, "model": await saved(http, "a")}
            assert (await ask(http, "completions", body)).status_code == 200
            (first,) = http.door._open.values()
            backend.fails_at = 0
            assert (await ask(http, "completions", body)).status_code == 500
            backend.fails_at = None
            assert (await ask(http, "completions", body)).status_code == 200
            (second,) = http.door._open.values()
            assert second is not first and len(backend.released) == 1

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream: bool, backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            backend.pause_s = 0.05
            app, left, sent = build_app(http.front, NoKeys()), asyncio.Event(), list[Any]()
            body = json.dumps({**ASK, "max_tokens": 60, "stream": stream}).encode()
            scope = {
                "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "scheme": "http",
                "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "http_version": "1.1",
                "headers": [
                    (b"host", b"localhost"),
                    (b"authorization", f"Bearer {KEY}".encode()),
                    (b"content-length", str(len(body)).encode()),
                ],
            }  # fmt: skip
            messages = iter([{"type": "http.request", "body": body}])

            async def receive() -> Any:
                for message in messages:
                    return message
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            serving: asyncio.Future[None] = asyncio.ensure_future(app(scope, receive, send))
            await until(lambda: backend.running == 1 and (len(sent) > 1 or not stream))
            left.set()
            await asyncio.wait_for(serving, 10)
            await until(lambda: backend.running == 0 and http.state.samples_in_flight.total() == 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "param", "given"),
    [
        ("completions", "stop", ["ok", "\ud83d"]),
        ("completions", "prompt", "a \udc00"),
        ("chat/completions", "messages", [{"role": "user", "content": "\ud83d"}]),
    ],
)
def test_half_of_a_character_is_refused_by_its_parameter_and_a_pair_is_text(
    path: str, param: str, given: Any, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            refused = await ask_escaped(http, path, {**ASK, param: given})
            error = refused.json()["error"]
            assert refused.status_code == 400 and error["param"] == param and "half of a character" in error["message"]
            paired = await ask_escaped(http, "completions", {**ASK, "user": "\U0001f600"})
            assert paired.status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_of_an_http_process_stops_the_requests_whose_answers_it_read(
    stream: bool, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            backend.pause_s = 1.0  # 40 s in all, longer than the waits here
            running = asyncio.create_task(ask(http, "completions", {**ASK, "max_tokens": 40, "stream": stream}))
            await until(lambda: backend.running == 1)
            await connect(http.controller, http.state.limits)  # the process in its place
            await until(lambda: backend.running == 0 and http.state.samples_in_flight.total() == 0)
            assert (await asyncio.wait_for(running, 10)).status_code in (200, 500)
            backend.pause_s = 0
            assert (await ask(http, "completions", ASK)).status_code == 200

    asyncio.run(main())


async def until(holds: Any) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _nothing_runs_on(backend: LearnerBackend) -> Iterator[None]:
    yield
    assert backend.running == 0
