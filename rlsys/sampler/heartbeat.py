"""Signs of life of an engine, without asking it: a stopped or dead engine does not answer."""

from __future__ import annotations

from typing import Any


class EngineHeartbeat:
    """Counts what the engine's process sends, which is every token of every request, also where one request is long.

    vLLM drops these on the way where only finished requests are wanted, so they are counted where they arrive.
    """

    def __init__(self) -> None:
        self.advanced = 0  # times that a step of the engine moved a request
        self.answered = 0  # calls of the engine's worker

    def watch(self, engine: Any) -> None:
        """Count from now on what arrives from `engine`, vLLM's AsyncLLM."""
        processor = engine.output_processor
        stock = processor.process_outputs

        def counted(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.advanced += len(outputs)
            return stock(outputs, *args, **kwargs)

        processor.process_outputs = counted
