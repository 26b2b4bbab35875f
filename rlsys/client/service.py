"""Service client, the entry point of the client API: finds or starts deployments, and creates clients on them."""

from __future__ import annotations

import asyncio
import importlib
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rlsys.architectures.support import local_config, refuse_unsupported
from rlsys.client.backend import About, Backend, Deployment, ModelHandle, SnapshotHandle
from rlsys.client.config import ServiceConfig
from rlsys.client.paths import given
from rlsys.client.results import LOSSES, ServerCapabilities, SupportedModel
from rlsys.client.sampling import SamplingClient
from rlsys.client.training import TrainingClient
from rlsys.config import LoraSection, SamplerSection
from rlsys.errors import ClusterError, ConfigError
from rlsys.utils.shell_paths import as_written, expand

BACKEND = "actors.service.deployment"  # the backend on Ray, imported by name: this package does not depend on Ray


class ServiceClient:
    """Joins the Ray cluster at ``config.cluster.address`` or RAY_ADDRESS, or starts Ray on this machine.

    Deployments started by this client end with `close` or with the process, unless ``config.detached`` is set.
    `models`: name -> model folder, in addition to ``config.models``.
    """

    def __init__(
        self,
        config: ServiceConfig | None = None,
        *,
        models: dict[str, str] | None = None,
        backend: Backend | None = None,
    ) -> None:
        chosen = config or ServiceConfig()
        more = {name: expand(folder) for name, folder in (models or {}).items()}
        self.config = chosen.model_copy(update={"models": {**chosen.models, **more}})
        self._backend = backend
        self._starting = threading.Lock()
        self._closed = False
        self._warned: set[str] = set()  # bases whose untrained unembedding a warning has mentioned

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool | None = None,
    ) -> TrainingClient:
        """Create a LoRA adapter and its training client. The new adapter does not change the base's outputs (B is 0).
        The same seed, rank and targets give the same weights.

        `seed` None: 0. `train_unembed` None: on if samplers can serve an adapter on the unembedding, which they can on
        a CPU; otherwise off, with a warning at the first client of a base.

        Raises:
            ConfigError: no such model (the message lists the known ones), or the rank or targets cannot be served.
            ClusterError: too few resources for a deployment; the message names the shortfall.
        """
        self._refuse_unsupported(base_model, train_mlp)
        deployment = self._deployment(base_model)
        about = deployment.about
        lora = _lora(about, rank, train_mlp, train_attn, train_unembed)
        if train_unembed is None and not about.serves_unembed and about.base_model not in self._warned:
            self._warned.add(about.base_model)
            warnings.warn(
                f"{about.base_model}: train_unembed is on by default in the Tinker API, but off here, because samplers "
                "of this base cannot serve an adapter on the unembedding (on CUDA none can); pass train_unembed=False "
                "to disable this warning",
                stacklevel=2,
            )
        return self._training(deployment, deployment.create_model(lora, seed or 0).result())

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool | None = None,
    ) -> TrainingClient:
        return await asyncio.to_thread(
            self.create_lora_training_client, base_model, rank, seed, train_mlp, train_attn, train_unembed
        )

    def create_training_client_from_state(self, path: str, base_model: str | None = None) -> TrainingClient:
        """Create a training client with the weights of a saved state and a new optimizer state.

        Raises:
            CheckpointError: the state is damaged or belongs to another base.
        """
        return self._restored(path, base_model, optimizer=False)

    async def create_training_client_from_state_async(self, path: str, base_model: str | None = None) -> TrainingClient:
        return await asyncio.to_thread(self.create_training_client_from_state, path, base_model)

    def create_training_client_from_state_with_optimizer(
        self, path: str, base_model: str | None = None
    ) -> TrainingClient:
        """As `create_training_client_from_state`, with the saved optimizer state."""
        return self._restored(path, base_model, optimizer=True)

    async def create_training_client_from_state_with_optimizer_async(
        self, path: str, base_model: str | None = None
    ) -> TrainingClient:
        return await asyncio.to_thread(self.create_training_client_from_state_with_optimizer, path, base_model)

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> SamplingClient:
        """Create a client that samples from a saved adapter (`model_path`) or from the base (`base_model`).

        Raises:
            ConfigError: neither is given, or no such model.
            CheckpointError: `model_path` is damaged or belongs to another base.
        """
        if model_path is None and base_model is None:
            raise ConfigError("create_sampling_client: found neither base_model nor model_path; wanted one of them")
        if model_path is None:
            assert base_model is not None
            return SamplingClient(self._deployment(base_model), None, self._check_open)
        model_path = given(model_path)
        deployment = self._deployment(base_model or as_written(self._reached().base_model_of(model_path)))
        snapshot: SnapshotHandle = deployment.open(model_path).result()
        return SamplingClient(deployment, snapshot, self._check_open)

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        return await asyncio.to_thread(self.create_sampling_client, model_path, base_model)

    def get_server_capabilities(self) -> ServerCapabilities:
        """List the models that run or can be started by name, and the losses."""
        models = [
            SupportedModel(found.base_model, True, found.max_length)
            if isinstance(found, About)
            else SupportedModel(found, False)
            for found in self._reached().known()
        ]
        return ServerCapabilities(models, LOSSES)

    async def get_server_capabilities_async(self) -> ServerCapabilities:
        return await asyncio.to_thread(self.get_server_capabilities)

    def close(self) -> None:
        """Stop the deployments started by this client. Its training and sampling clients raise from now on. Can be
        called twice."""
        with self._starting:
            self._closed = True
            if self._backend is not None:
                self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restored(self, path: str, base_model: str | None, *, optimizer: bool) -> TrainingClient:
        path = given(path)
        deployment = self._deployment(base_model or as_written(self._reached().base_model_of(path)))
        return self._training(deployment, deployment.restore_model(path, optimizer).result())

    def _training(self, deployment: Deployment, model: ModelHandle) -> TrainingClient:
        return TrainingClient(deployment, model, self._check_open)

    def _deployment(self, base_model: str) -> Deployment:
        self._refuse_unsupported(base_model, train_mlp=False)
        return self._reached().deployment(base_model)

    def _refuse_unsupported(self, base_model: str, train_mlp: bool) -> None:
        """Refuse an unsupported model on this machine before Ray or an engine starts for it."""
        if self._backend is not None:  # the backend makes this check itself
            return
        found = local_config(self.config.source(base_model))
        if found is None:
            return
        sampler = self.config.sampler or SamplerSection()
        refuse_unsupported(
            *found,
            max_length=1,  # a deployment uses the model's maximum, limited by ServiceConfig.max_length
            lora=LoraSection(train_mlp=train_mlp),
            sampler=sampler,
            device="cuda"
            if self.config.sampler is None or sampler.num_gpus
            else "cpu",  # None: not known before joining
        )

    def _reached(self) -> Backend:
        with self._starting:
            self._check_open()
            if self._backend is None:
                start: Callable[[ServiceConfig], Backend] = importlib.import_module(BACKEND).RayBackend
                self._backend = start(self.config)
            return self._backend

    def _check_open(self) -> None:
        if self._closed:
            raise ClusterError("this ServiceClient and its clients are closed; create a new ServiceClient")


def _lora(about: About, rank: int, train_mlp: bool, train_attn: bool, train_unembed: bool | None) -> LoraSection:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank: found {rank!r}; wanted a whole number, at least 1")
    unembed = about.serves_unembed if train_unembed is None else train_unembed
    if not (train_mlp or train_attn or unembed):
        raise ConfigError("train_mlp, train_attn, train_unembed: found all False; wanted at least one True")
    return LoraSection(
        rank=rank, alpha=about.lora_alpha, train_mlp=train_mlp, train_attn=train_attn, train_unembed=unembed
    )
