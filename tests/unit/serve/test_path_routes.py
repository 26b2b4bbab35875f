"""Every call that takes a path, with every spelling that leads elsewhere: refused, nothing read, nothing changed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.paths import parse_path
from tests.unit.serve.http_client import Http
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.test_paths import RUN, SPELLINGS, WRONG_KINDS, WRONG_NAMES, WRONG_RUNS
from tests.unit.serve.test_saving import trained

ROUTES = [
    *[("DELETE", ""), ("POST", "/publish"), ("DELETE", "/publish"), ("PUT", "/ttl"), ("GET", "/archive")],
    ("GET", "/external_weights_urls"),
]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below but the database, which notes calls too."""
    found = [path for path in folder.rglob("*") if "sqlite3" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture
def world(tmp_path: Path) -> tuple[CheckpointStore, Path]:
    """A store, and beside it a folder that no request may reach."""
    return CheckpointStore(tmp_path / "world" / "store"), tmp_path / "world"


async def with_traps(http: Http, store: CheckpointStore, world: Path) -> tuple[str, str, str, int]:
    """(session, model, path of a saved checkpoint, next number). A copy of it lies wherever a wrong spelling may lead,
    so that a spelling that leads there would be served."""
    session, model, seq = await trained(http, 1)
    path = (await http.result(await http.post("save_weights", {"model_id": model, "seq_id": seq, "path": "w"})))["path"]
    saved = store.folder("local", parse_path(path))
    for trap in (world / "elsewhere", store.root / "elsewhere", store.root / "local" / "a", saved.parent / "a.b" / "w"):
        shutil.copytree(saved, trap)
    for link, to in (("link", world / "elsewhere"), ("up", world), ("self", saved), ("root", Path("/"))):
        (saved.parent / link).symlink_to(to)
    (saved.parent.parent / "sampler_weights").symlink_to(world)
    (store.root / "local" / RUN.replace(":", ".")).symlink_to(saved.parent.parent)
    return session, model, path, seq + 1


def spellings(model: str) -> Iterator[str]:
    for each in SPELLINGS:
        yield each.replace(RUN, model)
    yield from (f"tinker://{model}/weights/{link}" for link in ("link", "up", "self", "root", "link/w", "up/elsewhere"))
    yield from (
        f"tinker://{model}/sampler_weights/elsewhere",
        f"tinker://{RUN}/weights/w",
        f"tinker://{RUN}/weights/self",
    )
    dots = ("..", "%2e%2e", "..%2f", "%252e%252e", "..\\", "\uff0e\uff0e", "..%c0%af", ".%00.", "....//", "..;")
    yield from (f"tinker://{model}/weights/{each}/elsewhere" for each in dots)
    yield from (f"tinker://{model}/{each}/elsewhere" for each in dots)
    yield from (f"tinker://{each}/elsewhere/w" for each in dots)
    yield from (
        f"tinker://{model}/weights/w{tail}"
        for tail in (".", " ", "..", "\t", "%20", "::$DATA", "\u0000", "\u200d", "~")
    )
    yield from (f"tinker://{model}/weights/{'../' * n}elsewhere" for n in range(1, 12))
    yield from (f"tinker://{model}/weights/{'a' * n}" for n in (129, 255, 256, 1000))
    yield f"tinker://{model}/weights/W"


def test_no_spelling_in_a_body_leads_out_of_the_store(
    backend: LearnerBackend, world: tuple[CheckpointStore, Path]
) -> None:
    store, folder = world

    async def main() -> None:
        async with Http(backend, store) as http:
            session, model, path, seq = await with_traps(http, store, folder)
            before = tree(folder)
            wrong = sorted(set(spellings(model)))
            assert len(wrong) > 170 and path not in wrong
            sampler = {"session_id": session, "sampling_session_seq_id": 7}
            for number, spelling in enumerate(wrong):
                bodies: list[tuple[str, dict[str, Any]]] = [
                    ("weights_info", {"tinker_path": spelling}),
                    ("load_weights", {"session_id": session, "model_seq_id": 100 + number, "path": spelling}),
                    ("load_weights", {"model_id": model, "seq_id": seq, "path": spelling}),
                    ("create_sampling_session", {**sampler, "model_path": spelling}),
                ]
                for call, body in bodies:
                    response = await http.send("POST", call, content=json.dumps(body).encode())
                    text = response.text
                    if response.status_code == 200:  # a call of a model, whose path is looked up at its turn
                        result = await http.result(response.json())
                        assert result.get("category") == "user", (call, spelling, result)
                        text += str(result)
                    else:
                        assert response.status_code in (400, 404), (call, spelling, response.text)
                    assert "/world" not in text.replace(spelling, "") and "root:x:" not in text, (call, spelling, text)
                    seq += "seq_id" in body
            assert tree(folder) == before
            right = {"session_id": session, "model_seq_id": 1, "path": path}
            assert "model_id" in await http.result(await http.post("load_weights", right))

    asyncio.run(main())


def test_no_name_of_a_save_leads_out_of_the_store(backend: LearnerBackend, world: tuple[CheckpointStore, Path]) -> None:
    store, folder = world

    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, _, seq = await with_traps(http, store, folder)
            before = tree(folder)
            links = ["link", "up", "self", "root"]  # names that are right, of links that are not
            names = [
                *WRONG_NAMES,
                *links,
                "../w",
                "../../elsewhere/x",
                "/etc/x",
                "a/b",
                "tinker://x/weights/y",
                "a" * 200,
            ]
            for number, name in enumerate(names, start=seq):
                for call in ("save_weights", "save_weights_for_sampler", "save_weights_external"):
                    body = {"model_id": model, "seq_id": number, "path": name, "overwrite": True}
                    response = await http.send("POST", call, content=json.dumps(body).encode())
                    if response.status_code == 200 and call == "save_weights":
                        assert name in links
                        assert (await http.result(response.json()))["category"] == "user", name
                    elif call == "save_weights":
                        assert response.status_code == 400 and name not in links, (name, response.text)
            assert tree(folder) == before

    asyncio.run(main())


def test_no_spelling_in_an_address_leads_out_of_the_store(
    backend: LearnerBackend, world: tuple[CheckpointStore, Path]
) -> None:
    store, folder = world

    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, _, _ = await with_traps(http, store, folder)
            before, asked = tree(folder), 0
            places = [
                *[(run, "weights", "w") for run in (*WRONG_RUNS, RUN)],
                *[(model, kind, "w") for kind in WRONG_KINDS],
                *[(model, "weights", name) for name in (*WRONG_NAMES, "link", "up", "self", "root")],
                (model, "sampler_weights", "elsewhere"),
                ("..", "..", "elsewhere"),
                (model, "..", "elsewhere"),
            ]
            for parts in places:
                plain = "/".join(quote(each, safe="") for each in parts)
                for spelt in {plain, plain.replace(".", "%2e"), quote(plain, safe="/"), plain.replace("%2F", "/")}:
                    for method, call in ROUTES:
                        target = f"/api/v1/training_runs/{spelt.replace('/', '/checkpoints/', 1)}{call}"
                        status, text = await http.raw(method, target, b'{"ttl_seconds": 5}')
                        assert status in (400, 404, 405), (method, target, status, text)
                        assert "/world" not in text and "adapter_config" not in text, (target, text)
                        asked += 1
            assert asked > 1000 and tree(folder) == before
            for target in (
                "/api/v1/../../etc/passwd",
                "/api/v1//etc/passwd",
                "//etc/passwd",
                "/api/v1/files/../healthz",
            ):
                assert (await http.raw("GET", target))[0] in (403, 404)

    asyncio.run(main())
