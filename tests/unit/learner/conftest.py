"""Learners go back at the end of each test that borrowed some."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.tiny_learner import LENDER


@pytest.fixture(autouse=True)
def _lent() -> Iterator[None]:
    yield
    LENDER.take_back()
