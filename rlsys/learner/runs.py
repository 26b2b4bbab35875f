"""The training runs of one base: weights, gradients and optimizer state of each, by run id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlsys.errors import ConfigError
from rlsys.learner.optimizer import Stepper, require_like
from rlsys.modeling.lora import Adapters
from rlsys.weight_sync.tensors import snapshot_of
from rlsys.weight_sync.update import AdapterSnapshot

if TYPE_CHECKING:  # runs only read it: GPU checks run without pydantic
    from rlsys.config import LoraSection

BASE_RUN = "base"  # the run id of trainable="all"


@dataclass(frozen=True, slots=True)
class RunState:
    """Weights and optimizer state of a run after its last step, by tensor name. Without `optimizer`, moments restart
    from zero."""

    version: int
    weights: Mapping[str, Tensor]  # <module path>.lora_A and .lora_B
    optimizer: Mapping[str, Tensor] | None  # as ``Stepper.state``


@dataclass(slots=True)
class Run:
    """Parameters, gradients and optimizer of one run. A step of another run changes none of these."""

    id: str
    adapter: str | None  # its name inside Adapters; None for all weights
    section: LoraSection | None
    parameters: dict[str, nn.Parameter]
    stepper: Stepper
    version: int = 0
    has_gradient: bool = False

    def take_gradients(self) -> list[Tensor | None]:
        """Detach the gradients from the parameters and return them."""
        taken = [parameter.grad for parameter in self.parameters.values()]
        self.set_gradients([None] * len(taken))
        return taken

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient

    def add_gradients(self, earlier: Sequence[Tensor | None]) -> None:
        """Add to the present gradients. Parameters without any get zeros, so that all ranks sum the same tensors."""
        for parameter, gradient in zip(self.parameters.values(), earlier, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            elif gradient is not None:
                parameter.grad.add_(gradient)

    def forget_gradient(self) -> None:
        self.take_gradients()
        self.has_gradient = False


class RunRegistry:
    """The runs of one base by run id.

    Each run is an adapter whose weights are of `dtype`. With `base_run` all weights are trained: it is the only run,
    and adapters are refused.
    """

    def __init__(self, adapters: Adapters, dtype: torch.dtype, base_name: str, base_run: Run | None = None) -> None:
        self._adapters, self._dtype, self._base_name = adapters, dtype, base_name
        self._trains_base = base_run is not None
        self._runs: dict[str, Run] = {} if base_run is None else {base_run.id: base_run}

    def __getitem__(self, run_id: str) -> Run:
        if run_id not in self._runs:
            raise ConfigError(f"run {run_id!r} does not exist; {self._known()}")
        return self._runs[run_id]

    @property
    def ids(self) -> list[str]:
        return list(self._runs)

    @property
    def trains_base(self) -> bool:
        return self._trains_base

    def create(self, run_id: str, lora: LoraSection, seed: int) -> None:
        """Add an adapter that does not change the base yet. The same seed and section give the same weights."""
        if self._trains_base:
            raise ConfigError(
                f"run {run_id!r}: this learner trains all weights as run {BASE_RUN!r} and has no adapters"
            )
        if run_id in self._runs:
            raise ConfigError(f"run {run_id!r} exists already; {self._known()}")
        adapter = self._adapters.add(lora, seed, self._dtype)
        parameters = self._adapters.parameters(adapter)
        self._runs[run_id] = Run(run_id, adapter, lora, parameters, Stepper(parameters, "adamw"))

    def drop(self, run_id: str) -> None:
        adapter, _ = self._adapter(run_id)
        self._adapters.drop(adapter)
        del self._runs[run_id]

    def copy(self, run_id: str, copy_id: str) -> None:
        """Copy the weights, not the optimizer state, to the run `copy_id`, which is created if it does not exist."""
        if copy_id not in self._runs:
            self.create(copy_id, self.lora(run_id), seed=0)  # its weights are replaced below
        state = self.state(run_id)
        self.restore(copy_id, RunState(state.version, state.weights, None))

    def activate(self, run_id: str | None) -> None:
        """Forward passes use this run's adapter until the next call; None: the base with every adapter off."""
        self._adapters.activate(None if run_id is None else self[run_id].adapter)

    def version(self, run_id: str) -> int:
        """Optimizer steps applied so far."""
        return self[run_id].version

    def lora(self, run_id: str) -> LoraSection:
        return self._adapter(run_id)[1]

    def has_gradient(self, run_id: str) -> bool:
        """Whether a gradient has accumulated since the last step."""
        return self[run_id].has_gradient

    def forget_gradient(self, run_id: str) -> None:
        """Clear the gradient accumulated since the last step."""
        self[run_id].forget_gradient()

    def state(self, run_id: str) -> RunState:
        """Views of the run's weights and optimizer state, without gradients accumulated since the last step."""
        run = self[run_id]
        weights = {name: weight.detach() for name, weight in run.parameters.items()}
        return RunState(run.version, weights, run.stepper.state())

    def restore(self, run_id: str, state: RunState) -> None:
        """Load a state into a run of the same shape and clear its accumulated gradient.

        Raises:
            CheckpointError: names, shapes or dtypes are not the run's. The run is unchanged.
        """
        run = self[run_id]
        require_like(f"run {run_id!r}", state.weights, run.parameters)
        run.stepper.restore(state.optimizer or {})
        with torch.no_grad():
            for name, weight in run.parameters.items():
                weight.copy_(state.weights[name])
        run.forget_gradient()
        run.version = state.version

    def snapshot(self, run_id: str, dtype: str) -> AdapterSnapshot:
        """The adapter as samplers serve it: alpha / r folded into B before the cast to `dtype`."""
        adapter, lora = self._adapter(run_id)
        return snapshot_of(run_id, self.version(run_id), lora.rank, self._adapters.scaled(adapter), dtype)

    def enlarge(self, run_id: str, size: float, seed: int) -> None:
        """Set B so that each delta is `size` times as large as the weight that it changes."""
        self._adapters.enlarge(self._adapter(run_id)[0], size, seed)

    def save_adapter(self, run_id: str, out: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT loads them."""
        self._adapters.save(self._adapter(run_id)[0], Path(out), self._base_name)

    def _adapter(self, run_id: str) -> tuple[str, LoraSection]:
        run = self[run_id]
        if run.adapter is None or run.section is None:
            raise ConfigError(
                f"run {run_id!r} trains all weights and has no adapter; only adapters are served and dropped"
            )
        return run.adapter, run.section

    def _known(self) -> str:
        return f"known: {', '.join(self._runs)}" if self._runs else "no run exists yet"
