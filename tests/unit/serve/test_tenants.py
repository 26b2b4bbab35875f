"""Two tenants: what belongs to one is for the other exactly as what does not exist; and no key opens nothing."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import Limits
from rlsys.serve.keys import KeyFile
from tests.unit.serve.http_client import Http, pass_body
from tests.unit.serve.learner_backend import LearnerBackend

ONE, TWO = "tml-aaaaaaaa", "tml-bbbbbbbb"
OPEN = {("GET", "/api/v1/healthz"), ("GET", "/api/v1/readyz"), ("GET", "/api/v1/files/{token}")}


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    file = tmp_path / "keys"
    file.write_text(f"{ONE} one\n{TWO} two\n")
    file.chmod(0o600)
    return KeyFile(file)


def every_route(app: Any) -> Iterator[tuple[str, str]]:
    """Of the application as it is served, whatever included a router."""
    while not isinstance(app, FastAPI):
        app = app._app
    for route in app.routes:
        if isinstance(route, APIRoute):
            for method in sorted(route.methods):
                yield method, route.path
        else:
            raise AssertionError(f"{route}: a route of another kind, which these tests do not see")


def test_every_route_but_three_wants_a_key_and_a_wrong_one_is_as_none(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, Limits(failed_keys=1000), keys=keys) as http:
            routes = list(every_route(http.app))
            assert len(routes) > 30
            for method, path in routes:
                url = re.sub(r"\{[^}]*\}", "x", path)
                headers = [{} if key is None else {"X-API-Key": key} for key in (None, "", "tml-wrong", ONE + "x")]
                answers = [await http.client.request(method, url, json={}, headers=each) for each in headers]
                if (method, path) in OPEN:
                    assert all(answer.status_code != 401 for answer in answers), path
                    continue
                assert [answer.status_code for answer in answers] == [401] * 4, path
                assert len({answer.content for answer in answers}) == 1
                assert int(answers[0].headers["content-length"]) > 0
            unknown = await http.send("POST", "no/such/route", {}, key=ONE)
            assert unknown.status_code == 404 and unknown.json()["detail"]

    asyncio.run(main())


def test_what_belongs_to_another_is_as_what_does_not_exist(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            session = await http.session(key=ONE)
            model = await http.model(session, key=ONE)
            promise = await http.forward_backward(model, 1, key=ONE)
            await http.result(promise, key=ONE)
            for seq, (call, name) in enumerate((("save_weights", "w"), ("save_weights_for_sampler", "s")), start=2):
                await http.result(
                    await http.post(call, {"model_id": model, "seq_id": seq, "path": name}, key=ONE), key=ONE
                )
            unnamed = {"model_id": model, "seq_id": 4, "sampling_session_seq_id": 0}
            made = await http.result(await http.post("save_weights_for_sampler", unnamed, key=ONE), key=ONE)
            sampler = made["sampling_session_id"]
            theirs = await http.session(key=TWO)
            ghost = "0" * 32
            no_model, no_sampler, no_request = (
                f"{ghost}:train:0",
                f"{ghost}:sample:0",
                promise["request_id"][:9] + ghost,
            )
            number, prompt = {"sampling_session_seq_id": 0}, {"chunks": [{"tokens": [1]}]}
            forward_input = pass_body("", 5)["forward_backward_input"]
            at, routes = "training_runs/{model}/checkpoints", set(every_route(http.app))
            saved = {"path": "tinker://{model}/weights/w"}
            asked: list[tuple[str, str, Any]] = [
                ("POST", "session_heartbeat", {"session_id": "{session}"}),
                ("POST", "sessions/{session}/finish", {}),
                ("GET", "sessions/{session}", None),
                ("POST", "create_model", {"session_id": "{session}", "model_seq_id": 0, "base_model": "tiny"}),
                ("POST", "create_sampling_session", {"session_id": "{session}", **number, "base_model": "tiny"}),
                ("POST", "create_sampling_session", {"session_id": theirs, **number, "model_path": "{saved}"}),
                ("POST", "get_info", {"model_id": "{model}"}),
                ("POST", "unload_model", {"model_id": "{model}"}),
                ("POST", "forward", {**pass_body("{model}", 5), "forward_input": forward_input}),
                ("POST", "forward_backward", pass_body("{model}", 5)),
                ("POST", "optim_step", {"model_id": "{model}", "seq_id": 5}),
                ("POST", "save_weights", {"model_id": "{model}", "seq_id": 5, "path": "x"}),
                ("POST", "save_weights_for_sampler", {"model_id": "{model}", "seq_id": 5, "path": "x"}),
                ("POST", "save_weights_for_sampler", {"model_id": "{model}", "seq_id": 5, **number}),
                ("POST", "save_weights_external", {"model_id": "{model}", "seq_id": 5, "path": "x"}),
                ("POST", "load_weights", {"model_id": "{model}", "seq_id": 5, **saved}),
                ("POST", "load_weights", {"session_id": "{session}", "model_seq_id": 3, **saved}),
                ("POST", "load_weights", {"session_id": theirs, "model_seq_id": 0, **saved}),
                ("POST", "weights_info", {"tinker_path": "tinker://{model}/weights/w"}),
                ("POST", "weights_info", {"tinker_path": "{saved}"}),
                ("POST", "asample", {"sampling_session_id": "{sampler}", "seq_id": 0, "prompt": prompt}),
                ("GET", "samplers/{sampler}", None),
                ("POST", "retrieve_future", {"request_id": "{request}"}),
                ("POST", "cancel_future", {"request_id": "{request}"}),
                ("GET", "training_runs/{model}", None),
                ("GET", at, None),
                ("POST", "/v1/completions", {"model": "{saved}", "prompt": [1], "max_tokens": 1}),
                ("POST", "/v1/chat/completions", {"model": "{saved}", "messages": [{"role": "user", "content": "x"}]}),
                ("GET", "/v1/models/{saved}", None),
                ("DELETE", at + "/weights/w", None),
                ("POST", at + "/weights/w/publish", None),
                ("DELETE", at + "/weights/w/publish", None),
                ("PUT", at + "/weights/w/ttl", {"ttl_seconds": 1}),
                ("GET", at + "/weights/w/archive", None),
                ("GET", at + "/external_weights/w/external_weights_urls", None),
            ]
            # What names nothing of another: their answers hold own things alone.
            own: list[tuple[str, str, Any]] = [
                *[("GET", path, None) for path in ("healthz", "readyz", "get_server_capabilities", "auth/apikey/me")],
                ("GET", "/v1/models", None),
                *[("GET", path, None) for path in ("training_runs", "checkpoints", "sessions", "files/x")],
                *[("POST", f"client/{path}", {}) for path in ("config", "dynamic_config")],
                ("POST", "auth/token", {}),
                ("POST", "telemetry", {"session_id": session}),
                ("POST", "create_session", {}),
                ("POST", "sessions/search", {"session_id": session}),
            ]
            for method, path, _ in (*asked, *own):
                routes -= {
                    each
                    for each in routes
                    if each[0] == method and fits(each[1], path if path.startswith("/") else f"/api/v1/{path}")
                }
            assert not routes, f"these routes have no case here: {sorted(routes)}"
            listed = await http.send("GET", "checkpoints", key=ONE)
            assert model in listed.text, "what must not be seen is there"
            real = {
                "saved": f"tinker://{model}/sampler_weights/s",
                "session": session,
                "model": model,
                "sampler": sampler,
                "request": promise["request_id"],
            }
            none = {
                "saved": f"tinker://{no_model}/sampler_weights/s",
                "session": ghost,
                "model": no_model,
                "sampler": no_sampler,
                "request": no_request,
            }
            for method, path, body in asked:
                answers = []
                for names in (real, none):
                    response = await http.send(method, filled(path, names), filled(body, names), key=TWO)
                    text = response.text
                    for key, name in names.items():
                        text = text.replace(name, key)
                    answers.append((response.status_code, text))
                assert answers[0] == answers[1] and 400 <= answers[0][0] < 500, (method, path, answers)
                spent = [await seconds(http, method, filled(path, each), filled(body, each)) for each in (real, none)]
                assert abs(spent[0] - spent[1]) < 0.002 + 0.5 * min(spent), (method, path, spent)
            for method, path, body in own:
                response = await http.send(method, path, body, key=TWO)
                assert response.status_code == (403 if path == "files/x" else 200), (path, response.text)
                assert not any(name in response.text for name in real.values()), (path, response.text)
            search = (await http.send("POST", "sessions/search", {}, key=TWO)).json()["sessions"]
            assert theirs in [each["session_id"] for each in search] and session not in str(search)
            step = await http.result(await http.optim_step(model, 5, key=ONE), key=ONE)
            assert step["metrics"]["grad_norm"] > 0, "another tenant's calls changed something"

    asyncio.run(main())


def test_a_published_checkpoint_is_readable_and_nothing_more(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            session = await http.session(key=ONE)
            model = await http.model(session, key=ONE)
            await http.result(
                await http.post("save_weights", {"model_id": model, "seq_id": 1, "path": "w"}, key=ONE), key=ONE
            )
            at, path = f"training_runs/{model}/checkpoints/weights/w", f"tinker://{model}/weights/w"
            assert (await http.send("POST", f"{at}/publish", key=ONE)).status_code == 204
            theirs = await http.session(key=TWO)
            create = {"session_id": theirs, "model_seq_id": 0, "path": path}
            assert "model_id" in await http.result(await http.post("load_weights", create, key=TWO), key=TWO)
            assert (await http.post("weights_info", {"tinker_path": path}, key=TWO))["lora_rank"] == 4
            assert (await http.send("GET", f"{at}/archive", key=TWO)).status_code == 302
            for method, call in (("DELETE", ""), ("DELETE", "/publish"), ("PUT", "/ttl")):
                assert (await http.send(method, at + call, {}, key=TWO)).status_code == 404
            assert (await http.send("GET", "checkpoints", key=TWO)).json()["checkpoints"] == []

    asyncio.run(main())


def test_tokens_stand_for_a_key_for_a_while_and_give_no_further_tokens(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            token = (await http.post("auth/token", {}, key=ONE))["jwt"]
            assert token.count(".") == 2
            assert (await http.send("GET", "training_runs", key=token)).status_code == 200
            assert (await http.send("POST", "auth/token", {}, key=token)).status_code == 401
            head, body, signature = token.split(".")
            for forged in (
                f"{head}.{body}.",
                f"{head}.{body}.{signature[:-2]}xx",
                f"{head}..{signature}",
                f"..{signature}",
            ):
                assert (await http.send("GET", "training_runs", key=forged)).status_code == 401
            flags = [await http.post("client/config", {"sdk_version": "0.22.0"}, key=ONE)]
            assert "pjwt_auth_enabled" not in flags[0]

    asyncio.run(main())


async def seconds(http: Http, method: str, path: str, body: Any) -> float:
    """CPU time of a request: the least of a few."""
    found = []
    for _ in range(5):
        began = time.process_time()
        await http.send(method, path, body, key=TWO)
        found.append(time.process_time() - began)
    return min(found)


def fits(route: str, path: str) -> bool:
    """Whether the path is one of the route's, as a pattern of it: the server's own matching needs real ids."""
    return re.fullmatch(re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(route)), path) is not None


def filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for key, name in names.items():
            value = value.replace(f"{{{key}}}", name)
        return value
    if isinstance(value, dict):
        return {key: filled(each, names) for key, each in value.items()}
    return [filled(each, names) for each in value] if isinstance(value, list) else value
