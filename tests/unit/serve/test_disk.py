"""A disk that is full, read-only or damaged: the save fails with its reason, and what was saved before stays."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.paths import parse_path
from tests.unit.serve.http_client import Http
from tests.unit.serve.learner_backend import LearnerBackend
from tests.unit.serve.test_saving import losses_of, trained

KB = 1024
SAVES = {
    "save_weights": "weights",
    "save_weights_for_sampler": "sampler_weights",
    "save_weights_external": "external_weights",
}


@contextmanager
def own_disk(folder: Path, size: str) -> Iterator[None]:
    """A real file system of that size on this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as out:
        while out.write(bytes(KB)):
            pass


def kind_folder(store: CheckpointStore, model: str, kind: str) -> Path:
    return store.root / "local" / model.replace(":", ".") / kind


def save_body(model: str, seq: int, name: str) -> dict[str, Any]:
    return {"model_id": model, "seq_id": seq, "path": name}


@pytest.mark.parametrize("call", SAVES)
def test_a_save_on_a_full_disk_fails_by_name_and_leaves_nothing(
    call: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            folder = kind_folder(store, model, SAVES[call])
            with own_disk(folder, "1m"):
                kept = await http.result(await http.post(call, save_body(model, seq, "kept")))
                fill(folder / ".rest")
                before = sorted(path.name for path in folder.rglob("*"))
                failed = await http.result(await http.post(call, save_body(model, seq + 1, "lost")))
                over = {**save_body(model, seq + 2, "kept"), "overwrite": True}
                failed_too = await http.result(await http.post(call, over))
                for each, name in ((failed, "lost"), (failed_too, "kept")):
                    assert each["category"] == "server" and "No space left on device" in each["error"], each
                    assert f"tinker://{model}/{SAVES[call]}/{name}: cannot be written: " in each["error"]
                    assert str(store.root) not in each["error"] and "/local/" not in each["error"], each
                assert sorted(path.name for path in folder.rglob("*")) == before, "something half-written remains"
                listed = (await http.send("GET", "checkpoints")).json()["checkpoints"]
                assert [each["tinker_path"] for each in listed] == [kept["path"]]
                assert await losses_of(http, model, seq + 3, 2), "the model continues"
                (folder / ".rest").unlink()
                again = await http.result(await http.post(call, save_body(model, seq + 7, "lost")))
                assert again["path"].endswith("/lost")

    asyncio.run(main())


def test_a_read_only_disk_still_lists_and_loads_and_refuses_changes_with_the_reason(
    backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            _, model, seq = await trained(http, 1)
            folder = kind_folder(store, model, "weights")
            with own_disk(folder, "1m"):
                path = (await http.result(await http.post("save_weights", save_body(model, seq, "w"))))["path"]
                subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
                answer = await http.send("DELETE", f"training_runs/{model}/checkpoints/weights/w")
                text, _, reference = answer.json()["detail"].partition("; reference ")
                assert (answer.status_code, text) == (507, f"{path}: cannot be deleted: Read-only file system")
                assert reference, "the log has the error under it"
                failed = await http.result(await http.post("save_weights", save_body(model, seq + 1, "x")))
                assert failed["category"] == "server" and "Read-only file system" in failed["error"], failed
                assert str(store.root) not in failed["error"]
                listed = (await http.send("GET", "checkpoints")).json()["checkpoints"]
                assert [each["tinker_path"] for each in listed] == [path]
                load = {"model_id": model, "seq_id": seq + 2, "path": path, "optimizer": True}
                assert (await http.result(await http.post("load_weights", load)))["path"] == path

    asyncio.run(main())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "rlsys-checkpoint.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_others_stay(
    file: str, backend: LearnerBackend, store: CheckpointStore
) -> None:
    async def main() -> None:
        async with Http(backend, store) as http:
            session, model, seq = await trained(http, 1)
            good, bad = [
                (await http.result(await http.post("save_weights", save_body(model, seq + i, name))))["path"]
                for i, name in enumerate(("good", "bad"))
            ]
            damaged = store.folder("local", parse_path(bad)) / file
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content)
            for number, path in ((1, bad), (2, good)):
                create = {"session_id": session, "model_seq_id": number, "path": path, "optimizer": True}
                result = await http.result(await http.post("load_weights", create))
                if path == good:
                    assert "model_id" in result
                    continue
                assert result["category"] == "user" and bad in result["error"] and file in result["error"], result
                assert str(store.root) not in result["error"]
            result = await http.result(
                await http.post("load_weights", {"model_id": model, "seq_id": seq + 2, "path": bad, "optimizer": True})
            )
            assert bad in result["error"] and str(store.root) not in result["error"]
            assert len((await http.send("GET", "checkpoints")).json()["checkpoints"]) == 2

    asyncio.run(main())
