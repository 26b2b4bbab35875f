"""The processes of the ranks are started once for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.distributed.rank_processes import Pool, rank_processes


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with rank_processes() as started:
        yield started
