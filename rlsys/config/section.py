"""Base of every section of a job: frozen, unknown keys refused, defaults validated too.

Each section is passed to the part that it configures. Units are in the names: ``_s`` seconds, ``_gb`` GiB, ``_tokens``.
A key is added with its default, its reason, and a line in tests/unit/config/config_keys.txt.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
