"""Keys of earlier revisions: the error about such a key names the key that replaces it.

A key that is renamed or removed gets a line here in the same change, and a line in CHANGELOG.md.
"""

from __future__ import annotations

REPLACED = {  # old key -> what to set now
    "run.stage_timeout_s": "set a limit per stage, such as watchdog.sample_s or watchdog.learn_s",
    "run.start_timeout_s": "set watchdog.start_s",
}


def replacement(key: str) -> str | None:
    """What to set in place of `key`, or of the keys that the removed section `key` had; None: never a key."""
    if key in REPLACED:
        return f"it was replaced: {REPLACED[key]}"
    inside = [f"{old}: {new}" for old, new in REPLACED.items() if old.startswith(f"{key}.")]
    return f"its keys were replaced: {'; '.join(inside)}" if inside else None
