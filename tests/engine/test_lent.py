"""Claims about bytes that go from the sampler's process to its engine's."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np

from rlsys.sampler.vllm.shared_buffer import from_shared_buffer, to_shared_buffer
from tests.waiting import cpu_of, until


def _sum_after(path: str, opened: Any, returned: Any, answers: Any) -> None:
    found = from_shared_buffer(path)
    opened.set()
    returned.wait()
    found[0] += 1  # its own copy
    answers.put(int(found.sum()))


def test_what_another_process_has_borrowed_outlives_the_lending_and_is_its_own() -> None:
    context = multiprocessing.get_context("spawn")
    opened, returned, answers = context.Event(), context.Event(), context.Queue()
    buffer = np.arange(100_000, dtype=np.uint32).view(np.uint8)
    with to_shared_buffer(buffer) as path:
        other = context.Process(target=_sum_after, args=(path, opened, returned, answers))
        other.start()
        assert other.pid is not None
        until(lambda: opened.is_set() or not other.is_alive(), "the other process to open it", cpu_of(other.pid))
        assert opened.is_set()
        (mine := from_shared_buffer(path))[:] = 0
    returned.set()
    until(lambda: not answers.empty() or not other.is_alive(), "an answer", cpu_of(other.pid))
    assert answers.get(timeout=1) == int(buffer.sum()) + 1
    other.join()
    assert not mine.any() and buffer.any()


def test_a_read_only_buffer_as_ray_hands_it_out_can_be_lent(recwarn: Any) -> None:
    buffer = np.arange(10, dtype=np.uint8)
    buffer.flags.writeable = False
    with to_shared_buffer(buffer) as path:
        np.testing.assert_array_equal(from_shared_buffer(path), buffer)
    # an object of another test that is collected meanwhile is none of its business
    assert not [str(each.message) for each in recwarn if each.category is not ResourceWarning]
