"""Configures vLLM's logging when it is imported: once, in the process from which engines are forked.

The engine's process configures it again, which resets vLLM's hundreds of loggers one by one, and each of them clears
the caches of all loggers. Modules of vLLM that are imported later take the function that is put in its place here.
"""

from __future__ import annotations

from vllm import logger
from vllm.config.logging import LoggingConfig

_stock = logger.configure_logging


def configure_logging(config: LoggingConfig) -> None:
    """Configure this process unless it is, or the one that it was forked from."""
    global _configured
    if config != _configured:
        _stock(config)
        _configured = config


_configured: LoggingConfig | None = None
logger.configure_logging = configure_logging
configure_logging(LoggingConfig())
