"""What differs between the SDKs 0.6 and 0.38 in how one writes a call; what goes over the wire is each SDK's own."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types

warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)

VERSION = tuple(int(each) for each in importlib.metadata.version("tinker").split(".")[:2])
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"] + ["gspo"] * (VERSION >= (0, 36))
WAIT_S = 300.0


def wait(answer: Any) -> Any:
    """Older SDKs give the client itself, newer ones a future of it."""
    return answer.result(timeout=WAIT_S) if hasattr(answer, "result") else answer


def datum(ids: list[int], targets: list[int], **inputs: list[float]) -> types.Datum:
    fields: dict[str, Any] = {"target_tokens": tensor(targets, "int64")}
    fields |= {key: tensor(each, "float32") for key, each in inputs.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(ids), loss_fn_inputs=fields)


def tensor(values: list[Any], dtype: Any) -> types.TensorData:
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def array(tensor: Any) -> NDArray[np.float64]:
    return np.asarray(tensor.data, dtype=np.float64).reshape(tensor.shape if tensor.shape else [-1])


def inputs_of(datum: types.Datum) -> dict[str, NDArray[np.float64]]:
    return {key: array(each) for key, each in datum.loss_fn_inputs.items()}


def logprobs_of(answer: Any) -> list[NDArray[np.float64]]:
    return [array(each["logprobs"]) for each in answer.loss_fn_outputs]


def service(**kwargs: Any) -> tinker.ServiceClient:
    """The address and the key come from TINKER_BASE_URL and TINKER_API_KEY."""
    return tinker.ServiceClient(**kwargs)
