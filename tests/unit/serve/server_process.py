"""The HTTP process without Ray: `python -m tests.unit.serve.server_process MODEL_FOLDER SCRATCH_FOLDER`."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import uvloop

from actors.front.http_process import http_server
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import ServeConfig
from rlsys.serve.controller import Controller
from rlsys.serve.front import connect
from rlsys.serve.keys import NoKeys
from rlsys.serve.state import State
from tests.unit.serve.learner_backend import LearnerBackend


async def main(model: Path, scratch: Path) -> None:
    config = ServeConfig.model_validate({"models": {"tiny": str(model)}, "bind": {"port": 0}, "keys": None})
    controller = Controller(State(LearnerBackend(model, scratch), config.limits, CheckpointStore(scratch)))
    await controller.start()
    with socket.create_server((config.bind.host, 0), backlog=4096) as listener:
        server = http_server(await connect(controller, config.limits), NoKeys(), config)
        print(f"TINKER_BASE_URL=http://{config.bind.host}:{listener.getsockname()[1]}", flush=True)
        await server.serve(sockets=[listener])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
