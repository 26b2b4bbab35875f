"""The policy of a job: one run on a learner, updated from batches of datums and published to samplers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from rlsys import losses
from rlsys.config import JobConfig
from rlsys.datums import DatumBatch
from rlsys.errors import DivergedError, MismatchError
from rlsys.learner.adapter_checkpoint import load_run, restore_run, save_run
from rlsys.learner.checkpoint_files import OPTIMIZER
from rlsys.learner.learner import Learner
from rlsys.rollouts import Rollouts, offsets_of, spans
from rlsys.types import AdamParams, Array
from rlsys.utils.packed_folder import pack_folder, unpack_folder
from rlsys.weight_sync.canary import Canary, StartupProbe
from rlsys.weight_sync.publisher import AdapterPublisher
from rlsys.weight_sync.tensors import digest_tensors
from rlsys.weight_sync.update import WeightUpdate

METRICS = {
    "ratio:mean": "policy/ratio_mean",
    "ratio:max": "policy/ratio_max",
    "clip_fraction:mean": "policy/clip_fraction",
    "kl_k1:mean": "policy/kl_k1",
    "kl_k3:mean": "policy/kl_k3",
    "logprob_diff:mean": "policy/logprob_diff_mean",
    "logprob_diff:max": "policy/logprob_diff_max",
    "entropy:mean": "policy/entropy",
    "overflows:sum": "policy/overflows",
}
# How far the sampler is from the learner, which truncated importance sampling separates from what the loss clips.
OF_SAMPLER = ("kl_k1:mean", "kl_k3:mean", "logprob_diff:mean", "logprob_diff:max")
UNBOUNDED = 2**31
POSITION_RANGES = (0, 64, 256, 512, 1024, UNBOUNDED)
REFERENCE_PREFIX = "reference."  # of the names of its files in a checkpoint


class Policy:
    """A run's adapter with its loss, optimizer settings and publisher.

    ``canary_tokens``: (C,) int32, a fixed sequence of the task's kind (rlsys/weight_sync/canary.py). Each learner rank
    has a policy, and all ranks make the same calls, except ``state_files`` and ``digest``, which only read.
    """

    def __init__(self, learner: Learner, config: JobConfig, canary_tokens: Array) -> None:
        self.learner = learner
        self.config = config
        self.run_id = config.run.name
        self.loss = losses.resolve(config.rl.loss.name, config.rl.loss.params)
        self.temperature = config.rl.sampling.temperature
        self._reference, self._before = (
            f"{self.run_id}/reference",
            f"{self.run_id}/before",
        )  # run ids of copies, made if needed
        self._must_move = False  # a token of the accumulated gradient has an advantage and is not clipped
        learner.runs.create(self.run_id, config.lora, config.run.seed)
        self._last_update = "made no step yet"
        self._publisher = AdapterPublisher(Canary(learner, config.model.dtype, canary_tokens))

    def learn(
        self, batch: DatumBatch, step: int, substep: int, *, first: bool, last: bool, on_policy: bool
    ) -> tuple[Array, dict[str, float]]:
        """Learn from a minibatch: ((T,) float32, p of its targets before the update that it contributes to, metrics).

        Gradients of a substep's minibatches accumulate from the `first`; after the `last` the optimizer steps once. If
        no minibatch has a datum (all groups have constant rewards), nothing changes. `on_policy`: every token was
        sampled from the present weights, so p must equal q, which is checked in the first substep.

        Raises:
            DivergedError: log-probabilities are not finite, or rewards differ within groups but the gradient is 0.
            MismatchError: `on_policy`, in the first substep, and mean |p - q| is above checks.max_mean_logprob_diff.
            GradientError: the gradient is not finite. The weights are unchanged.
        """
        if first:
            self.learner.runs.forget_gradient(self.run_id)  # of an abandoned substep
            self._must_move = False
            if substep == 0 and self._needs_copy_before:
                self.learner.runs.copy(self.run_id, self._before)
        logprobs_T, metrics = np.empty(0, np.float32), {"policy/tokens": 0.0}
        if batch.num_datums > 0:
            logprobs_T, metrics = self._add_gradient(batch, step, substep, on_policy)
        return logprobs_T, {**metrics, **(self._finish(step, substep) if last else {})}

    def _add_gradient(
        self, batch: DatumBatch, step: int, substep: int, on_policy: bool
    ) -> tuple[Array, dict[str, float]]:
        metrics = {"policy/tokens": float(np.count_nonzero(batch.columns["weights"]))}
        must_agree = on_policy and substep == 0
        sampled = batch
        cap = self.config.rl.loss.importance_cap
        if cap is not None:
            run_id = self._before if substep > 0 else self.run_id
            old = self.learner.forward(run_id, batch, self.loss, self.temperature, where="weighted")
            metrics |= {METRICS[name]: value for name, value in old.metrics.items() if name in OF_SAMPLER}
            self._refuse_mismatch(metrics, step, must_agree)
            batch, metrics["policy/capped_share"] = cap_importance(batch, old.logprobs, cap)
        result = self.learner.forward_backward(self.run_id, batch, self.loss, self.temperature, where="weighted")
        found = {METRICS[name]: value for name, value in result.metrics.items() if name in METRICS}
        metrics = {**found, **metrics, "loss/sum": result.loss_sum, **gap_by_position(sampled, result.logprobs)}
        if cap is None:
            self._refuse_mismatch(metrics, step, must_agree)
        if must_agree or self.loss.name not in ("ppo", "gspo"):  # whose clip may zero the gradient of every token
            self._must_move |= bool(np.any(batch.columns["advantages"] * batch.columns["weights"]))
        return result.logprobs, metrics

    def _finish(self, step: int, substep: int) -> dict[str, float]:
        """The optimizer step, if a gradient has accumulated."""
        optim = self.config.rl.optim.at(step - 1, self.config.rl.steps)
        metrics = {"policy/learning_rate": optim.learning_rate}
        if self.learner.runs.has_gradient(self.run_id):
            norm = self.learner.optim_step(self.run_id, optim)["grad_norm"]
            before, self._last_update = self._last_update, _update(step, optim, norm)
            if norm == 0.0 and self._must_move:
                raise DivergedError(
                    f"step {step}: rewards differ within groups, yet the gradient is exactly 0: the policy is so "
                    f"certain of every token that no gradient changes it. Before, it {before}; lower "
                    "rl.optim.learning_rate"
                )
            metrics["policy/grad_norm"] = norm
        every = self.config.rl.advantages.reference_refresh_steps
        if every and step % every == 0 and substep == self.config.rl.substeps - 1:
            self.learner.runs.copy(self.run_id, self._reference)
        budget = self.learner.token_budget
        if budget.tokens < budget.most:  # it was reduced after out-of-memory
            metrics["policy/token_budget"] = float(budget.tokens)
        return metrics | {"policy/version": float(self.learner.runs.version(self.run_id))}

    def reference(self, rollouts: Rollouts) -> Array:
        """(T,) float32 log-probabilities of the completions' tokens under the reference: the policy at the last refresh
        (rl.advantages.reference_refresh_steps), before any refresh the base with the adapter off."""
        tokens, offsets, sampled = join_prompts(rollouts)
        run_id = self._reference if self._has_reference else None
        return self.learner.logprobs(run_id, tokens, offsets, self.temperature, only=sampled)[sampled]

    def publish(self) -> WeightUpdate:
        """The current adapter for samplers. See ``AdapterPublisher.publish``.

        Raises:
            DivergedError: the policy's log-probabilities are not finite. Samplers keep the version before.
        """
        advice = (
            "Lower rl.optim.learning_rate, or bound the step with rl.optim.grad_clip_norm=1.0; before the first step, "
            "check the base and model.dtype"
        )
        return self._publisher.publish(self.run_id, self._last_update, advice)

    def probe(self) -> StartupProbe:
        """See ``AdapterPublisher.probe``."""
        return self._publisher.probe(self.run_id)

    def state_files(self) -> dict[str, bytes]:
        """The run after its last step, with optimizer state, as a packed checkpoint folder. Files of a reference other
        than the base have the prefix REFERENCE_PREFIX."""
        files = self._packed(self.run_id, with_optimizer=True)
        if self._has_reference:
            packed = self._packed(self._reference, with_optimizer=False)
            files |= {REFERENCE_PREFIX + name: content for name, content in packed.items()}
        return files

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Continue from ``state_files`` of a run of the same section on the same base. The next version published is
        compared with the base, as at a start, because the samplers' version is unknown here.

        Raises:
            CheckpointError: the files are damaged, of another base or of another section. The run is unchanged.
        """
        of_reference = {
            name.removeprefix(REFERENCE_PREFIX): content
            for name, content in files.items()
            if name.startswith(REFERENCE_PREFIX)
        }
        of_run = {name: content for name, content in files.items() if not name.startswith(REFERENCE_PREFIX)}
        with tempfile.TemporaryDirectory(prefix="rlsys-state-") as scratch:
            if of_reference:
                unpack_folder(of_reference, Path(scratch) / "reference")
            unpack_folder(of_run, Path(scratch) / "run")
            load_run(self.learner, self.run_id, Path(scratch) / "run", with_optimizer=OPTIMIZER in of_run)
            if self._has_reference:
                self.learner.runs.drop(self._reference)
            if of_reference:
                restore_run(self.learner, self._reference, Path(scratch) / "reference", with_optimizer=False)
        self._last_update = f"was restored at version {self.learner.runs.version(self.run_id)}"
        self._publisher.reset(self.run_id)

    def digest(self) -> str:
        """Hash of the fp32 adapter: equal on all ranks after every step."""
        return digest_tensors(sorted(self.learner.runs.state(self.run_id).weights.items()))

    @property
    def _has_reference(self) -> bool:
        return self._reference in self.learner.runs.ids

    @property
    def _needs_copy_before(self) -> bool:
        """Later substeps compare with the weights before the step's first update."""
        return self.config.rl.loss.importance_cap is not None and self.config.rl.substeps > 1

    def _packed(self, run_id: str, with_optimizer: bool) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory(prefix="rlsys-state-") as scratch:
            save_run(self.learner, run_id, Path(scratch) / "run", with_optimizer)
            return pack_folder(Path(scratch) / "run")

    def _refuse_mismatch(self, metrics: Mapping[str, float], step: int, must_agree: bool) -> None:
        found = metrics["policy/logprob_diff_mean"]
        bound = self.config.checks.max_mean_logprob_diff or self._publisher.bound
        if not np.isfinite(found):
            raise DivergedError(
                f"step {step}: learner or sampler gives sampled tokens no finite log-probability; the policy "
                f"{self._last_update}. This batch was not applied. Lower rl.optim.learning_rate, or bound the step "
                "with rl.optim.grad_clip_norm=1.0"
            )
        if must_agree and found > bound:
            raise MismatchError(
                f"step {step}: learner and sampler disagree on the tokens just sampled: mean |p - q| = {found:.3g} "
                f"nats, bound {bound:.3g} (max {metrics['policy/logprob_diff_max']:.3g}). The policy has not changed "
                "since they were sampled, so the two must agree; nothing was applied. Look at model.dtype and sampling "
                "options, or set checks.max_mean_logprob_diff if this engine is known to be that far from the learner"
            )


def _update(step: int, optim: AdamParams, norm: float) -> str:
    clipped = f"clipped at {optim.grad_clip_norm:g}" if optim.grad_clip_norm > 0 else "not clipped"
    return f"made step {step} at learning rate {optim.learning_rate:g} with a gradient norm of {norm:.3g}, {clipped}"


def cap_importance(batch: DatumBatch, old_logprobs_T: Array, cap: float) -> tuple[DatumBatch, float]:
    """(batch whose loss compares with p_old instead of q, share of tokens whose correction is capped).

    A token's weight is multiplied by min(exp(p_old - q), cap), and p_old takes the place of q: truncated importance
    sampling, Yao et al. 2025, fengyao.notion.site/off-policy-rl.
    """
    weights_T, q_T = batch.columns["weights"], batch.columns["logprobs"]
    counts_T = weights_T != 0
    gap_T = np.where(counts_T, old_logprobs_T.astype(np.float64) - q_T, 0.0)
    correction_T = np.exp(np.minimum(gap_T, math.log(cap)))  # exp of a value above the cap may overflow
    columns = {
        **batch.columns,
        "weights": (weights_T * correction_T).astype(np.float32),
        "logprobs": np.where(counts_T, old_logprobs_T, 0.0).astype(np.float32),
    }
    cut = int(np.count_nonzero(counts_T & (gap_T > math.log(cap))))
    share = cut / max(1, int(np.count_nonzero(counts_T)))
    return DatumBatch(batch.tokens, batch.targets, batch.offsets, columns), share


def gap_by_position(batch: DatumBatch, logprobs_T: Array) -> dict[str, float]:
    """Mean and max |p - q| of the tokens that count, by their position in the sequence, prompt included.

    Metrics `policy/logprob_diff_<first>_<end>_mean` and `_max`; a range without tokens has none. A difference that
    grows with the position is an error in positions, not noise.
    """
    counts_T = batch.columns["weights"] != 0
    position_T = (np.arange(len(logprobs_T)) - np.repeat(batch.offsets[:-1], batch.lengths) + 1)[counts_T]
    gap_T = np.abs(logprobs_T.astype(np.float64) - batch.columns["logprobs"])[counts_T]
    found: dict[str, float] = {}
    for first, end in pairwise(POSITION_RANGES):
        inside = gap_T[(position_T >= first) & (position_T < end)]
        if len(inside):
            name = f"policy/logprob_diff_{first}_{end}" if end < UNBOUNDED else f"policy/logprob_diff_{first}_up"
            found |= {f"{name}_mean": float(inside.mean()), f"{name}_max": float(inside.max())}
    return found


def join_prompts(rollouts: Rollouts) -> tuple[Array, Array, Array]:
    """Rollouts -> whole sequences: tokens of prompt + completion end to end, (R + 1,) offsets, and where the T sampled
    tokens lie among them.

    prompts ab, completions xy and z   ->   tokens a b x y a b z, offsets 0 4 7, sampled 2 3 6
    """
    prompt_lengths = np.diff(rollouts.prompt_offsets)[rollouts.group]
    lengths = np.stack([prompt_lengths, rollouts.lengths], axis=1)
    starts = offsets_of(lengths.reshape(-1))[:-1].reshape(-1, 2)
    tokens = np.empty(int(lengths.sum()), np.int32)
    of_prompt = spans(starts[:, 0], prompt_lengths)
    sampled = spans(starts[:, 1], rollouts.lengths)
    tokens[of_prompt] = rollouts.prompt_tokens[spans(rollouts.prompt_offsets[:-1][rollouts.group], prompt_lengths)]
    tokens[sampled] = rollouts.tokens
    return tokens, offsets_of(lengths.sum(axis=1)), sampled
