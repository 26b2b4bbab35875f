"""Signed addresses: whose, for how long, for which content; and archives that are sent as they are read."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest

from rlsys.serve import signing
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.keys import KeyFile
from rlsys.serve.signing import ALGORITHM, Signer
from rlsys.serve.tar_stream import TarStream
from tests.unit.serve.http_client import Http
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.test_saving import trained
from tests.unit.serve.test_tenants import ONE, TWO


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    file = tmp_path / "keys"
    file.write_text(f"{ONE} owner-of-it\n{TWO} two\n")
    file.chmod(0o600)
    return KeyFile(file)


async def saved(http: Http, call: str = "save_weights_external") -> tuple[str, dict[str, Any]]:
    """(model, body of its save)."""
    session = await http.session(key=ONE)
    model = await http.model(session, key=ONE)
    body = {"model_id": model, "seq_id": 1, "path": "w"}
    await http.result(await http.post(call, body, key=ONE), key=ONE)
    return model, body


async def address(http: Http, model: str, key: str) -> str:
    at = f"training_runs/{model}/checkpoints/external_weights/w"
    answer = await http.send("GET", f"{at}/archive", key=key)
    assert answer.status_code == 302, answer.text
    return answer.headers["location"]


def payload(url: str) -> dict[str, Any]:
    part = url.rpartition("/")[2].split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def test_an_address_ends_with_its_time_and_with_its_checkpoint(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            model, body = await saved(http)
            at = f"training_runs/{model}/checkpoints/external_weights/w"
            urls = [await address(http, model, ONE)]
            found = (await http.send("GET", f"{at}/external_weights_urls", key=ONE)).json()["urls"]
            urls += found.values()
            assert [(await http.client.get(url)).status_code for url in urls] == [200] * 3
            monkeypatch.setattr(signing, "FILE_LIFE", timedelta(seconds=-1))
            assert (await http.client.get(await address(http, model, ONE))).status_code == 403
            monkeypatch.undo()
            again = {**body, "seq_id": 2, "overwrite": True}
            assert "path" in await http.result(await http.post("save_weights_external", again, key=ONE), key=ONE)
            assert [(await http.client.get(url)).status_code for url in urls] == [404] * 3, "of a later content"
            later = await address(http, model, ONE)
            assert (await http.client.get(later)).status_code == 200
            assert (await http.send("DELETE", at, key=ONE)).status_code == 204
            assert [(await http.client.get(url)).status_code for url in (*urls, later)] == [404] * 4

    asyncio.run(main())


def test_an_altered_address_is_refused_whatever_was_altered(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            model, _ = await saved(http)
            url = await address(http, model, ONE)
            root, _, token = url.rpartition("/")
            body = payload(url)
            altered = [
                token[:n] + ("A" if token[n] != "A" else "B") + token[n + 1 :] for n in range(0, len(token) - 1, 7)
            ]
            altered += [
                token[:-5],
                token + "A",
                token.replace(".", ""),
                "",
                ".",
                "..",
                "x" * 5000,
                "%00",
                token.split(".")[1],
            ]
            for change in (
                {"sub": "two"},
                {"file": "run.json"},
                {"path": "tinker://x/weights/y"},
                {"aud": "key"},
                {"exp": 2**40},
            ):
                altered.append(jwt.encode({**body, **change}, "guess" * 10, ALGORITHM))
                altered.append(jwt.encode({**body, **change}, "", "none"))
            altered.append(
                Signer(signing.new_secret()).link(signing.Download("owner-of-it", body["path"], "", body["of"]))[0]
            )
            for each in altered:
                status, _ = await http.raw("GET", f"/api/v1/files/{each}")
                assert status in (403, 404), each
            assert (await http.client.get(f"{root}/{token}")).status_code == 200

    asyncio.run(main())


def test_a_file_beside_the_adapter_has_no_address_even_with_a_right_signature(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            model, _ = await saved(http)
            body = payload(await address(http, model, ONE))
            for file in ("rlsys-checkpoint.json", "../../run.json", "/etc/passwd", "..", "adapter_config.json/"):
                asked = signing.Download("owner-of-it", body["path"], file, body["of"])
                token, _ = http.front.signer.link(asked)
                assert (await http.raw("GET", f"/api/v1/files/{token}"))[0] == 404, file

    asyncio.run(main())


def test_an_address_names_no_other_tenant_and_ends_when_the_checkpoint_is_no_longer_published(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            model, _ = await saved(http)
            publish = f"training_runs/{model}/checkpoints/external_weights/w/publish"
            assert (await http.send("POST", publish, key=ONE)).status_code == 204
            mine, theirs = await address(http, model, ONE), await address(http, model, TWO)
            assert payload(theirs)["sub"] == "two" and "owner-of-it" not in str(payload(theirs))
            assert str(store.root) not in str(payload(theirs))
            packed = (await http.client.get(theirs)).content
            assert b"owner-of-it" not in packed
            assert (await http.send("DELETE", publish, key=ONE)).status_code == 204
            assert (await http.client.get(theirs)).status_code == 404
            assert (await http.client.get(mine)).status_code == 200

    asyncio.run(main())


def test_a_damaged_published_checkpoint_does_not_name_its_owner(
    backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            session = await http.session(key=ONE)
            model = await http.model(session, key=ONE)
            body = {"model_id": model, "seq_id": 1, "path": "w"}
            path = (await http.result(await http.post("save_weights", body, key=ONE), key=ONE))["path"]
            await http.send("POST", f"training_runs/{model}/checkpoints/weights/w/publish", key=ONE)
            for file in store.root.glob("owner-of-it/*/weights/w/*.json"):
                file.write_text("{}")
            theirs = await http.session(key=TWO)
            answers = [
                await http.refused("weights_info", {"tinker_path": path}, status=404, key=TWO),
                await http.refused(
                    "create_sampling_session",
                    {"session_id": theirs, "sampling_session_seq_id": 0, "model_path": path},
                    key=TWO,
                ),
            ]
            create = {"session_id": theirs, "model_seq_id": 0, "path": path}
            answers.append((await http.result(await http.post("load_weights", create, key=TWO), key=TWO))["error"])
            for answer in answers:
                assert path in answer and "owner-of-it" not in answer and str(store.root) not in answer, answer

    asyncio.run(main())


@pytest.mark.parametrize(
    "host", ["[", "a b", "a/b", "evil.example@x", "x:y", "", "\u00e9", "a\tb", "http://x", "a" * 300]
)
def test_a_host_that_is_none_makes_no_address(
    host: str, backend: LearnerBackend, store: CheckpointStore, keys: KeyFile
) -> None:
    async def main() -> None:
        async with Http(backend, store, keys=keys) as http:
            model, _ = await saved(http)
            target = f"/api/v1/training_runs/{model}/checkpoints/external_weights/w/archive"
            status, text = await http.raw("GET", target, headers={"host": host}, key=ONE)
            assert status == 400 and "Host: found" in text, text

    asyncio.run(main())


def test_an_archive_is_complete_though_its_checkpoint_is_deleted_meanwhile(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            await http.result(await http.post("save_weights", {"model_id": model, "seq_id": seq, "path": "w"}))
            (checkpoint,) = store.checkpoints("local")
            wanted = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
            (checkpoint.folder / "link").symlink_to("/etc/passwd")
            stream = TarStream(checkpoint.folder)
            store.delete(checkpoint)
            packed = b"".join(stream.parts())
            assert len(packed) == stream.nbytes
            with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
                found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            assert found == wanted and len(found) == 4

    asyncio.run(main())
