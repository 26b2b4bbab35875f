"""Protobuf classes of ``messages.proto``, built at import."""

from __future__ import annotations

from importlib.resources import files
from typing import Any  # protobuf makes these classes at run time, so there is no static type of their fields

from google.protobuf import descriptor_pool, message_factory

from rlsys.serve.wire.proto_file import read_proto

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4  # DType
STOP, LENGTH = 0, 1  # StopReason


def _classes() -> dict[str, Any]:
    name = "rlsys/serve/wire/messages.proto"
    text = (files("rlsys.serve.wire") / "messages.proto").read_text()
    pool = descriptor_pool.DescriptorPool()
    pool.Add(read_proto(text, name))
    found = message_factory.GetMessageClassesForFiles([name], pool)
    return {full_name.rpartition(".")[2]: kind for full_name, kind in found.items()}


_made = _classes()
ForwardBackwardRequest: Any = _made["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = _made["ForwardBackwardOutput"]
SampleResponse: Any = _made["SampleResponse"]
