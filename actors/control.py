"""Requests to a running job (`rlsys scale`, `rlsys stop`): in the cluster's store until the job's driver reads them.

    job/RUN/DRIVER               the run is going on; DRIVER: id of the driver's job of Ray's
    ask/RUN/DRIVER/NUMBER        a request
    answer/RUN/DRIVER/NUMBER     what the driver says to it

Keys of drivers that have ended mean nothing, and whoever meets them deletes them.
"""

from __future__ import annotations

import json
import pickle
import random
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress

import ray

from actors.cluster import store
from rlsys.errors import ActorDiedError, ClusterError, ConfigError, RlsysError, StalledError
from rlsys.utils.shell_paths import command

LISTEN_S, RETRY_S = 0.25, 10.0  # between two looks of the driver, and after one that the head node did not answer
POLL_S = 0.1  # between two looks of who waits for its answer
RELEASE_S, RELEASE_POLL_S = 15.0, 0.5  # for a driver of the same name that is about to end
ANSWER_TIMEOUT_S = 120.0  # the driver reads requests between its calls; only training a base from scratch takes longer


class Control:
    """The driver's end: reads requests and answers them with `handlers`."""

    def __init__(self, run: str, handlers: Mapping[str, Callable[[int | None], str]]) -> None:
        """
        Raises:
            ClusterError: a job of this name is already running on the cluster.
        """
        self.handlers = handlers
        self._where = f"{run}/{ray.get_runtime_context().get_job_id()}"
        self._next_look = 0.0
        _register(run, self._where)

    def listen(self) -> None:
        """Answer all requests received since the last call. Waits for the cluster's head node alone, and not for long:
        without its answer the requests stay where they are."""
        if time.monotonic() < self._next_look:
            return
        pause = LISTEN_S
        try:
            for key in store.keys(f"ask/{self._where}/"):
                self._answer(key)
        except ClusterError:
            pause = RETRY_S
        self._next_look = time.monotonic() + pause

    def _answer(self, key: str) -> None:
        request = store.get(key)
        if request is None:  # who asked has given up
            return
        store.delete(key)  # first: a request is carried out once
        kind, about = json.loads(request)
        text, failure = "", None
        try:
            text = self._handle(kind, about)
        except RlsysError as error:
            failure = error
        store.put("answer" + key.removeprefix("ask"), pickle.dumps((text, failure)))

    def _handle(self, kind: str, about: int | None) -> str:
        if kind not in self.handlers:  # of another version of rlsys: no reason for this run to end
            raise ConfigError(f"this run takes no request {kind!r}; it takes {', '.join(self.handlers) or 'none'}")
        return self.handlers[kind](about)

    def close(self) -> None:
        """The run is over. Answers stay for those who wait for them."""
        with suppress(ClusterError):  # the keys mean nothing once this driver has ended
            store.delete(f"job/{self._where}")
            store.delete_all(f"ask/{self._where}/")


def _register(run: str, where: str) -> None:
    """Retries for RELEASE_S: another driver may be about to end."""
    deadline = time.monotonic() + RELEASE_S
    while True:
        is_new = store.put(f"job/{where}", b"")
        if is_new and _places(run) == [where]:
            return
        if is_new:  # of two that register at the same moment, one does so first the next time
            store.delete(f"job/{where}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"a job named {run!r} is already running on this cluster; choose another run.name, or stop the "
                f"running job with `{command('rlsys', 'stop', run)}`"
            )
        time.sleep(RELEASE_POLL_S * random.uniform(0.5, 1.5))


def _places(run: str | None = None) -> list[str]:
    """RUN/DRIVER of the runs that are going on, or of those of one name. Keys of ended drivers are deleted."""
    found = []
    for key in store.keys("job/" if run is None else f"job/{run}/"):
        where = key.removeprefix("job/")
        if store.has_living_driver(where.rpartition("/")[2]):
            found.append(where)
            continue
        for prefix in ("ask", "answer"):
            store.delete_all(f"{prefix}/{where}/")
        store.delete(key)
    return found


def ask(run: str, kind: str, about: int | None) -> str:
    """Send a request to the driver of a running job and return its answer. `about`: what it asks for, such as the
    number of samplers.

    Raises:
        ConfigError: no job of that name is running on this cluster.
        ActorDiedError: the driver ended before it answered.
        StalledError: no answer within the limit.
        RlsysError: the driver refused the request.
    """
    where = next(iter(_places(run)), None)
    if where is None:
        raise ConfigError(f"no running job is named {run!r} on this cluster{_known()}")
    number = f"{where}/{uuid.uuid4().hex}"
    store.put(f"ask/{number}", json.dumps([kind, about]).encode())
    try:
        text, failure = pickle.loads(_answer_to(kind, number))
    finally:
        store.delete(f"ask/{number}")
        store.delete(f"answer/{number}")
    if failure is not None:
        raise failure
    return str(text)


def _answer_to(kind: str, number: str) -> bytes:
    """`number`: RUN/DRIVER/NUMBER of a request."""
    run, driver, _ = number.split("/")
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        goes_on = store.get(f"job/{run}/{driver}") is not None and store.has_living_driver(driver)
        answer = store.get(f"answer/{number}")  # after the look at its driver, which answers before it ends
        if answer is not None:
            return answer
        if not goes_on:
            raise ActorDiedError(f"job {run!r}: it ended before it answered {kind!r}")
        time.sleep(POLL_S)
    raise StalledError(f"job {run!r}: no answer to {kind!r} within {ANSWER_TIMEOUT_S:g} s")


def running() -> list[str]:
    """Names of the jobs running on this cluster."""
    return sorted({where.rpartition("/")[0] for where in _places()})


def _known() -> str:
    names = running()
    return f"; running: {', '.join(names)}" if names else "; no job is running there"
