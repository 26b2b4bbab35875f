"""Executes requests of training clients (rlsys/client/requests.py) on one `Learner`. Not thread-safe: the learner actor
runs one request at a time."""

from __future__ import annotations

import itertools
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np

from rlsys.client import requests
from rlsys.client.backend import About, Answer, ModelHandle, SnapshotHandle
from rlsys.client.config import HostSpec
from rlsys.client.paths import Kind, folder_of, new_folder_of, path_of
from rlsys.client.requests import Request
from rlsys.config import LoraSection
from rlsys.distributed.ranks import ALONE, Ranks
from rlsys.errors import ConfigError, LossError
from rlsys.learner.adapter_checkpoint import load_run, restore_run, save_run
from rlsys.learner.custom_loss import CustomLoss
from rlsys.learner.learner import Learner
from rlsys.learner.turns import Turns, finish
from rlsys.service import host_requests
from rlsys.service.host_requests import Files
from rlsys.weight_sync.canary import LONG_TOKENS, Canary, StartupProbe
from rlsys.weight_sync.publisher import AdapterPublisher

TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")
PROBE_RUN = "rlsys.probe"


class TrainingHost:
    """The runs of all training clients on one base. With several `ranks`, each has a host, and all do the same work in
    the same order (rlsys/service/joint_work.py)."""

    def __init__(self, folder: Path, spec: HostSpec, ranks: Ranks = ALONE) -> None:
        self.spec = spec
        self.learner = Learner(folder, spec.model, spec.learner, base_name=spec.model.path, ranks=ranks)
        self.about = self._about(folder)
        tokens = np.arange(LONG_TOKENS) * 7919 % self.learner.vocab_size
        self._publisher = AdapterPublisher(Canary(self.learner, spec.model.dtype, tokens))
        self._temporary = itertools.count()

    def do(self, model_id: str, request: Request[Answer]) -> Answer:
        """Execute a request of the run `model_id`."""
        return finish(self.begin(model_id, request))

    def begin(self, model_id: str, request: Request[Answer]) -> Turns[Answer]:
        """Execute a request in turns (rlsys/learner/turns.py). Nothing happens before the first turn."""
        turns = self._turns(model_id, request)
        return cast("Turns[Answer]", turns)  # mypy does not follow a `match` to each request's answer

    def _turns(self, model_id: str, request: Request[object]) -> Turns[object]:
        match request:
            case requests.Forward(batch, loss):
                return (yield from self.learner.forward_in_turns(model_id, batch, loss))
            case requests.ForwardBackward(batch, loss):
                return (yield from self.learner.forward_backward_in_turns(model_id, batch, loss))
            case requests.ForwardBackwardCustom(batch, data, fn):
                custom = _unshipped(fn)
                return (yield from self.learner.forward_backward_custom_in_turns(model_id, batch, data, custom))
        return self._done(model_id, request)

    def _done(self, model_id: str, request: Request[object]) -> object:
        match request:
            case host_requests.CreateRun(lora, seed):
                return self.create(model_id, lora, seed)
            case host_requests.RestoreRun(path, optimizer, files):
                with self._checkpoint(path, files) as checkpoint:
                    return self._restored(model_id, checkpoint, optimizer)
            case host_requests.OpenSnapshot(path, files):
                with self._checkpoint(path, files) as checkpoint:
                    return self._opened(path, checkpoint)
            case host_requests.LoadFiles(path, optimizer, files):
                with self._checkpoint(path, files) as checkpoint:
                    load_run(self.learner, model_id, checkpoint, optimizer)
                return path
            case host_requests.PublishSaved(path):
                return self._handle(model_id, path)
            case host_requests.MakeProbe():
                return self.probe()
            case requests.OptimStep(adam):
                return self.learner.optim_step(model_id, adam)
            case requests.SaveState(name, overwrite):
                return self._save(model_id, "weights", name, True, overwrite)
            case requests.SaveWeightsForSampler(name, overwrite):
                return self._save(model_id, "sampler_weights", name, False, overwrite)
            case requests.SaveFolder(folder, optimizer, overwrite):
                save_run(self.learner, model_id, Path(folder), optimizer, overwrite)
                return folder
            case requests.LoadState(path, optimizer):
                load_run(self.learner, model_id, self.folder(path), optimizer)
                return path
            case requests.TakeSnapshot(name):
                return self._snapshot(model_id, name)
            case requests.Drop():
                self.drop(model_id)
                return None
            case requests.Skip():
                return None
        raise TypeError(f"{type(request).__name__}: found a request that this learner does not know")

    def create(self, model_id: str, lora: LoraSection, seed: int) -> ModelHandle:
        self._refuse_unservable(lora)
        self.learner.runs.create(model_id, lora, seed)
        return ModelHandle(model_id, lora)

    def restore(self, model_id: str, path: str, optimizer: bool) -> ModelHandle:
        return self._restored(model_id, self.folder(path), optimizer)

    def _restored(self, model_id: str, checkpoint: Path, optimizer: bool) -> ModelHandle:
        restore_run(self.learner, model_id, checkpoint, optimizer)
        try:
            self._refuse_unservable(self.learner.runs.lora(model_id))
        except ConfigError:
            self.drop(model_id)
            raise
        return ModelHandle(model_id, self.learner.runs.lora(model_id))

    def drop(self, model_id: str) -> None:
        self._publisher.reset(model_id)
        if model_id in self.learner.runs.ids:
            self.learner.runs.drop(model_id)

    def open(self, path: str) -> SnapshotHandle:
        """A snapshot of a saved adapter."""
        return self._opened(path, self.folder(path))

    def _opened(self, path: str, checkpoint: Path) -> SnapshotHandle:
        run_id = f"rlsys.opened{next(self._temporary)}"
        restore_run(self.learner, run_id, checkpoint, False)
        try:
            self._refuse_unservable(self.learner.runs.lora(run_id))
            return self._handle(run_id, path)
        finally:
            self.drop(run_id)

    def probe(self) -> StartupProbe:
        """See ``AdapterPublisher.probe``."""
        lora = LoraSection(rank=min(8, self.spec.max_lora_rank), alpha=self.spec.lora_alpha)
        self.learner.runs.create(PROBE_RUN, lora, 0)
        try:
            return self._publisher.probe(PROBE_RUN)
        finally:
            self.learner.runs.drop(PROBE_RUN)

    def _save(self, model_id: str, kind: Kind, name: str, optimizer: bool, overwrite: bool) -> str:
        folder = new_folder_of(Path(self.spec.checkpoints), model_id, kind, name)
        save_run(self.learner, model_id, folder, optimizer, overwrite)
        return path_of(model_id, kind, name)

    def _snapshot(self, model_id: str, name: str | None) -> SnapshotHandle:
        return self._handle(model_id, self.save_snapshot(model_id, name))

    def save_snapshot(self, model_id: str, name: str | None) -> str | None:
        return None if name is None else self._save(model_id, "sampler_weights", name, False, False)

    def _handle(self, run_id: str, path: str | None) -> SnapshotHandle:
        last_update = f"is at optimizer step {self.learner.runs.version(run_id)}"
        advice = "Lower AdamParams.learning_rate, or bound the step with AdamParams.grad_clip_norm=1.0"
        update = self._publisher.publish(run_id, last_update, advice)
        snapshot, name = update.snapshot, path or run_id
        # Versions may repeat after load_state, so the digest is part of the key: the same key is the same bits.
        key = f"{name}@{snapshot.version}#{snapshot.digest[:12]}"
        return SnapshotHandle(key, run_id, snapshot.version, update, path)

    @contextmanager
    def _checkpoint(self, path: str, files: Files | None) -> Iterator[Path]:
        """The folder of a checkpoint; with `files`, which came from another node, a temporary one."""
        if files is None:
            yield self.folder(path)
            return
        with tempfile.TemporaryDirectory(prefix="rlsys-checkpoint-") as scratch:
            folder = Path(scratch)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            yield folder

    def folder(self, path: str) -> Path:
        return folder_of(Path(self.spec.checkpoints), path)

    def _refuse_unservable(self, lora: LoraSection) -> None:
        if lora.rank > self.spec.max_lora_rank:
            raise ConfigError(
                f"rank: found {lora.rank}; this deployment serves at most {self.spec.max_lora_rank}. Start it with "
                f"ServiceConfig(sampler=SamplerSection(max_lora_rank={lora.rank})), or ask for a smaller rank"
            )
        if lora.train_unembed and not self.spec.serves_unembed:
            raise ConfigError(
                "train_unembed: vLLM on CUDA scores prompts wrongly under an adapter of the unembedding, so it is "
                "served on CPU only; pass train_unembed=False"
            )

    def _about(self, folder: Path) -> About:
        files = {
            file.name: file.read_bytes()
            for file in sorted(folder.iterdir())
            if file.suffix in TOKENIZER_SUFFIXES and not file.name.endswith(".index.json")
        }
        spec = self.spec
        return About(
            base_model=spec.base_model,
            folder=str(spec.model.path),
            arch=_arch(files),
            vocab_size=self.learner.vocab_size,
            max_length=self.learner.max_length,
            max_lora_rank=spec.max_lora_rank,
            lora_alpha=spec.lora_alpha,
            serves_unembed=spec.serves_unembed,
            tokenizer=files,
            detached=spec.detached,
        )


def _unshipped(shipped: bytes) -> CustomLoss:
    try:
        fn: CustomLoss = pickle.loads(shipped)
    except Exception as error:  # anything that the function imports may fail
        raise LossError(
            f"custom loss: the function cannot be loaded on the learner's node: {type(error).__name__}: {error}. "
            "Install what it needs there, or pass where='caller'"
        ) from error
    return fn


def _arch(files: Mapping[str, bytes]) -> str:
    names = json.loads(files["config.json"]).get("architectures") or [""]
    return str(names[0])
