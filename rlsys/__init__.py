"""Reinforcement learning for language models on your own Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rlsys import python_version as python_version  # first: it refuses Pythons that the rest cannot run on

if TYPE_CHECKING:
    from rlsys import types
    from rlsys.client import ApiFuture, SamplingClient, ServiceClient, ServiceConfig, TrainingClient
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

__version__ = "0.1.0"

# Loaded when asked for: the command line and a job's configuration need neither clients nor numpy.
_OF_CLIENT = ("ApiFuture", "SamplingClient", "ServiceClient", "ServiceConfig", "TrainingClient")

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
    if name == "types":
        return importlib.import_module("rlsys.types")
    if name in __all__:
        return getattr(importlib.import_module("rlsys.client" if name in _OF_CLIENT else "rlsys.types"), name)
    raise AttributeError(f"module 'rlsys' has no attribute {name!r}")
