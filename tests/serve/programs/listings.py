"""RestClient: runs, checkpoints, sessions; publish, time to live, delete; getting weights out; unload."""

from __future__ import annotations

import io
import tarfile
import urllib.request
from typing import Any

from tests.serve.programs.saving import train
from tests.serve.programs.sdk import VERSION, wait
from tests.serve.programs.seen import MODEL, check, refused, say, step
from tests.serve.programs.training import fresh

PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def lists(client: Any, _: Any) -> None:
    rest = client.create_rest_client()
    trainer = fresh(client)
    run = wait(trainer.get_info()).model_id
    with step("checkpoints to list"):
        train(trainer, 1)
        more = {"ttl_seconds": 3600} if VERSION >= (0, 15) else {}
        state = wait(trainer.save_state("listed", **more)).path
        sampler = wait(trainer.save_weights_for_sampler("listed")).path
    with step("training runs"):
        runs = wait(rest.list_training_runs(limit=100)).training_runs
        check("the run is listed", run in [each.training_run_id for each in runs], True)
        check("a page is as long as asked", len(wait(rest.list_training_runs(limit=1)).training_runs), 1)
        one = wait(rest.get_training_run(run))
        check("its base", one.base_model, MODEL)
        check("its rank", one.lora_rank, 8)
        check("its last checkpoint", one.last_checkpoint.tinker_path, state)
        check("its last sampler checkpoint", one.last_sampler_checkpoint.tinker_path, sampler)
        check("the run of a path", wait(rest.get_training_run_by_tinker_path(state)).training_run_id, run)
        info = wait(rest.get_weights_info_by_tinker_path(state))
        check("weights_info", (info.base_model, info.is_lora, info.lora_rank), (MODEL, True, 8))
    with step("checkpoints"):
        own = wait(rest.list_checkpoints(run)).checkpoints
        kinds = {each.tinker_path: each.checkpoint_type for each in own}
        check("both are listed", kinds, {state: "training", sampler: "sampler"})
        check("ids", {each.checkpoint_id for each in own}, {"weights/listed", "sampler_weights/listed"})
        say(saw="sizes", sizes=[getattr(each, "size_bytes", None) for each in own])
        mine = wait(rest.list_user_checkpoints(limit=100)).checkpoints
        check("among the user's too", {state, sampler} <= {each.tinker_path for each in mine}, True)
        if VERSION >= (0, 15):
            expiry = {each.tinker_path: each.expires_at for each in own}
            check("ttl_seconds shows", (expiry[state] is not None, expiry[sampler] is None), (True, True))
            wait(rest.set_checkpoint_ttl_from_tinker_path(sampler, 7200))
            wait(rest.set_checkpoint_ttl_from_tinker_path(state, None))
            expiry = {each.tinker_path: each.expires_at for each in wait(rest.list_checkpoints(run)).checkpoints}
            check(
                "a time to live can be set and taken away",
                (expiry[state] is None, expiry[sampler] is not None),
                (True, True),
            )
    with step("publish"):
        wait(rest.publish_checkpoint_from_tinker_path(state))
        check("published", public(rest, run, state), True)
        wait(rest.unpublish_checkpoint_from_tinker_path(state))
        check("unpublished", public(rest, run, state), False)
    with step("sessions"):
        session = run.split(":")[0]
        check("the session is listed", session in wait(rest.list_sessions(limit=100)).sessions, True)
        check("with its runs", run in wait(rest.get_session(session)).training_run_ids, True)
    if hasattr(rest, "search_sessions"):  # 0.36 on
        with step("search_sessions"):
            from tinker.types import SessionSearchRequest

            found = wait(rest.search_sessions(SessionSearchRequest(session_id=session)))
            check("search finds it", [each.session_id for each in found.sessions], [session])
    weights_out(rest, trainer, state, sampler)
    with step("delete"):
        wait(rest.delete_checkpoint_from_tinker_path(sampler))
        left = [each.tinker_path for each in wait(rest.list_checkpoints(run)).checkpoints]
        check("deleted", (sampler in left, state in left), (False, True))
        wait(rest.delete_checkpoint(run, "weights/listed"))
        check(
            "deleted by id", state in [each.tinker_path for each in wait(rest.list_checkpoints(run)).checkpoints], False
        )
        refused("what is deleted cannot be loaded", [], lambda: wait(trainer.load_state(state)))
    unload(client, run)


def public(rest: Any, run: str, path: str) -> Any:
    return {each.tinker_path: each.public for each in wait(rest.list_checkpoints(run)).checkpoints}[path]


def weights_out(rest: Any, trainer: Any, state: str, sampler: str) -> None:
    if hasattr(rest, "get_checkpoint_archive_url_from_tinker_path"):  # up to 0.33
        with step("archive"):
            answer = wait(rest.get_checkpoint_archive_url_from_tinker_path(sampler))
            names = members(answer.url)
            say(saw="archive", names=names)
            check("the archive is a PEFT folder", {each.rsplit("/", 1)[-1] for each in names} >= PEFT_FILES, True)
            answer = wait(rest.get_checkpoint_archive_url_from_tinker_path(state))
            check("a training checkpoint's too", len(members(answer.url)) > 0, True)
    if hasattr(trainer, "save_weights_external"):  # 0.28 on
        with step("external weights"):
            path = wait(trainer.save_weights_external("out", ttl_seconds=3600)).path
            check("an external checkpoint's path", path.endswith("/external_weights/out"), True)
            urls = wait(rest.get_external_weights_urls(path)).urls
            check("external weights are a PEFT folder", set(urls) >= PEFT_FILES, True)
            for name in sorted(PEFT_FILES):
                with urllib.request.urlopen(urls[name], timeout=60) as response:
                    check(f"{name} can be fetched without the key", len(response.read()) > 0, True)
            wait(rest.delete_checkpoint_from_tinker_path(path))


def members(url: str) -> list[str]:
    """Of an archive, fetched without the key as a browser does."""
    with (
        urllib.request.urlopen(url, timeout=60) as response,
        tarfile.open(fileobj=io.BytesIO(response.read())) as archive,
    ):
        return archive.getnames()


def unload(client: Any, run: str) -> None:
    """SDKs up to 0.25 have the call, in a layer below their public one; nothing of theirs makes it."""
    if VERSION > (0, 25):
        return
    with step("unload_model"):
        from tinker.lib.client_connection_pool_type import ClientConnectionPoolType
        from tinker.types import UnloadModelRequest

        holder = client.holder

        async def send() -> Any:
            with holder.aclient(ClientConnectionPoolType.TRAIN) as low:
                return await low.models.unload(request=UnloadModelRequest(model_id=run))

        answer = wait(holder.run_coroutine_threadsafe(send()).future())
        check("unload_model gives a promise", bool(answer.request_id), True)
