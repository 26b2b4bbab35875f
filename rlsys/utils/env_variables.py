"""Environment variables; one that is empty counts as unset, as a job script leaves it empty that has no value."""

from __future__ import annotations

import os
import re

_READ = re.compile(  # variables of rlsys' own libraries and of the system that mean nothing when empty
    r"(RAY|RLSYS|WANDB|HF|HUGGING_?FACE|TRANSFORMERS|DATASETS|VLLM|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|GLOO|NCCL|OMP|MKL|XDG)_"
    r"|(TMPDIR|TEMP|TMP|HOME|NETRC|LOGNAME)$"
)


def env_variable(name: str) -> str | None:
    """Its value; None where it is unset or empty."""
    return os.environ.get(name) or None


def set_default(name: str, value: str) -> None:
    """Set an environment variable that is unset or empty."""
    if env_variable(name) is None:
        os.environ[name] = value


def drop_empty_variables() -> None:
    """Unset what is empty of those that libraries read: Ray takes an empty RAY_TMPDIR for the working folder.

    An empty CUDA_VISIBLE_DEVICES stays: it hides every GPU.
    """
    for name in [name for name, value in os.environ.items() if not value and _READ.match(name)]:
        del os.environ[name]
