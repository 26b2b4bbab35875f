"""Keeps one HTTP process running on a listening socket, whose backlog holds connections while it starts again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Any

from actors.front.http_process import SERVES
from rlsys.errors import ActorFailedError
from rlsys.sandbox.killable_process import describe_exit
from rlsys.serve.config import ServeConfig

START_S = 60.0
EXIT_S = 15.0
MOST, WITHIN_S = 5, 60.0  # deaths: more in this time are no accident
log = logging.getLogger("rlsys.serve")


class HttpSupervisor:
    """`tend` is called a few times a second. `variables`: given to the process through its input, so that no list of
    processes and no child has them."""

    def __init__(
        self,
        config: ServeConfig,
        cluster: str,
        controller: str,
        listener: socket.socket,
        operator: socket.socket | None,
        variables: dict[str, str],
    ) -> None:
        self._start = {
            "config": config.model_dump(mode="json"),
            "cluster": cluster,
            "controller": controller,
            "listener": listener.fileno(),
            "variables": variables,
            "operator": None if operator is None else operator.fileno(),
        }
        self._descriptors = [each.fileno() for each in (listener, operator) if each is not None]
        self._deaths: deque[float] = deque(maxlen=MOST)
        self._process = self._started()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tend(self) -> None:
        """Start another process if this one has ended.

        Raises:
            ActorFailedError: it ends again and again.
        """
        code = self._process.poll()
        if code is None:
            return
        at = time.monotonic()
        log.warning("HTTP process %d ended (%s); starting another", self._process.pid, describe_exit(code))
        if len(self._deaths) == MOST and at - self._deaths[0] < WITHIN_S:
            raise ActorFailedError(
                f"the HTTP process ended {MOST + 1} times within {WITHIN_S:g} s, last with {describe_exit(code)}; its "
                "output is above"
            )
        self._deaths.append(at)
        self._close_pipes()
        self._process = self._started()

    def command(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(f"{text}\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """End the process; after EXIT_S it is killed."""
        self.command("exit")
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipes()

    def _started(self) -> subprocess.Popen[str]:
        """
        Raises:
            ActorFailedError: it ended, or did not serve within START_S.
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "actors.front.http_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=self._descriptors,
            env=environment,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{json.dumps(self._start)}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        line: Any = process.stdout.readline() if ready else ""
        if line.strip() != SERVES:
            process.kill()
            code = process.wait()
            raise ActorFailedError(
                f"the HTTP process did not serve within {START_S:g} s: {describe_exit(code)}; its output is above"
            )
        return process

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
