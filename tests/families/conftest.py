"""What several files here ask for is made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.families.adapted import Adapted, adapted


@pytest.fixture(scope="session")
def trained_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    """By the name of a model in MODELS."""
    return cache(lambda name: adapted(name, tmp_path_factory.mktemp(name)))
