"""Whether the deployments answer."""

from __future__ import annotations

import asyncio
import time

from fastapi import Response

from rlsys.errors import RlsysError
from rlsys.serve.errors import Refusal
from rlsys.serve.front import Front
from rlsys.serve.routes.common import answer

KEPT_S = 2.0  # an answer serves all who ask within this time: readiness is open to everyone


class Readiness:
    """State of each served base: "ready", or why not."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._checking = asyncio.Lock()
        self._found: dict[str, str] = {}
        self._at = float("-inf")

    async def states(self) -> dict[str, str]:
        """By name of the base."""
        async with self._checking:
            if time.monotonic() - self._at > KEPT_S:
                self._found = await self._states()
                self._at = time.monotonic()
            return self._found

    async def _states(self) -> dict[str, str]:
        try:
            return await self._front.controller.deployment_states()
        except (Refusal, RlsysError) as error:
            return {"controller": str(error)}


async def ready_answer(readiness: Readiness, front: Front) -> Response:
    """200 if every deployment answers and the server takes requests, else 503. Open to everyone, so it says no more."""
    if front.closing:
        return answer({"status": "stopping"}, 503)
    states = await readiness.states()
    if all(each == "ready" for each in states.values()):
        return answer({"status": "ready"})
    return answer({"status": "a deployment does not answer"}, 503)
