"""Environment variables. An empty variable counts as unset: job scripts leave variables without a value empty."""

from __future__ import annotations

import os
import re

_READ = re.compile(  # variables of libraries and of the system that have no meaning when empty
    r"(RAY|RLSYS|WANDB|HF|HUGGING_?FACE|TRANSFORMERS|DATASETS|VLLM|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|GLOO|NCCL|OMP|MKL|XDG)_"
    r"|(TMPDIR|TEMP|TMP|HOME|NETRC|LOGNAME)$"
)


def env_variable(name: str) -> str | None:
    """Value of the variable; None if it is unset or empty."""
    return os.environ.get(name) or None


def set_default(name: str, value: str) -> None:
    """Set an environment variable that is unset or empty."""
    if env_variable(name) is None:
        os.environ[name] = value


def drop_empty_variables() -> None:
    """Unset empty variables that libraries read: Ray takes an empty RAY_TMPDIR for the working folder.

    An empty CUDA_VISIBLE_DEVICES stays: it hides every GPU.
    """
    for name in [name for name, value in os.environ.items() if not value and _READ.match(name)]:
        del os.environ[name]
