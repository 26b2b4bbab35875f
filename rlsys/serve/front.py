"""What one HTTP process holds: how it reaches the controller, and what it needs to check requests by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

from rlsys.serve.backend import Base
from rlsys.serve.config import Limits
from rlsys.serve.controller import Controller
from rlsys.serve.signing import Signer, new_secret

Args = TypeVarTuple("Args")
T = TypeVar("T")
CODEC_THREADS = 2  # bodies are decoded and encoded beside the event loop


@dataclass(slots=True)
class Front:
    """`closing`: new work is refused, and results are still given out."""

    controller: Controller
    limits: Limits
    bases: Mapping[str, Base]  # by name, without aliases
    signer: Signer
    closing: bool = False
    _codec: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(CODEC_THREADS, "codec"))

    async def in_thread(self, work: Callable[[*Args], T], *args: *Args) -> T:
        """Encode or decode beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._codec, work, *args)

    def close(self) -> None:
        self._codec.shutdown(wait=False, cancel_futures=True)


async def connect(controller: Controller, limits: Limits) -> Front:
    """A front of a controller that has started, in the place of an earlier one."""
    await controller.begin_front()
    bases: Sequence[Base] = await controller.bases()
    secret = await controller.signing_secret(new_secret().hex())
    return Front(controller, limits, {base.name: base for base in bases}, Signer(bytes.fromhex(secret)))
