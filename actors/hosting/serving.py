"""The host process: runs an actor's body and answers the actor's calls on one event loop.

The process has no thread besides that of the loop until the body starts one, so the body may fork.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import sys
from contextlib import aclosing
from typing import Any

from actors.hosting.channel import Channel, Kind, Message
from actors.hosting.raised import pack
from rlsys.sampler.vllm.parent_process import end_with
from rlsys.utils.process_title import find_title


def main(descriptor: int, parent: int) -> None:
    """Serve the socket `descriptor` of the actor's process `parent`; end when the actor closes it or dies."""
    end_with(parent)
    find_title()  # the body sets variables before vLLM names the engine's process
    serve(descriptor)


def serve(descriptor: int) -> None:
    """As `main`, in a process that ends with the actor already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, as with Ray's workers
    asyncio.run(_serve(socket.socket(fileno=descriptor)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the body has stopped; an interpreter that has vLLM imported takes 2.7 s to end by itself


async def _serve(end: socket.socket) -> None:
    channel = Channel(end)
    os.register_at_fork(after_in_child=channel.close)  # else the actor sees this process's end only with its children's
    writing = asyncio.create_task(channel.write())
    calls: dict[int, asyncio.Task[None]] = {}
    try:
        body_class, arguments = (await channel.receive()).load()
        body = body_class(*arguments)
        while (message := await channel.receive()).kind is not Kind.CLOSE:
            if message.kind is Kind.CANCEL:
                if message.number in calls:
                    calls[message.number].cancel()
                continue
            call = asyncio.create_task(_answer(channel, body, message))
            calls[message.number] = call
            call.add_done_callback(lambda _, number=message.number: calls.pop(number))  # type: ignore[misc]
    except EOFError:
        os._exit(1)  # the actor is gone: nobody waits for a body to end in order
    writing.cancel()


async def _answer(channel: Channel, body: Any, message: Message) -> None:  # a body of any class
    try:
        method, arguments = message.load()
        work = getattr(body, method)(*arguments)
        if inspect.isasyncgen(work):
            async with aclosing(work) as parts:
                async for part in parts:
                    channel.send(message.number, Kind.PART, part)
            channel.send(message.number, Kind.RESULT)
        else:
            channel.send(message.number, Kind.RESULT, await work)
    except asyncio.CancelledError:
        channel.send(message.number, Kind.CANCELLED)
    except Exception as error:  # the actor raises it
        channel.send(message.number, Kind.ERROR, pack(error))
