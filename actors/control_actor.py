"""Actor that holds requests to a running job. It imports little: its worker is often one that Ray keeps idle."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsys.errors import RlsysError


class JobControl:
    """Async actor: holds each request until the driver has answered it. `about`: what a request asks for, such as the
    number of samplers."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[tuple[int, str, int | None]] = asyncio.Queue()
        self.answers: dict[int, asyncio.Future[str]] = {}
        self.numbers = itertools.count()

    async def ask(self, kind: str, about: int | None) -> str:
        number = next(self.numbers)
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        await self.requests.put((number, kind, about))
        return await answer

    async def next(self) -> tuple[int, str, int | None]:
        return await self.requests.get()

    async def answer(self, number: int, text: str, error: RlsysError | None) -> None:
        future = self.answers.pop(number)
        if error is None:
            future.set_result(text)
        else:
            future.set_exception(error)
