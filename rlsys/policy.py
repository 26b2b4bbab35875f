"""One run's policy on a learner: an update from a batch of datums, and the adapter as something samplers can attest."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlsys import losses
from rlsys.base import pack_folder, unpack_folder
from rlsys.checkpoints import load_run, save_run
from rlsys.config import JobConfig
from rlsys.datums import DatumBatch
from rlsys.errors import DivergedError, MismatchError
from rlsys.learner import Learner
from rlsys.problems import ProblemSet
from rlsys.rollouts import Rollouts, offsets_of, spans
from rlsys.types import AdamParams, Array
from rlsys.weights import WeightUpdate, digest_tensors

METRICS = {
    "ratio:mean": "policy/ratio_mean",
    "ratio:max": "policy/ratio_max",
    "clip_fraction:mean": "policy/clip_fraction",
    "kl_k1:mean": "policy/kl_k1",
    "kl_k3:mean": "policy/kl_k3",
    "logprob_diff:mean": "policy/logprob_diff_mean",
    "logprob_diff:max": "policy/logprob_diff_max",
}
CANARY_TOKENS = 64  # enough for a steady mean, little beside a step


class Policy:
    """A run's adapter with its loss, its optimizer settings and its canary.

    ``canary_tokens``: (C,) int32, a fixed sequence whose log-probabilities tell one version from the next. Of several
    learner ranks each has a policy, and all make the same calls; ``state_files`` and ``digest`` only look.
    """

    def __init__(self, learner: Learner, config: JobConfig, canary_tokens: Array) -> None:
        self.learner = learner
        self.config = config
        self.run_id = config.run.name
        self.loss = losses.resolve(config.rl.loss.name, config.rl.loss.params)
        self.temperature = config.rl.sampling.temperature
        self.canary_tokens = canary_tokens
        learner.create_run(self.run_id, config.lora, config.run.seed)
        self._last_update = "made no step yet"
        self._canary_published = self._canary(None)  # before anything is published, the base stands for "previous"

    def step(self, batch: DatumBatch, step: int) -> dict[str, float]:
        """forward_backward and one AdamW step. A batch without datums (all groups agreed) changes nothing.

        Raises:
            DivergedError: log-probabilities are not finite, or groups disagree and yet the gradient is exactly 0.
            MismatchError: mean |p - q| is above ``checks.max_mean_logprob_diff``. No update has happened since q was
                sampled, so p must equal q: this is the check at learning rate 0, made every step.
            GradientError: the gradient is not finite; the weights are as before.
        """
        optim = self.config.rl.optim.at(step - 1)
        facts = {"policy/learning_rate": optim.learning_rate}
        if batch.num_datums == 0:
            return facts | {"policy/version": float(self.learner.version(self.run_id))}
        result = self.learner.forward_backward(self.run_id, batch, self.loss, temperature=self.temperature)
        facts |= {METRICS[name]: value for name, value in result.metrics.items() if name in METRICS}
        facts["loss/sum"] = result.loss_sum
        self._refuse_mismatch(facts, step)
        norm = self.learner.optim_step(self.run_id, optim)["grad_norm"]
        before, self._last_update = self._last_update, _update(step, optim, norm)
        if norm == 0.0 and np.any(batch.columns["advantages"] * batch.columns["weights"]):
            raise DivergedError(
                f"step {step}: rewards differ within groups, yet the gradient is exactly 0: the policy is so certain "
                f"of every token that nothing moves it any more. Before, it {before}; lower rl.optim.learning_rate"
            )
        facts["policy/grad_norm"] = norm
        facts["policy/version"] = float(self.learner.version(self.run_id))
        return facts

    def reference(self, rollouts: Rollouts) -> Array:
        """(T,) float32 log-probabilities of the completions' tokens under the base, the adapter being off."""
        tokens, offsets, sampled = join_prompts(rollouts)
        return self.learner.logprobs(None, tokens, offsets, temperature=self.temperature)[sampled]

    def publish(self) -> WeightUpdate:
        """The adapter as it is now, with the canary under it and under the version published before.

        Raises:
            DivergedError: the policy's log-probabilities are not finite; samplers keep the version before.
        """
        current = self._canary(self.run_id)
        if not np.isfinite(current).all():
            raise DivergedError(
                f"the policy gives {np.count_nonzero(~np.isfinite(current))} of {len(current)} canary tokens no finite "
                f"log-probability; it {self._last_update}. Nothing of it reached a sampler. Lower "
                "rl.optim.learning_rate, or bound the step with rl.optim.grad_clip_norm=1.0; without any step, look at "
                "the base and model.dtype"
            )
        previous, self._canary_published = self._canary_published, current
        snapshot = self.learner.snapshot(self.run_id, self.config.model.dtype)
        return WeightUpdate(snapshot, self.canary_tokens, current, previous)

    def probe(self) -> WeightUpdate:
        """An adapter with a large B: a sampler whose forward pass ignores adapters cannot follow it."""
        snapshot, new = self.learner.probe(self.run_id, self.config.model.dtype, self.canary_tokens)
        return WeightUpdate(snapshot, self.canary_tokens, new[1:], self._canary(None))

    def state_files(self) -> dict[str, bytes]:
        """The run up to its last step, optimizer included, as a packed checkpoint folder."""
        with tempfile.TemporaryDirectory(prefix="rlsys-state-") as scratch:
            save_run(self.learner, self.run_id, Path(scratch) / "run", with_optimizer=True)
            return pack_folder(Path(scratch) / "run")

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Go on from ``state_files`` of a run of the same section on the same base. What is published next is told from
        the base, as at a start: which version the samplers hold, if any, is not known here.

        Raises:
            CheckpointError: the files are damaged, of another base or of another section; the run is as before.
        """
        with tempfile.TemporaryDirectory(prefix="rlsys-state-") as scratch:
            unpack_folder(files, Path(scratch) / "run")
            load_run(self.learner, self.run_id, Path(scratch) / "run", with_optimizer=True)
        self._last_update = f"was restored at version {self.learner.version(self.run_id)}"
        self._canary_published = self._canary(None)

    def digest(self) -> str:
        """A hash of the adapter as it is trained (fp32): equal on all ranks after every step."""
        return digest_tensors(sorted(self.learner.run_state(self.run_id).weights.items()))

    def _canary(self, run_id: str | None) -> Array:
        return self.learner.logprobs(run_id, self.canary_tokens, np.array([0, len(self.canary_tokens)]))[1:]

    def _refuse_mismatch(self, facts: Mapping[str, float], step: int) -> None:
        found, bound = facts["policy/logprob_diff_mean"], self.config.max_mean_logprob_diff
        if not np.isfinite(found):
            raise DivergedError(
                f"step {step}: learner or sampler gives tokens just sampled no finite log-probability; the policy "
                f"{self._last_update}. Nothing was applied. Lower rl.optim.learning_rate, or bound the step with "
                "rl.optim.grad_clip_norm=1.0"
            )
        if found > bound:
            raise MismatchError(
                f"step {step}: learner and sampler disagree on the tokens just sampled: mean |p - q| = {found:.3g} "
                f"nats, bound {bound:.3g} (max {facts['policy/logprob_diff_max']:.3g}). The policy has not changed "
                "since they were sampled, so the two must agree; nothing was applied. Look at model.dtype and sampling "
                "options, or set checks.max_mean_logprob_diff if this engine is known to be that far from the learner"
            )


def _update(step: int, optim: AdamParams, norm: float) -> str:
    clipped = f"clipped at {optim.grad_clip_norm:g}" if optim.grad_clip_norm > 0 else "not clipped"
    return f"made step {step} at learning rate {optim.learning_rate:g} with a gradient norm of {norm:.3g}, {clipped}"


def canary(problems: ProblemSet) -> Array:
    """(C,) int32: the first prompts, up to CANARY_TOKENS; any fixed text of the task's kind would do."""
    return problems.prompt_tokens[:CANARY_TOKENS]


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
