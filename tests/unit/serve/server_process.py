"""The server's process without Ray: `python -m tests.unit.serve.server_process MODEL_FOLDER SCRATCH_FOLDER`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop
from rich.console import Console

from actors import serve
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import ServeConfig
from rlsys.serve.keys import NoKeys
from rlsys.serve.state import State
from tests.unit.serve.learner_backend import LearnerBackend


def main(model: Path, scratch: Path) -> None:
    config = ServeConfig.model_validate({"models": {"tiny": str(model)}, "bind": {"port": 0}, "keys": None})
    backend = LearnerBackend(model, scratch)
    with serve._listening(config.bind) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        state = State(backend, config.limits, CheckpointStore(scratch))
        runner.run(serve._run(config, NoKeys(), state, listener, Console()))
    print("stopped")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
