"""The same examples in every run: a test that finds something new belongs to a soak run, which sets a profile of its own."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("new", settings(database=None))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
