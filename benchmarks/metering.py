"""Measures the resources of a driver process: CPU time, memory, bytes over its connections, bytes deserialised."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ray._private import worker as ray_worker

COUNTED = ("wall_s", "cpu_s", "thread_s", "tcp_in", "tcp_out", "deserialised")


@dataclass(frozen=True, slots=True)
class Reading:
    """Resources used by this process since its start; `memory` and `store`: current values."""

    wall_s: float
    cpu_s: float  # of all threads, Ray's included
    thread_s: float  # of the thread that asks
    tcp_in: int  # bytes over the connections that are open
    tcp_out: int
    deserialised: int  # bytes of every object and argument that Ray unpacked
    memory: int  # bytes of its own (anonymous) memory
    traced: int  # bytes that Python's allocator has given out; 0 where tracemalloc does not run
    store: int  # bytes in Ray's store of small objects within the process

    def since(self, before: Reading) -> dict[str, float]:
        return {name: getattr(self, name) - getattr(before, name) for name in COUNTED}


@dataclass
class Meter:
    """Measures its own process. Ray must be running, and its connections must stay open between two readings."""

    deserialised: int = 0
    readings: list[Reading] = field(default_factory=list)

    def __post_init__(self) -> None:
        unpack = ray_worker.Worker.deserialize_objects

        def counting(worker: Any, objects: Any, *rest: Any, **named: Any) -> Any:
            self.deserialised += sum(len(one[0]) for one in objects if one[0] is not None)
            return unpack(worker, objects, *rest, **named)

        ray_worker.Worker.deserialize_objects = counting

    def read(self) -> Reading:
        if tracemalloc.is_tracing():  # then what is free counts as little as what is garbage
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        received, sent = tcp_bytes()
        return Reading(
            wall_s=time.perf_counter(),
            cpu_s=time.process_time(),
            thread_s=time.thread_time(),
            tcp_in=received,
            tcp_out=sent,
            deserialised=self.deserialised,
            memory=int(status["RssAnon"].split()[0]) * 1024,
            traced=tracemalloc.get_traced_memory()[0],
            store=int(ray_worker.global_worker.core_worker.get_local_memory_store_bytes_used()),
        )


def tcp_bytes() -> tuple[int, int]:
    """(received, sent and acknowledged) over the TCP connections that this process has open, as the kernel counts."""
    received = sent = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as copy:
                if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
                    continue
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile
            continue
        acked, taken = struct.unpack_from("QQ", info, 120)  # tcpi_bytes_acked, tcpi_bytes_received
        received, sent = received + taken, sent + acked
    return received, sent


def growth(readings: Sequence[Reading], groups: int) -> dict[str, float]:
    """Of the process's own memory over the steps, by least squares: of all of them, and of their second half."""
    memory, traced = (np.array([getattr(one, name) for one in readings], np.float64) for name in ("memory", "traced"))
    second = slice(len(memory) // 2, None)
    return {
        "steps": len(memory),
        "first_mib": memory[0] / 2**20,
        "last_mib": memory[-1] / 2**20,
        "bytes_per_group": _slope(memory) / groups,
        "bytes_per_group_second_half": _slope(memory[second]) / groups,
        "python_bytes_per_group_second_half": _slope(traced[second]) / groups,
        "small_objects_bytes": readings[-1].store,
    }


def _slope(values: Any) -> float:
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


class Peaks:
    """The highest value that each of some figures has had, looked for by another thread while the block lasts."""

    def __init__(self, figures: Callable[[], dict[str, int]], every_s: float = 0.02) -> None:
        self.figures, self.every_s = figures, every_s
        self.found: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(self.every_s):
            for name, value in self.figures().items():
                self.found[name] = max(self.found.get(name, 0), value)
