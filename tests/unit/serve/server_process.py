"""The HTTP process without Ray: `python -m tests.unit.serve.server_process MODEL_FOLDER SCRATCH_FOLDER [KEY=VALUE]...`.

The pairs are overrides of the server's configuration, as those of `rlsys serve`.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import uvloop

from actors.front.http_process import http_servers, log_requests
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.connections import allow_connections
from rlsys.serve.controller import Controller
from rlsys.serve.front import connect
from rlsys.serve.keys import read_keys
from rlsys.serve.load import load_serve_config
from rlsys.serve.state import State
from tests.unit.serve.learner_backend import LearnerBackend


async def main(model: Path, scratch: Path, overrides: list[str]) -> None:
    base = {
        "models": {"tiny": str(model)},
        "bind": {"port": 0},
        "keys": None,
        "log": {"slow_s": 0.2, "json_lines": True},
    }
    config = load_serve_config(None, overrides, base)
    log_requests()
    allow_connections(config.limits.connections)
    controller = Controller(State(LearnerBackend(model, scratch), config.limits, CheckpointStore(scratch)))
    await controller.start()
    address = config.bind.host, 0
    with socket.create_server(address, backlog=4096) as listener, socket.create_server(address) as beside:
        servers = http_servers(await connect(controller, config.limits), read_keys(config.keys, {}), config)
        scheme = "https" if config.bind.tls_certificate else "http"
        print(f"status and metrics: http://{config.bind.host}:{beside.getsockname()[1]}")
        print(f"TINKER_BASE_URL={scheme}://{config.bind.host}:{listener.getsockname()[1]}", flush=True)
        await servers.serve(listener, beside)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
