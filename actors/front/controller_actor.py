"""Named actor that holds the controller of `rlsys serve`, and how an HTTP process calls it.

Ray starts the actor again when its process dies; it then takes over what the database and the learners have.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.service.deployment import NAMESPACE, RayBackend
from actors.service.http_backend import DeploymentBackend
from rlsys.errors import ActorDiedError, RlsysError
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import ServeConfig
from rlsys.serve.controller import Controller
from rlsys.serve.errors import Refusal
from rlsys.serve.state import State

MANY_CALLS = 20_000  # held polls
CLOSE_S = 90.0


class ControllerActor:
    """One controller. Its deployments run, or are joined, before it starts."""

    def __init__(self, config: ServeConfig) -> None:
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._config = config
        self._started: asyncio.Task[Controller] | None = None

    async def call(self, method: str, *arguments: object) -> tuple[Any, Refusal | RlsysError | None]:
        """(result, None), or (None, what was refused or failed). Any: what the method returns."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        try:
            controller = await asyncio.shield(self._started)
            return await getattr(controller, method)(*arguments), None
        except (Refusal, RlsysError) as error:
            return None, error

    async def _start(self) -> Controller:
        backend = await asyncio.to_thread(_backend, self._config)
        store = await asyncio.to_thread(CheckpointStore, Path(self._config.checkpoints))
        controller = Controller(State(backend, self._config.limits, store))
        await controller.start()
        return controller


def _backend(config: ServeConfig) -> DeploymentBackend:
    return DeploymentBackend(RayBackend(config.service_config()), config)


def start_controller(config: ServeConfig, name: str) -> ActorHandle:
    """Start the actor on this node: its database needs a local file system."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {  # Any: Ray's options
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_concurrency": MANY_CALLS,
        "max_restarts": -1,
        "scheduling_strategy": here,
    }
    handle: ActorHandle = ray.remote(ControllerActor).options(**options).remote(config)
    return handle


class RemoteController:
    """Has the methods of `Controller`, which run in the actor. While the actor starts again, calls are refused with
    503, which clients repeat."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:  # Any: as the controller's method
        if method.startswith("_") or not hasattr(Controller, method):
            raise AttributeError(method)

        async def call(*arguments: object) -> Any:
            try:
                value, error = await self._handle.call.remote(method, *arguments)
            except RayError as failure:
                logging.getLogger("rlsys.serve").warning("controller: %s: %s", method, type(failure).__name__)
                raise Refusal(503, "the service is starting again; repeat the request", {"Retry-After": "1"}) from None
            if error is not None:
                raise error
            return value

        return call


def remote_controller(handle: ActorHandle) -> Controller:
    return cast(Controller, RemoteController(handle))


def find_controller(name: str) -> ActorHandle:
    return ray.get_actor(name, namespace=NAMESPACE)


def call_now(handle: ActorHandle, method: str, *arguments: object, timeout_s: float) -> Any:
    """Call a method and wait.

    Raises:
        RlsysError: it failed, or did not answer in time.
    """
    try:
        value, error = ray.get(handle.call.remote(method, *arguments), timeout=timeout_s)
    except GetTimeoutError:
        raise ActorDiedError(f"controller: {method}: no answer within {timeout_s:g} s") from None
    except RayError as failure:
        raise ActorDiedError(f"controller: {method}: {failure}") from failure
    if error is not None:
        raise error
    return value
