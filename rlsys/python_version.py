"""The Pythons that the pinned packages exist for and the tests run on. Importing this refuses every other one."""

from __future__ import annotations

import platform
import sys

PYTHONS = ((3, 11), (3, 12))

if sys.version_info[:2] not in PYTHONS:
    raise ImportError(
        f"rlsys needs Python {' or '.join(f'{major}.{minor}' for major, minor in PYTHONS)}; {sys.executable} is "
        f"{platform.python_version()}. Make an environment with one of these: make quickstart PYTHON=python3.12"
    )
