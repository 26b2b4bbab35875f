"""Heartbeat of an engine without calls to it, which a stopped or dead engine would not answer."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessorOutput


class EngineHeartbeat:
    """Counts the outputs that the engine's process sends: every token of every request, also within long requests.

    vLLM drops these later when only finished requests are asked for, so they are counted on arrival.
    """

    def __init__(self) -> None:
        self.advanced = 0  # times that a step of the engine moved a request
        self.answered = 0  # calls of the engine's worker

    def watch(self, engine: AsyncLLM) -> None:
        """Count outputs of `engine` from now on."""
        processor = engine.output_processor
        stock = processor.process_outputs

        def counted(outputs: Sized, *args: object, **kwargs: object) -> OutputProcessorOutput:
            self.advanced += len(outputs)
            return stock(outputs, *args, **kwargs)

        processor.process_outputs = counted
