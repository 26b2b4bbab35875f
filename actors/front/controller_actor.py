"""Named actor that holds the controller of `rlsys serve`, and how an HTTP process calls it.

Ray starts the actor again when its process dies; it then takes over what the database and the learners have.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.service.deployment import RayBackend
from actors.service.http_backend import DeploymentBackend
from actors.service.launch import NAMESPACE
from rlsys.errors import ActorDiedError, RlsysError
from rlsys.serve.checkpoints import CheckpointStore
from rlsys.serve.config import ServeConfig
from rlsys.serve.controller import Controller
from rlsys.serve.errors import Refusal
from rlsys.serve.state import State

MANY_CALLS = 20_000  # held polls
CLOSE_S = 90.0
STREAMED = frozenset({"answer_parts"})  # methods of the controller that return async generators


class ControllerActor:
    """One controller. Its deployments run, or are joined, before it starts."""

    def __init__(self, config: ServeConfig) -> None:
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
        self._config = config
        self._started: asyncio.Task[Controller] | None = None
        self._backend: DeploymentBackend | None = None

    async def call(self, method: str, *arguments: object) -> tuple[Any, Refusal | RlsysError | None]:
        """(result, None), or (None, what was refused or failed). Any: what the method returns."""
        try:
            return await getattr(await self._controller(), method)(*arguments), None
        except (Refusal, RlsysError) as error:
            return None, error

    async def stream(
        self, method: str, *arguments: object
    ) -> AsyncGenerator[tuple[Any, Refusal | RlsysError | None], None]:
        """As `call`, of an async generator: its values, and then its error."""
        try:
            async with aclosing(getattr(await self._controller(), method)(*arguments)) as values:
                async for value in values:
                    yield value, None
        except (Refusal, RlsysError) as error:
            yield None, error

    async def _controller(self) -> Controller:
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        starting = self._started
        try:
            return await asyncio.shield(starting)
        except RlsysError:  # such as a full disk: the next call tries again
            if self._started is starting:
                self._started = None
            raise

    async def _start(self) -> Controller:
        if self._backend is None:
            self._backend = await asyncio.to_thread(_backend, self._config)
        store = await asyncio.to_thread(CheckpointStore, Path(self._config.checkpoints))
        controller = Controller(State(self._backend, self._config.limits, store))
        try:
            await controller.start()
        except BaseException:
            store.database.close()
            raise
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

    def __getattr__(self, method: str) -> Callable[..., Any]:  # Any: as the controller's method
        if method.startswith("_") or not hasattr(Controller, method):
            raise AttributeError(method)
        if method in STREAMED:
            return lambda *arguments: self._stream(method, *arguments)

        async def call(*arguments: object) -> Any:
            try:
                value, error = await self._handle.call.remote(method, *arguments)
            except RayError as failure:
                raise _starting_again(method, failure) from None
            if error is not None:
                raise error
            return value

        return call

    async def _stream(self, method: str, *arguments: object) -> AsyncGenerator[Any, None]:
        """Closing this generator closes the controller's."""
        refs = self._handle.stream.options(num_returns="streaming").remote(method, *arguments)
        is_running = True
        try:
            async for ref in refs:
                value, error = await ref
                if error is not None:
                    is_running = False
                    raise error
                yield value
            is_running = False
        except RayError as failure:
            is_running = False
            raise _starting_again(method, failure) from None
        finally:
            if is_running:
                ray.cancel(refs)


def _starting_again(method: str, failure: RayError) -> Refusal:
    logging.getLogger("rlsys.serve").warning("controller: %s: %s", method, type(failure).__name__)
    return Refusal(503, "the service is starting again; repeat the request", {"Retry-After": "1"})


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
