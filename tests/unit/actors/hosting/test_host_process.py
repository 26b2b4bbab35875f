from __future__ import annotations

import asyncio
import os
import pickle
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from actors.faults.actor_calls import as_raised
from actors.hosting.host_process import HostProcess, InProcess, start_host
from rlsys.errors import ActorDiedError, ActorFailedError, SamplingError
from rlsys.types import Array
from tests.unit.actors.hosting.bodies import Body
from tests.waiting import run as to_end
from tests.waiting import until_gone

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(loop: asyncio.AbstractEventLoop) -> Any:
    def finish(work: Coroutine[Any, Any, Any]) -> Any:
        return loop.run_until_complete(asyncio.wait_for(work, LIMIT_S))

    return finish


@pytest.fixture(scope="module")
def host(run: Any) -> Iterator[HostProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSYS_TEST_HOST", "inherited")
        patch.setenv("OMP_NUM_THREADS", "1")  # numpy's BLAS starts its threads on import
        made = HostProcess("sampler 3", Body, ["a body"])
    yield made
    run(made.close())
    assert not psutil.pid_exists(made.pid)


@pytest.fixture
def brief(run: Any) -> Iterator[HostProcess]:
    """A host process that a test may end."""
    made = HostProcess("sampler 3", Body, ["a body"])
    yield made
    with suppress(ActorDiedError):
        run(made.close())


def test_a_host_process_is_the_actors_in_all_that_is_inherited_and_imports_nothing_heavy(
    host: HostProcess, run: Any
) -> None:
    facts = run(host.call("facts"))
    assert facts["name"] == "a body" and facts["pid"] == host.pid != os.getpid()
    assert facts["environment"] == "inherited" and facts["path"] == sys.path
    assert facts["cores"] == sorted(os.sched_getaffinity(0)) and facts["nice"] == os.nice(0)
    assert facts["output"] == [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
    assert facts["threads"] == facts["tasks"] == 1, "a body may fork"
    assert facts["loaded"] == []


def test_arrays_of_any_size_cross_in_both_directions(host: HostProcess, run: Any) -> None:
    arrays: dict[str, Array] = {
        "large": np.arange(5_000_000, dtype=np.float32),  # far above a socket's buffer
        "empty": np.zeros((0, 3), np.int32),
        "strided": np.arange(100, dtype=np.int64)[::7],
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "flags": np.array([True, False]),
    }
    arrays["large"].setflags(write=False)  # as Ray gives them
    doubled = run(host.call("double", arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(doubled[name], array * 2)
        assert doubled[name].shape == array.shape and doubled[name].dtype == (array * 2).dtype
    data = os.urandom(3_000_000)
    assert run(host.call("echo", {"bytes": data, "none": None}))["bytes"] == data


def test_many_calls_run_at_once_and_each_gets_its_answer(host: HostProcess, run: Any) -> None:
    async def calls() -> list[int]:
        pauses = [0.3 * (i % 7) / 7 for i in range(300)]
        large = [host.call("echo", np.full(200_000, i)) for i in range(20)]
        small = asyncio.gather(*(host.call("later", pause, i) for i, pause in enumerate(pauses)))
        arrays = await asyncio.gather(*large)
        assert [int(array[0]) for array in arrays] == list(range(20))
        return await small

    assert run(calls()) == list(range(300))


def test_a_call_is_answered_while_another_runs(host: HostProcess, run: Any) -> None:
    async def both() -> list[str]:
        ends: list[str] = []

        async def one(name: str, pause: float) -> None:
            await host.call("later", pause, 0)
            ends.append(name)

        await asyncio.gather(one("long", 1.0), one("short", 0.0))
        return ends

    assert run(both()) == ["short", "long"]


def test_errors_keep_type_message_and_cause(host: HostProcess, run: Any) -> None:
    with pytest.raises(SamplingError, match=r"^temperature: found -1$") as ours:
        run(host.call("fail", "ours"))
    assert not getattr(ours.value, "__notes__", []), "the message says it all"
    with pytest.raises(SamplingError, match=r"^nothing was started$") as caused:
        run(host.call("fail", "caused"))
    assert isinstance(caused.value.__cause__, IndexError) and "out of bounds" in str(caused.value.__cause__)
    with pytest.raises(OSError, match="No space left on device") as full:
        run(host.call("fail", ""))
    assert full.value.errno == 28
    assert "bodies.py" in full.value.__notes__[0] and "in fail" in full.value.__notes__[0]


def test_an_error_of_a_library_keeps_its_name_without_the_library(
    host: HostProcess, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "vllm"]:  # another test has imported it
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Exception, match=r"^EngineCore encountered an issue\n") as dead:
        run(host.call("fail", "library"))
    assert type(dead.value).__name__ == "EngineDeadError"
    with pytest.raises(Exception, match=r"^1 and 2\n") as picky:
        run(host.call("fail", "picky"))
    assert type(picky.value).__name__ == "Picky"
    assert "vllm" not in sys.modules


@pytest.mark.parametrize(("kind", "name"), [("library", "EngineDeadError"), ("", "OSError")])
def test_the_run_s_error_names_the_place_in_the_host_process(host: HostProcess, run: Any, kind: str, name: str) -> None:
    with pytest.raises(Exception, match=r"issue|space") as caught:
        run(host.call("fail", kind))
    text = "".join(traceback.format_exception(caught.value))
    error = pickle.loads(cloudpickle.dumps(RayTaskError("SamplerActor.sample", text, caught.value)))
    failure = as_raised(error, "sampler 3")
    assert isinstance(failure, ActorFailedError)
    assert re.match(rf"sampler 3: {name}: .*/hosting/bodies\.py:\d+ in fail\)$", str(failure)), failure


def test_what_cannot_be_pickled_fails_its_own_call(host: HostProcess, run: Any) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        run(host.call("unpicklable"))
    with pytest.raises(TypeError, match="cannot pickle"):
        run(host.call("echo", (part for part in [1])))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        run(host.call("absent"))
    assert run(host.call("later", 0.0, 5)) == 5


def test_a_cancelled_call_is_cancelled_in_the_host(host: HostProcess, run: Any) -> None:
    async def cancel() -> list[str]:
        call = asyncio.ensure_future(host.call("wait_until_cancelled"))
        while "waits" not in await host.call("logged"):
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while "cancelled" not in (logged := await host.call("logged")):
            await asyncio.sleep(0.01)
        return logged

    assert run(cancel()) == ["waits", "cancelled"]


def test_a_method_that_cancels_itself_is_cancelled_here(host: HostProcess, run: Any) -> None:
    async def call() -> None:
        with pytest.raises(asyncio.CancelledError):
            await host.call("cancel_itself")

    run(call())


@pytest.mark.parametrize(
    ("method", "arguments", "how"), [("die", (), r"signal 9 \(Killed\)"), ("leave", (3,), "exit code 3")]
)
def test_the_end_of_a_host_process_fails_all_calls_by_name_and_code(
    brief: HostProcess, run: Any, method: str, arguments: tuple[int, ...], how: str
) -> None:
    async def calls() -> list[BaseException]:
        waiting = [asyncio.ensure_future(brief.call("later", 1e4, 0)) for _ in range(3)]
        await brief.call("facts")
        return await asyncio.gather(*waiting, brief.call(method, *arguments), return_exceptions=True)

    errors = run(calls())
    said = rf"^sampler 3: its host process {brief.pid}, which starts the engine, ended: {how}$"
    for error in errors:
        with pytest.raises(ActorDiedError, match=said):
            raise error
    with pytest.raises(ActorDiedError, match=said):
        run(brief.call("facts"))


def test_the_end_of_a_host_process_is_seen_although_its_forked_child_lives(brief: HostProcess, run: Any) -> None:
    child = run(brief.call("fork"))
    try:
        with pytest.raises(ActorDiedError, match="Killed"):
            run(brief.call("die"))
        assert psutil.pid_exists(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_close_does_not_wait_for_the_interpreters_own_end(brief: HostProcess, run: Any) -> None:
    """An interpreter that has vLLM imported takes seconds. `close` would kill it after a time."""
    process = psutil.Process(brief.pid)
    run(brief.call("delay_the_interpreters_end", 1e5))
    run(brief.close())
    assert not process.is_running() and brief.exit_code == 0


def test_a_stopped_host_process_answers_nothing_and_is_ended_by_close(brief: HostProcess, run: Any) -> None:
    run(brief.call("facts"))
    psutil.Process(brief.pid).suspend()

    async def call() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(brief.call("facts"), 1.0)
        await brief.close()

    run(call())
    assert not psutil.pid_exists(brief.pid)


ACTOR = """
import asyncio, sys
from actors.hosting.host_process import HostProcess
from tests.unit.actors.hosting.bodies import Body

async def main():
    host = HostProcess("sampler 0", Body, ["b"])
    await host.call("facts")
    print(host.pid, flush=True)
    await asyncio.sleep(1e5)

asyncio.run(main())
"""


@pytest.mark.parametrize("suspended", [False, True])
def test_a_host_process_ends_with_its_actor(suspended: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    actor = subprocess.Popen([sys.executable, "-c", ACTOR], env=environment, stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    pid = int(actor.stdout.readline())
    if suspended:
        psutil.Process(pid).suspend()
    actor.kill()
    actor.wait()
    until_gone([pid], "the host process of a killed actor")


ENGINE = """
import asyncio
from actors.hosting.host_process import HostProcess
from tests.unit.actors.hosting.bodies import Body

async def main():
    host = HostProcess("sampler 0", Body, ["b"])
    print(await host.call("title_after_assigning", "FIRST", "VLLM::EngineCore"))
    await host.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("rays", [{}, {"SPT_NOENV": "1"}])
def test_a_title_is_seen_whichever_variable_was_assigned(rays: dict[str, str]) -> None:
    """An engine of this title is found with `ps`. Ray's workers begin with any variable, one of vLLM's perhaps."""
    unset = {name: value for name, value in os.environ.items() if name != "SPT_NOENV"}
    environment = {"FIRST": "", **unset, **rays, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shown = to_end([sys.executable, "-c", ENGINE], env=environment).stdout
    assert shown.splitlines()[-1] == "VLLM::EngineCore"


@pytest.mark.parametrize("actor", ["actors.sampler_actor", "actors.service.sampler_service"])
def test_an_actor_with_a_host_process_imports_neither_torch_nor_vllm(actor: str) -> None:
    program = f"import sys, {actor}; print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert to_end([sys.executable, "-c", program], env=environment).stdout.splitlines()[-1] == "[]"


def test_environments_reply_below_a_host_process(brief: HostProcess, run: Any) -> None:
    assert run(brief.call("converse")) == ["hello", "again"]


def test_on_cuda_a_body_stays_in_its_actors_process(run: Any) -> None:
    host = start_host("sampler 0", "cuda", Body, "b")
    assert isinstance(host, InProcess)
    assert run(host.call("facts"))["pid"] == os.getpid()
    with pytest.raises(SamplingError):
        run(host.call("fail", "ours"))
    run(host.close())


def test_values_of_a_generator_come_one_by_one_and_several_generators_run_at_once(host: HostProcess, run: Any) -> None:
    async def all_of(to: int) -> list[int]:
        return [number async for number in host.stream("count", to)]

    async def several() -> list[list[int]]:
        return await asyncio.gather(*(all_of(to) for to in (3, 0, 500)))

    assert run(several()) == [[0, 1, 2], [], list(range(500))]


def test_an_error_of_a_generator_comes_after_its_values(host: HostProcess, run: Any) -> None:
    async def until_error() -> list[int]:
        stream = host.stream("count", 2, "ours")
        seen = [await anext(stream), await anext(stream)]
        with pytest.raises(SamplingError, match="temperature: found -1"):
            await anext(stream)
        return seen

    assert run(until_error()) == [0, 1]


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_generator_that_is_closed_or_cancelled_ends_in_the_host(how: str, brief: HostProcess, run: Any) -> None:
    async def leave() -> list[str]:
        stream = brief.stream("count", 7, "none")
        if how == "close":
            assert await anext(stream) == 0
            await stream.aclose()
        else:

            async def read() -> None:
                async for _ in stream:
                    pass

            reading = asyncio.create_task(read())
            await brief.call("later", 0.1, 0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        log: list[str] = await brief.call("logged")
        return log

    assert run(leave()) == ["counted to 7"]


def test_a_generator_fails_when_its_host_dies(brief: HostProcess, run: Any) -> None:
    async def until_death() -> None:
        stream = brief.stream("count", 1, "none")
        assert await anext(stream) == 0
        os.kill(brief.pid, signal.SIGKILL)
        with pytest.raises(ActorDiedError, match="sampler 3: its host process"):
            await anext(stream)
        with pytest.raises(ActorDiedError):
            await anext(brief.stream("count", 1))

    run(until_death())
