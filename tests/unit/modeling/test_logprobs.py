"""Chunked log-probabilities are those of one whole log-softmax, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlsys.modeling import logprobs
from rlsys.modeling.logprobs import LogitTransform, chunk_rows, logprobs_and_entropy, token_logprobs

T, H, V = 23, 12, 37


class Adapted(nn.Module):
    """A frozen output layer with a low-rank adapter on it."""

    out_features = V

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(3, H, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(V, 3, dtype=base.weight.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base(hidden) + hidden @ self.a.T @ self.b.T
        return out


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    linear = nn.Linear(H, V, bias=kind == "frozen with bias").to(dtype)
    return Adapted(linear) if kind == "adapted" else linear.requires_grad_(kind == "trained")


@pytest.mark.parametrize("kind", ["frozen", "frozen with bias", "trained", "adapted"])
@pytest.mark.parametrize("chunk", [1, 7, T, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_do_not_depend_on_the_chunk(
    kind: str, chunk: int, temperature: float, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    head = make(kind, dtype)
    hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (T,))
    upstream = torch.randn(T, dtype=dtype)
    wanted_from = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    whole = torch.log_softmax(head(hidden) / temperature, -1)[torch.arange(T), targets]
    found = token_logprobs(head, hidden, targets, temperature, chunk)
    assert (found - whole).norm() <= bound * whole.norm()
    for got, right in zip(
        torch.autograd.grad(found, wanted_from, upstream),
        torch.autograd.grad(whole, wanted_from, upstream),
        strict=True,
    ):
        assert (got - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("kind", ["frozen", "frozen with bias", "trained", "adapted"])
@pytest.mark.parametrize("chunk", [7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_entropy_is_exact_at_any_temperature_and_leaves_log_probabilities_as_they_are(
    kind: str, chunk: int, temperature: float, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    head = make(kind, dtype)
    hidden = (3 * torch.randn(T, H, dtype=dtype)).requires_grad_()
    targets = torch.randint(V, (T,))
    whole = torch.distributions.Categorical(logits=head(hidden) / temperature).entropy()
    found, entropy = logprobs_and_entropy(head, hidden, targets, temperature, chunk)
    assert (entropy - whole).norm() <= bound * whole.norm()
    assert not entropy.requires_grad
    plain = token_logprobs(head, hidden, targets, temperature, chunk)
    assert torch.equal(found, plain)
    (slope,) = torch.autograd.grad(found.sum(), hidden)
    (wanted,) = torch.autograd.grad(plain.sum(), hidden)
    assert torch.equal(slope, wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_blocks_of_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    torch.manual_seed(0)
    head, hidden, targets = make("frozen", torch.float32), torch.randn(T, H), torch.randint(V, (T,))
    hidden.requires_grad_()
    whole, entropy = logprobs_and_entropy(head, hidden, targets, temperature, 10)
    (slope,) = torch.autograd.grad(whole.sum(), hidden)
    monkeypatch.setattr(logprobs, "BLOCK", 3 * V)
    found, again = logprobs_and_entropy(head, hidden, targets, temperature, 10)
    torch.testing.assert_close((found, again), (whole, entropy))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden)[0], slope)


def test_a_frozen_layer_gets_no_weight_gradient_and_none_is_computed() -> None:
    seen: set[tuple[int, ...]] = set()

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in own:
                seen.add(tuple(out.shape))
            return out

    head = make("frozen with bias", torch.float32)
    own = {weight.untyped_storage().data_ptr() for weight in head.parameters()}
    hidden = torch.randn(T, H, requires_grad=True)
    with Shapes():
        token_logprobs(head, hidden, torch.randint(V, (T,)), 1.0, 8).sum().backward()
    assert all(weight.grad is None for weight in head.parameters())
    assert seen and not seen & {(V, H), (H, V), (V,)}


def most_alive(work: Callable[[], object]) -> int:
    """The most bytes of tensors, made in `work`, that lived at one time, as torch's allocator counted them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize("entropy", [False, True])
def test_memory_grows_neither_with_the_length_nor_with_the_vocabulary(
    kind: str, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 200_000)
    monkeypatch.setattr(logprobs, "BLOCK", 10_000)
    peaks = {}
    for length, vocab in ((250, 1000), (2000, 1000), (250, 8000)):
        head = nn.Linear(4, vocab, bias=False).requires_grad_(kind == "trained")
        hidden, targets = torch.randn(length, 4, requires_grad=True), torch.randint(vocab, (length,))

        def work(head: nn.Module = head, hidden: Tensor = hidden, targets: Tensor = targets) -> None:
            logprobs_and_entropy(head, hidden, targets, 0.7, 10**6)[0].sum().backward()

        def bare(head: nn.Module = head, hidden: Tensor = hidden, targets: Tensor = targets) -> None:
            token_logprobs(head, hidden, targets, 0.7, 10**6).sum().backward()

        bare()  # gradients of weights exist from now on
        peaks[length, vocab] = most_alive(work if entropy else bare)
    of_rows, of_weight = 4 * 4 * (2000 - 250), 4 * 4 * (8000 - 1000)  # (T, H) and (V, H) tensors, not (T, V)
    assert peaks[2000, 1000] <= peaks[250, 1000] + 6 * of_rows
    assert peaks[250, 8000] <= 1.2 * peaks[250, 1000] + 3 * of_weight
    assert peaks[2000, 1000] < 0.25 * 4 * 2000 * 1000


def test_rows_of_a_chunk_follow_from_its_bytes() -> None:
    assert chunk_rows(32_000, torch.bfloat16, 10**6) == logprobs.CHUNK_BYTES // 64_000
    assert chunk_rows(32_000, torch.float32, 10**6) == logprobs.CHUNK_BYTES // 128_000
    assert chunk_rows(32_000, torch.float32, 100) == 100
    assert chunk_rows(10**9, torch.float32, 100) == 1


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind: str) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                    self.rows = max(self.rows, tensor.shape[0])
            return out

    head = make(kind, torch.float32)
    hidden = torch.randn(100, H, requires_grad=True)
    with Largest() as largest:
        token_logprobs(head, hidden, torch.randint(V, (100,)), 1.0, 15).sum().backward()
    assert largest.rows == 15


def test_a_certain_token_keeps_its_small_gradient() -> None:
    """Near p = 1 the slope 1 - p is far below one; as a difference of products it would be lost first."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False).requires_grad_(False)
    hidden = (10.0 * head.weight[:1] / head.weight[0].norm() ** 2).requires_grad_()
    targets = torch.zeros(1, dtype=torch.int64)
    (found,) = torch.autograd.grad(token_logprobs(head, hidden, targets, 1.0, 8), hidden)
    exact = hidden.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(torch.log_softmax(exact @ head.weight.double().T, -1)[:, 0], exact)
    assert right.norm() > 0
    assert (found.double() - right).norm() <= 1e-3 * right.norm()


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False).bfloat16().requires_grad_(False)
    hidden, targets = torch.randn(T, H).bfloat16(), torch.randint(V, (T,))
    found = token_logprobs(head, hidden, targets, 1.0, 8)
    assert found.dtype == torch.float32
    right = torch.log_softmax(head(hidden).float(), -1)[torch.arange(T), targets]
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["frozen", "frozen with bias", "trained", "adapted"])
@pytest.mark.parametrize("transform", [LogitTransform(scale=0.3), LogitTransform(cap=1.7)], ids=["scale", "cap"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_scale_or_a_cap_of_the_logits_is_in_values_gradients_and_entropy(
    kind: str, transform: LogitTransform, dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    head = make(kind, dtype)
    hidden = (2 * torch.randn(T, H, dtype=dtype)).requires_grad_()
    targets, upstream = torch.randint(V, (T,)), torch.randn(T, dtype=dtype)
    logits = head(hidden)
    logits = transform.scale * logits if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)
    logp = torch.log_softmax(logits / 0.6, -1)
    whole = logp[torch.arange(T), targets]
    found, entropy = logprobs_and_entropy(head, hidden, targets, 0.6, 7, transform)
    assert (found - whole).norm() <= bound * whole.norm()
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1).detach(), rtol=10 * bound, atol=10 * bound)
    wanted_from = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    for got, right in zip(
        torch.autograd.grad(found, wanted_from, upstream),
        torch.autograd.grad(whole, wanted_from, upstream),
        strict=True,
    ):
        assert (got - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("transform", [LogitTransform(scale=0.3), LogitTransform(cap=1.7)], ids=["scale", "cap"])
def test_in_half_precision_it_rounds_as_transformers_does(transform: LogitTransform) -> None:
    torch.manual_seed(0)
    head, hidden = make("frozen", torch.bfloat16), torch.randn(T, H, dtype=torch.bfloat16)
    targets = torch.randint(V, (T,))
    logits = head(hidden)
    if transform.cap is None:
        logits = logits * transform.scale
    else:
        logits = logits / transform.cap
        logits = torch.tanh(logits) * transform.cap
    wanted = torch.log_softmax(logits.float(), -1)[torch.arange(T), targets]
    torch.testing.assert_close(token_logprobs(head, hidden, targets, 1.0, 7, transform), wanted, rtol=1e-6, atol=1e-6)
