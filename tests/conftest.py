"""The same examples in every run; HYPOTHESIS_PROFILE=new draws others, for a soak run."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("new", settings(database=None))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
