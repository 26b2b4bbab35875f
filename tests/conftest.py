"""The same examples in every run; HYPOTHESIS_PROFILE=new draws others, for a soak run."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is; a claim about time measures CPU time itself.
TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", TIMELESS, derandomize=True, database=None)
settings.register_profile("new", TIMELESS, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
