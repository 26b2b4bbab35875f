"""The check of a job's model, which needs transformers, outside of the job's driver.

The import takes a second. A fork server of this machine has made it: the job's own, or for a job that joins a cluster
any other of this user, such as that of `rlsys warm`. Without one a fork of the driver makes it, beside the driver's own
imports. If the job's own server gives no process, the driver makes it.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from actors.cluster.joined_address import joined_address
from actors.forking import checks, client
from actors.forking.client import Forked, NotForkedError
from actors.forking.job_server import PREFIX, ForkServer
from actors.forking.meanwhile import Meanwhile, answer_of, send_answer
from rlsys.config import JobConfig

Check = Callable[[], tuple[str, ...]]
ENTRY = f"{__name__}:serve"
# OOM score of Ray's workers: a server of `rlsys warm` is a child of one, and can give its processes none that is lower.
# A check that is killed is repeated.
MOST_OOM = 1000


def check_job(job: JobConfig) -> tuple[str, ...]:
    """`rlsys.planning.model_folder.check_job`, imported by the process that checks."""
    from rlsys.planning import model_folder

    return model_folder.check_job(job)


def model_check(job: JobConfig, server: ForkServer | None) -> Check:
    """`check_job` of the job, to be called once. It begins now, or with `server`, the job's own, at the call: a server
    that has just started still imports."""
    here = partial(check_job, job)
    if job.model.path is None:
        return here
    if server is not None:
        return lambda: _in_server(server.address.folder, job, here)
    if joined_address(job.cluster.address) is not None:
        for file in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{client.READY}"):
            try:
                return ForkedCheck(str(file.parent), job, here).result
            except NotForkedError:
                continue  # of other code, or another environment
    return Meanwhile(here).result


class ForkedCheck:
    """The check in a process of a fork server. Raises NotForkedError."""

    def __init__(self, folder: str, job: JobConfig, here: Check) -> None:
        self._here = here
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process: Forked = client.fork(
                    folder, "actor", checks.fingerprint(), ["rlsys check"], ENTRY, [theirs.fileno()], sys.path, MOST_OOM
                )
            except NotForkedError:
                self._socket.close()
                raise
        with suppress(OSError):  # it has ended, as `result` finds
            self._socket.sendall(pickle.dumps(job))
            self._socket.shutdown(socket.SHUT_WR)

    def result(self) -> tuple[str, ...]:
        try:
            return answer_of(self._socket.detach(), self._here)
        finally:
            with suppress(ProcessLookupError):
                self._process.kill()  # after Ctrl-C it may still check
            self._process.wait()


def serve(descriptor: int) -> None:
    """In the forked process."""
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as file:
        job: JobConfig = pickle.load(file)
        send_answer(os.dup(descriptor), partial(check_job, job))
    os._exit(0)


def _in_server(folder: str, job: JobConfig, here: Check) -> tuple[str, ...]:
    try:
        check = ForkedCheck(folder, job, here)
    except NotForkedError:
        return here()
    return check.result()
