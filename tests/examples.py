"""How many examples a property is tested with: few of them in a usual run, ten times as many in a soak run."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

NEW = os.environ.get("HYPOTHESIS_PROFILE") == "new"


def examples(count: int, **options: Any) -> settings:
    return settings(max_examples=10 * count if NEW else count, **options)
