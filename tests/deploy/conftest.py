"""Sites: local clusters that end with their test. The micro model and job are those of tests/ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.deploy.sites import Site
from tests.ray.conftest import job, micro_base

__all__ = ["job", "micro_base", "site"]


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    """Makes sites, with more environment variables for all their processes."""
    made: list[Site] = []

    def make(**more: str) -> Site:
        made.append(Site(**more))
        return made[-1]

    yield make
    for each in made:
        each.end()
