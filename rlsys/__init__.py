"""Reinforcement learning for language models on your own Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rlsys import python_version as python_version  # first: it refuses Pythons that the rest cannot run on
from rlsys import types
from rlsys.types import (
    AdamParams,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)

if TYPE_CHECKING:
    from rlsys.client import ApiFuture, SamplingClient, ServiceClient, ServiceConfig, TrainingClient

__version__ = "0.1.0"

# Loaded when asked for: a job's configuration and the types need neither clients nor what these need.
_LAZY = ("ApiFuture", "SamplingClient", "ServiceClient", "ServiceConfig", "TrainingClient")

__all__ = [
    "AdamParams",
    "ApiFuture",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "ModelInput",
    "OptimStepResponse",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "ServiceConfig",
    "TensorData",
    "TrainingClient",
    "__version__",
    "types",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module("rlsys.client"), name)
    raise AttributeError(f"module 'rlsys' has no attribute {name!r}")
