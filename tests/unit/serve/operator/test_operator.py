"""The operator's side in this process: figures, metrics, readiness, and who gets in."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlsys.errors import ConfigError
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import OperatorSection
from rlsys.serve.load import load_serve_config
from rlsys.serve.operator.app import Operator
from rlsys.serve.operator.guard import token_of
from tests.unit.serve.http_client import KEY, Http
from tests.unit.serve.learner_backend import LearnerBackend

TOKEN = "operator-0123456789"
PATHS = ("/", "/status.json", "/metrics")


def side(http: Http, token: str | None = None, base: str = "http://127.0.0.1:9000") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Operator(http.front).app(token)), base_url=base)


def test_figures_and_metrics_are_those_of_what_runs(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http, side(http) as operator:
            before = (await operator.get("/status.json")).json()
            assert before["sessions"] == before["train_tokens"] == 0 and before["tenants"] == []
            model = await http.model(await http.session())
            await http.result(await http.forward_backward(model, 1))
            await http.result(await http.optim_step(model, 2))
            waiting = await http.optim_step(model, 4)
            found = (await operator.get("/status.json")).json()
            assert found["sessions"] == 1 and found["steps"] == 2 and found["unsettled_promises"] == 1
            assert found["train_tokens"] > 0 and found["train_tokens_per_s"] >= 0 and found["memory_bytes"] > 2**20
            (base,) = found["bases"]
            assert (base["name"], base["models"], base["waiting_calls"]) == ("tiny", 1, 1)
            assert found["tenants"] == [
                {"name": "local", "sessions": 1, "models": 1, "samplers": 0, "samples_in_flight": 0}
            ]
            assert found["ready"] == {"tiny": "ready"} and not found["stopping"]
            metrics = samples((await operator.get("/metrics")).text)
            assert metrics["rlsys_sessions", ()] == 1 and metrics["rlsys_steps_total", ()] == 2
            assert metrics["rlsys_train_tokens_total", ()] == found["train_tokens"]
            assert metrics["rlsys_waiting_calls", (("base", "tiny"),)] == 1
            assert metrics["process_resident_memory_bytes", ()] > 2**20
            await http.optim_step(model, 3)
            await http.result(waiting)

    asyncio.run(main())


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_nothing_from_outside_becomes_a_label(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            operator = Operator(http.front)
            for at in range(50):
                operator.metrics.request(f"M{at}", "other", 404, 0.1)
            found = samples(operator.metrics.text(await http.controller.figures()).decode())
            counts = [labels for (name, labels) in found if name == "rlsys_request_seconds_count"]
            assert counts == [(("method", "other"), ("route", "other"), ("status", "404"))]

    asyncio.run(main())


def test_a_server_is_ready_while_its_deployments_answer_and_all_may_ask(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http, side(http, TOKEN) as operator:
            for client, path in ((http.client, "/api/v1/readyz"), (operator, "/readyz"), (operator, "/api/v1/readyz")):
                answer = await client.get(path)
                assert answer.status_code == 200 and answer.json() == {"status": "ready"}
            assert (
                (await operator.get("/healthz")).status_code
                == (await operator.get("/api/v1/healthz")).status_code
                == 200
            )
        async with Http(backend, store) as http, side(http) as operator:
            backend.open.clear()
            answer = await http.client.get("/api/v1/readyz")
            assert answer.status_code == 503 and answer.json() == {"status": "a deployment does not answer"}
            assert (await http.client.get("/api/v1/healthz")).status_code == 200
            assert "did not answer" in (await operator.get("/status.json")).json()["ready"]["tiny"]
            backend.open.set()
            http.front.closing = True
            assert (await operator.get("/readyz")).json() == {"status": "stopping"}

    asyncio.run(main())


def test_the_operators_side_is_not_on_the_port_of_clients(backend: LearnerBackend, store: CheckpointStore) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            for path in PATHS:
                assert (await http.client.get(path)).status_code == 401
                assert (await http.client.get(path, headers={"X-API-Key": KEY})).status_code == 404

    asyncio.run(main())


def test_without_a_token_only_a_request_to_loopback_is_answered(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            for host, status in (("127.0.0.1:9000", 200), ("localhost:9000", 200), ("[::1]:9000", 200),
                                 ("evil.example:9000", 403), ("127.0.0.1.evil.example", 403), ("", 403)):  # fmt: skip
                async with side(http) as operator:
                    for path in PATHS:
                        assert (await operator.get(path, headers={"Host": host})).status_code == status, host

    asyncio.run(main())


def test_a_token_opens_the_side_as_bearer_or_as_password(backend: LearnerBackend, store: CheckpointStore) -> None:
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    right = [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {basic}"]
    wrong = [None, "", "Bearer", "Bearer x", f"Bearer {KEY}", TOKEN, "Basic !!!", "Basic eDp5"]

    async def main() -> None:
        async with Http(backend, store) as http, side(http, TOKEN, "http://metrics.example") as operator:
            for path in PATHS:
                for header in (*right, *wrong):
                    headers = {} if header is None else {"Authorization": header}
                    answer = await operator.get(path, headers=headers)
                    assert answer.status_code == (200 if header in right else 401), header
                    assert ("www-authenticate" in answer.headers) == (header in wrong)

    asyncio.run(main())


REFUSED: dict[str, tuple[list[str], str]] = {
    "no token": (["operator.host=0.0.0.0"], "without operator.token_file"),
    "no TLS": (["operator.host=0.0.0.0", "operator.token_file=/x"], "without TLS"),
    "port": (["operator.port=70000"], "operator.port"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operators_side_that_others_could_read_is_refused(name: str) -> None:
    overrides, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        load_serve_config(None, overrides, {"models": {"x": "x"}})


def test_ports_are_apart_unless_given() -> None:
    ports = [(8000, None, 9000), (8000, 7, 7), (0, None, 0), (65000, None, 0), (0, 5, 5)]
    for bind, own, wanted in ports:
        assert OperatorSection(port=own).port_beside(bind) == wanted


@pytest.mark.parametrize("content", ["", "short\n", None])
def test_a_token_file_without_a_token_is_refused(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"operator\.token_file"):
        token_of(OperatorSection(token_file=str(file)))
