"""Deployments on a Ray cluster: a base model with one learner actor and samplers. Joins a running one or starts it."""

from __future__ import annotations

import itertools
import threading
import uuid
import warnings
from contextlib import ExitStack
from pathlib import Path

import ray
from ray.actor import ActorHandle

from actors.cluster.base_folder import local_folder
from actors.cluster.ray_cluster import cluster, refuse_other_builds
from actors.service.call_futures import future_of
from actors.service.fork_servers import DeploymentServers, server_beside_ray
from actors.service.launch import (
    ASK_TIMEOUT_S,
    brought_up,
    end,
    find,
    key_of,
    launch_learner,
    launch_sampler,
    note_stop,
    resolved,
    running_learners,
    running_samplers,
    sampler_name,
)
from actors.service.placement import dtype_of, refuse_shortfall, sections
from actors.service.ray_deployment import RayDeployment
from rlsys.architectures.model_shape import max_positions, read_config
from rlsys.architectures.support import refuse_unsupported, serves_unembedding
from rlsys.client.backend import About
from rlsys.client.config import DeploymentSpec, HostSpec, SamplerSpec, ServiceConfig
from rlsys.client.paths import folder_of
from rlsys.config import ModelSection
from rlsys.errors import ClusterError, ConfigError
from rlsys.learner.checkpoint_files import read_info
from rlsys.utils.shell_paths import as_written

__all__ = ["RayBackend", "RayDeployment", "stop"]


class RayBackend:
    """`rlsys.client.backend.Backend` on Ray: deployments by base model. `close` ends the deployments that were started
    here, except detached ones."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._checkpoints = str(Path(config.checkpoints).absolute())
        self._session = uuid.uuid4().hex[:12]
        self._models = itertools.count()
        self._starting = threading.Lock()
        self._joined: dict[str, RayDeployment] = {}
        self._started: list[RayDeployment] = []
        self._cluster = ExitStack()
        if not ray.is_initialized():
            self._cluster.enter_context(server_beside_ray(config))
            self._cluster.enter_context(cluster(config.cluster))
        self._servers = DeploymentServers()

    def deployment(self, base_model: str) -> RayDeployment:
        source = self._source(base_model)
        with self._starting:
            deployment = self._joined.get(source)
            if deployment is None:
                deployment = self._join(source) or self._start(base_model, source)
                self._joined[source] = deployment
            return deployment

    def base_model_of(self, path: str) -> str:
        return read_info(folder_of(Path(self._checkpoints), path)).base_name

    def known(self) -> list[About | str]:
        asked = [
            future_of(actor.about.remote(), "learner: describing its base") for actor in running_learners().values()
        ]
        running = [about.result(ASK_TIMEOUT_S) for about in asked]
        sources = {about.folder for about in running}
        idle = [name for name, source in self._config.models.items() if resolved(source) not in sources]
        return [*running, *idle]

    def close(self) -> None:
        for deployment in self._joined.values():
            deployment.close()
        for deployment in self._started:
            end(deployment.actors)
        self._started, self._joined = [], {}
        self._cluster.close()

    def _source(self, base_model: str) -> str:
        """The folder or hub name to load the base from.

        Raises:
            ConfigError: no such model.
        """
        source = resolved(self._config.source(base_model))
        if Path(source).is_dir() or key_of(source) in running_learners():
            return source
        reason = "which is not a folder on this node"
        if base_model not in self._config.models and source.count("/") == 1 and not source.startswith((".", "/")):
            try:
                with local_folder(source):
                    return source
            except ConfigError as error:
                reason = str(error).partition(": ")[2]
        raise ConfigError(f"base_model: found {base_model!r}, {reason}; known models: {self._known_names()}")

    def _known_names(self) -> str:
        names = [f"{base.base_model!r} (running)" if isinstance(base, About) else repr(base) for base in self.known()]
        return ", ".join(names) or "none; give a model folder, or add one to ServiceConfig(models={name: folder})"

    def _join(self, source: str) -> RayDeployment | None:
        learner = running_learners().get(key_of(source))
        if learner is None:
            return None
        joining = future_of(learner.described.remote(), f"deployment of {source}")
        about, spec = joining.result(self._config.start_timeout_s)
        samplers = [find(sampler_name(spec.key, i)) for i in range(spec.engine.section.num_workers)]
        return RayDeployment(about, spec, learner, samplers, self._model_id, about.detached is not None, self._servers)

    def _start(self, base_model: str, source: str) -> RayDeployment:
        spec = self._spec(base_model, source)
        end(running_samplers(spec.key))  # of a deployment whose learner died when nobody used it
        refuse_shortfall(spec.host.learner, spec.engine.section)
        try:
            learner = launch_learner(spec, self._servers, alone=True)
        except ValueError:  # another client was faster
            joined = self._join(source)
            if joined is None:
                raise ClusterError(f"deployment of {source}: another client started it and has ended it") from None
            return joined
        note_stop(spec.key, stopped=False)
        samplers: list[ActorHandle] = []
        try:
            samplers += [launch_sampler(spec, i, self._servers) for i in range(spec.engine.section.num_workers)]
            about = brought_up(spec, learner, samplers, self._servers.note)
        except BaseException:
            end([*samplers, learner])
            raise
        deployment = RayDeployment(about, spec, learner, samplers, self._model_id, True, self._servers)
        if self._config.detached is None:
            self._started.append(deployment)
        return deployment

    def _spec(self, base_model: str, source: str) -> DeploymentSpec:
        from rlsys.planning.model_folder import check_tokenizer  # imports transformers, which joining does not need

        config = self._config
        with local_folder(source) as folder:
            for note in check_tokenizer(folder):
                warnings.warn(note, stacklevel=2)
            found = read_config(folder)
        max_length = min(config.max_length, max_positions(found) or config.max_length)
        learner, sampler = sections(config, ray.cluster_resources())
        refuse_other_builds(config.cluster, sampler.device, learner.device)
        dtype, device = dtype_of(config, sampler), sampler.device
        model = ModelSection(path=as_written(source), dtype=dtype, max_length=max_length)
        refuse_unsupported(found, source, max_length=max_length, lora=None, sampler=sampler, device=device)
        host = HostSpec(
            base_model=base_model,
            model=model,
            learner=learner,
            max_lora_rank=sampler.max_lora_rank,
            lora_alpha=config.lora_alpha,
            serves_unembed=serves_unembedding(found, device),
            checkpoints=self._checkpoints,
            detached=config.detached,
            rank_timeout_s=config.rank_timeout_s,
        )
        engine = SamplerSpec(
            model=model,
            section=sampler,
            device=device,
            max_canary_diff=None,
            room_timeout_s=config.room_timeout_s,
        )
        return DeploymentSpec(
            key=key_of(source),
            host=host,
            engine=engine,
            gap_timeout_s=config.gap_timeout_s,
            start_timeout_s=config.start_timeout_s,
            max_restarts=config.cluster.max_restarts,
        )

    def _model_id(self) -> str:
        return f"{self._session}:train:{next(self._models)}"


def stop(name: str | None = None) -> list[str]:
    """Stop the deployment with that detached name or that base; None: all deployments. Returns their base models."""
    ended = []
    for key, learner in running_learners().items():
        about = future_of(learner.about.remote(), "learner: describing its base").result(ASK_TIMEOUT_S)
        if name in (None, about.detached, about.base_model, about.folder):
            note_stop(key, stopped=True)
            end([*running_samplers(key), learner])
            ended.append(about.base_model)
    return ended
