"""Messages between an actor and its host process, over a connected Unix socket.

    number  kind  parts  sizes   pickle   buffers
    8 B     1 B   4 B    8 B each

Arrays travel as buffers beside the pickle (protocol 5), so they are copied by the kernel alone.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

HEAD = struct.Struct("<QBI")


class Kind(IntEnum):
    CALL = 0  # to the host: (method, arguments)
    CANCEL = 1
    CLOSE = 2
    RESULT = 3  # to the actor
    ERROR = 4
    CANCELLED = 5
    PART = 6  # to the actor: one value of an async generator, before the RESULT


@dataclass(frozen=True, slots=True)
class Message:
    number: int  # of the call
    kind: Kind
    parts: tuple[bytearray, ...]

    def load(self) -> Any:  # what the other end sent
        return pickle.loads(self.parts[0], buffers=self.parts[1:])  # trusted: the other end of a socket pair


class Channel:
    """One end. All methods are called on one event loop, `send` also before the loop runs."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._unsent = asyncio.Queue[list[memoryview]]()

    def send(self, number: int, kind: Kind, content: object = None) -> None:
        """Queue a message for `write`: a caller that is cancelled cannot leave half a message behind.

        Raises an error of pickle, and then sends nothing.
        """
        buffers: list[pickle.PickleBuffer] = []
        body = memoryview(pickle.dumps(content, protocol=5, buffer_callback=buffers.append))
        parts = [body, *(buffer.raw() for buffer in buffers)]
        sizes = struct.pack(f"<{len(parts)}Q", *(part.nbytes for part in parts))
        head = memoryview(HEAD.pack(number, kind, len(parts)) + sizes)
        self._unsent.put_nowait([head, *parts])

    async def write(self) -> None:
        """Write queued messages until the other end closes."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                for part in await self._unsent.get():
                    await loop.sock_sendall(self._socket, part)
        except OSError:
            return  # `receive` reports the end

    async def receive(self) -> Message:
        """
        Raises:
            EOFError: the other end is closed.
        """
        number, kind, count = HEAD.unpack(await self._exactly(HEAD.size))
        sizes = struct.unpack(f"<{count}Q", await self._exactly(8 * count))
        parts = [await self._exactly(size) for size in sizes]
        return Message(number, Kind(kind), tuple(parts))

    def close(self) -> None:
        self._socket.close()

    async def _exactly(self, size: int) -> bytearray:
        loop, data = asyncio.get_running_loop(), bytearray(size)
        view = memoryview(data)
        while len(view):
            try:
                read = await loop.sock_recv_into(self._socket, view)
            except OSError as error:
                raise EOFError from error
            if not read:
                raise EOFError
            view = view[read:]
        return data
