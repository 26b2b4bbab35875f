"""Deployments on a Ray cluster: a base model with one learner actor and samplers. Joins a running one or starts it."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import ray
from ray.actor import ActorHandle

from actors.cluster.base_folder import local_folder
from actors.cluster.ray_cluster import cluster, refuse_other_builds
from actors.service.call_futures import future_of, gathered, together
from actors.service.function_shipping import ship
from actors.service.learner_service import ServiceLearner
from actors.service.lease_renewal import LeaseRenewal
from actors.service.placement import actor_options, dtype_of, refuse_shortfall, sections
from actors.service.sampler_service import ServiceSampler
from rlsys.architectures.model_shape import max_positions, read_config
from rlsys.architectures.support import refuse_unsupported, serves_unembedding
from rlsys.client.backend import About, Adopted, Answer, ModelHandle, RunProgress, SampleAnswer, SnapshotHandle
from rlsys.client.config import HostSpec, SamplerSpec, ServiceConfig
from rlsys.client.paths import folder_of
from rlsys.client.requests import Drop, Request, TakeSnapshot
from rlsys.config import LoraSection, ModelSection
from rlsys.config.gpu_shares import may_share, start_in_order
from rlsys.errors import ConfigError
from rlsys.learner.checkpoint_files import read_info
from rlsys.types import Array, SamplingParams
from rlsys.utils.shell_paths import as_written

NAMESPACE = "rlsys"
ASK_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
MANY_CALLS = 10_000  # concurrent calls of an actor: a call that waits for its turn must not block the call before it


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
        self._started: list[list[ActorHandle]] = []  # actors, engines first
        self._cluster = ExitStack()
        if not ray.is_initialized():
            self._cluster.enter_context(cluster(config.cluster))

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
        asked = [future_of(actor.about.remote(), "learner: describing its base") for actor in _running().values()]
        running = [about.result(ASK_TIMEOUT_S) for about in asked]
        sources = {about.folder for about in running}
        idle = [name for name, source in self._config.models.items() if _resolved(source) not in sources]
        return [*running, *idle]

    def close(self) -> None:
        for deployment in self._joined.values():
            deployment.close()
        for actors in self._started:
            _end(actors)
        self._started, self._joined = [], {}
        self._cluster.close()

    def _source(self, base_model: str) -> str:
        """The folder or hub name to load the base from.

        Raises:
            ConfigError: no such model.
        """
        source = _resolved(self._config.source(base_model))
        if Path(source).is_dir() or _key(source) in _running():
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
        learner = _running().get(_key(source))
        if learner is None:
            return None
        about = future_of(learner.about.remote(), f"deployment of {source}").result(self._config.start_timeout_s)
        samplers = [ray.get_actor(name, namespace=NAMESPACE) for name in _names(f"sampler/{_key(source)}/")]
        return RayDeployment(about, learner, samplers, self._model_id)

    def _start(self, base_model: str, source: str) -> RayDeployment:
        host, engine = self._specs(base_model, source)
        refuse_shortfall(host.learner, engine.section)
        named: dict[str, object] = {"namespace": NAMESPACE, "max_concurrency": MANY_CALLS}
        if self._config.detached is not None:
            named["lifetime"] = "detached"
        actors: list[ActorHandle] = []
        try:
            for i in range(engine.section.num_workers):
                options = named | {"name": f"sampler/{_key(source)}/{i}"} | actor_options(engine.section, i)
                actors.append(ray.remote(ServiceSampler).options(**options).remote(engine, i))
            options = named | {"name": f"learner/{_key(source)}"} | actor_options(host.learner, 0)
            actors.append(ray.remote(ServiceLearner).options(**options).remote(host, self._config.gap_timeout_s))
            *samplers, learner = actors
            about = _brought_up(
                learner, samplers, self._config.start_timeout_s, may_share(host.learner, engine.section)
            )
        except BaseException:
            _end(actors)
            raise
        if self._config.detached is None:
            self._started.append(actors)
        return RayDeployment(about, learner, samplers, self._model_id)

    def _specs(self, base_model: str, source: str) -> tuple[HostSpec, SamplerSpec]:
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
        return host, engine

    def _model_id(self) -> str:
        return f"{self._session}:train:{next(self._models)}"


class RayDeployment:
    """`rlsys.client.backend.Deployment` on one learner actor and its sampler actors."""

    def __init__(
        self, about: About, learner: ActorHandle, samplers: Sequence[ActorHandle], model_id: Callable[[], str]
    ) -> None:
        self.about = about
        self._learner, self._samplers, self._model_id = learner, samplers, model_id
        self._holder = uuid.uuid4().hex
        self._lease = LeaseRenewal([learner, *samplers], self._holder)
        self._next = itertools.count()
        self._unneeded: deque[Callable[[], object]] = deque()

    @property
    def num_samplers(self) -> int:
        return len(self._samplers)

    def create_model(
        self, lora: LoraSection, seed: int, model_id: str | None = None, tenant: str | None = None
    ) -> Future[ModelHandle]:
        model_id = model_id or self._model_id()
        call = self._learner.create_model.remote(model_id, lora, seed, self._holder, tenant)
        return future_of(call, f"learner: creating {model_id}")

    def restore_model(
        self, path: str, optimizer: bool, model_id: str | None = None, tenant: str | None = None
    ) -> Future[ModelHandle]:
        model_id = model_id or self._model_id()
        call = self._learner.restore_model.remote(model_id, path, optimizer, self._holder, tenant)
        return future_of(call, f"learner: restoring {path}")

    def submit(self, model_id: str, seq: int, request: Request[Answer]) -> Future[Answer]:
        self.let_go()
        what = f"training client {model_id}: {request.op}"
        call = self._learner.submit.remote(model_id, seq, request)
        if isinstance(request, TakeSnapshot):  # so the Answer is a SnapshotHandle, which mypy does not follow
            return cast("Future[Answer]", self._held(future_of(call, what)))
        return future_of(call, what)

    def ship(self, fn: Callable[..., object]) -> bytes:
        return ship(fn)

    def open(self, path: str, tenant: str | None = None) -> Future[SnapshotHandle]:
        call = self._learner.open.remote(path, tenant or self._holder)
        return self._held(future_of(call, f"learner: opening {path}"))

    def sample(
        self,
        snapshot: SnapshotHandle | None,
        prompt: Array,
        n: int,
        params: SamplingParams,
        prompt_logprobs: bool,
        topk: int,
    ) -> Future[SampleAnswer]:
        self.let_go()
        sampler, what = self._sampler()
        key = None if snapshot is None else snapshot.key
        call = sampler.sample.remote(key, prompt, n, params, prompt_logprobs, topk)
        return future_of(call, f"{what}: sampling")

    def logprobs(self, snapshot: SnapshotHandle | None, tokens: Array) -> Future[Array]:
        self.let_go()
        sampler, what = self._sampler()
        return future_of(
            sampler.logprobs.remote(None if snapshot is None else snapshot.key, tokens), f"{what}: scoring"
        )

    def release(self, snapshot: SnapshotHandle) -> None:
        """Queue the release, and send it with the next call: the garbage collector calls this in any thread, at any
        time."""
        self._unneeded.append(
            lambda: [sampler.release.remote(snapshot.key, self._holder) for sampler in self._samplers]
        )

    def drop_model(self, model_id: str, seq: int) -> None:
        """Queue the removal of a run, as `release` does; `seq` orders it among the run's calls."""
        self._unneeded.append(lambda: self._learner.submit.remote(model_id, seq, Drop()))

    def progress(self) -> Future[Mapping[str, RunProgress]]:
        return future_of(self._learner.progress.remote(), "learner: telling the progress of its runs")

    def adopt(self, model_ids: Sequence[str], snapshot_keys: Sequence[str] = ()) -> Future[Adopted]:
        runs = future_of(self._learner.adopt.remote(list(model_ids), self._holder), "learner: adopting runs")
        snapshots = [
            future_of(sampler.adopt.remote(list(snapshot_keys), self._holder), f"sampler {i}: adopting snapshots")
            for i, sampler in enumerate(self._samplers)
        ]
        return gathered(
            [runs, *snapshots],
            lambda found, *kept: Adopted(
                found, tuple(key for key in snapshot_keys if all(key in keys for keys in kept))
            ),
        )

    def _held(self, answer: Future[SnapshotHandle]) -> Future[SnapshotHandle]:
        """Register the snapshot with every sampler before the caller gets it: async actors do not keep the order of
        calls."""
        registered: Future[SnapshotHandle] = Future()

        def register(done: Future[SnapshotHandle]) -> None:
            try:
                handle = done.result()
                calls = [
                    future_of(
                        sampler.register.remote(handle.key, handle.ref, self._holder),
                        f"sampler {i}: registering {handle.key}",
                    )
                    for i, sampler in enumerate(self._samplers)
                ]
                together(calls, registered, handle)
            except BaseException as error:  # edge of a callback: the error belongs to the holder of the future
                registered.set_exception(error)

        answer.add_done_callback(register)
        return registered

    def _sampler(self) -> tuple[ActorHandle, str]:
        i = next(self._next) % len(self._samplers)
        return self._samplers[i], f"sampler {i}"

    def close(self) -> None:
        """Stop renewing: what this client holds is released after a while, unless its actors end now."""
        self._lease.stop()

    def let_go(self) -> None:
        """Send the releases that are queued."""
        with suppress(IndexError):  # empty, perhaps emptied by another thread
            while True:
                self._unneeded.popleft()()


def stop(name: str | None = None) -> list[str]:
    """Stop the deployment with that detached name or that base; None: all deployments. Returns their base models."""
    ended = []
    for key, learner in _running().items():
        about = future_of(learner.about.remote(), "learner: describing its base").result(ASK_TIMEOUT_S)
        if name in (None, about.detached, about.base_model, about.folder):
            _end([*(ray.get_actor(found, namespace=NAMESPACE) for found in _names(f"sampler/{key}/")), learner])
            ended.append(about.base_model)
    return ended


def _brought_up(learner: ActorHandle, samplers: Sequence[ActorHandle], limit_s: float, shared: bool) -> About:
    """Load the base in all actors, and have every sampler prove that adapters reach its forward pass. `shared`: learner
    and samplers may share a GPU."""
    deadline = time.monotonic() + limit_s
    preloading = [(sampler, future_of(sampler.preload.remote(), "sampler: loading vLLM")) for sampler in samplers]
    loading = future_of(learner.start.remote(), "learner: loading the base")
    starting = []

    def begin_engines() -> None:
        for sampler, preloaded in preloading:
            preloaded.result(deadline - time.monotonic())
            starting.append(future_of(sampler.start.remote(), "sampler: starting vLLM"))

    start_in_order(shared, lambda: loading.result(deadline - time.monotonic()), begin_engines)
    about: About = loading.result()
    for started in starting:
        started.result(deadline - time.monotonic())
    probe = learner.probe.remote()
    proofs = [future_of(sampler.prove.remote(probe), "sampler: proving its adapters") for sampler in samplers]
    for proof in proofs:
        proof.result(deadline - time.monotonic())
    future_of(learner.announce.remote(), "learner: opening").result(ASK_TIMEOUT_S)
    return about


def _end(actors: Sequence[ActorHandle]) -> None:
    """Ask the actors to stop, so that engines shut down cleanly; after STOP_TIMEOUT_S kill them all."""
    stopping = [actor.stop.remote() for actor in actors]
    ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S) if stopping else None
    for actor in actors:
        ray.kill(actor)


def _running() -> dict[str, ActorHandle]:
    """Running learner actors by the key of their base."""
    found = {}
    for name in _names("learner/"):
        try:
            found[name.removeprefix("learner/")] = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:  # it ended after its name was listed
            continue
    return found


def _names(prefix: str) -> list[str]:
    """Names of this namespace's actors that begin with `prefix`."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    )


def _resolved(source: str) -> str:
    return os.path.abspath(source) if Path(source).is_dir() else source


def _key(source: str) -> str:
    return hashlib.blake2b(source.encode(), digest_size=6).hexdigest()
