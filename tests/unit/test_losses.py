"""The losses against float64 numpy formulas written from the papers, and what is true of them by mathematics."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlsys.errors import LossError, MissingInputError
from rlsys.losses import metrics, resolve

RL = ("importance_sampling", "ppo", "cispo", "dro")
ALL = ("cross_entropy", *RL)
CONFIGS = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}),
    ("ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    ("ppo", {"clip_ratio": 0.3}),
    ("ppo", {"clip_ratio": 0.0}),
    ("cispo", {}),
    ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    ("cispo", {"beta": 1.0}),
    ("cispo", {"beta": 7.0, "clip_low_threshold": 0.0, "clip_high_threshold": 2.0}),
    ("dro", {}),
    ("dro", {"beta": 0.0}),
    ("dro", {"beta": 1.5}),
]


def draw(seed: int, n: int = 64) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Off policy on purpose, so that both clips bind; every fourth position is masked."""
    rng = np.random.default_rng(seed)
    p = -rng.exponential(1.0, n)
    weights = rng.choice([0.0, 1.0, 0.5, 2.0], n)
    weights[::4] = 0.0
    return p, {"weights": weights, "logprobs": p + rng.normal(0, 0.4, n), "advantages": rng.normal(0, 1, n)}


def torched(p: np.ndarray, columns: dict[str, np.ndarray], dtype: torch.dtype = torch.float64):
    tensors = {key: torch.tensor(np.asarray(value), dtype=dtype) for key, value in columns.items()}
    return torch.tensor(np.asarray(p), dtype=dtype, requires_grad=True), tensors


def run(name, config, p, columns, dtype=torch.float64):
    logp, tensors = torched(p, columns, dtype)
    values = resolve(name, config)(logp, tensors)
    (gradient,) = torch.autograd.grad(values.sum(), logp)
    return values.detach().numpy(), gradient.numpy()


def softplus(z):
    return np.logaddexp(0.0, z)


def bounds(config):
    if "clip_ratio" in config:
        return 1 - config["clip_ratio"], 1 + config["clip_ratio"]
    return config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)


def cispo_weight(x, config):
    low, high = bounds(config)
    if "beta" not in config:
        return np.clip(np.exp(x), low, high)
    beta, b = config["beta"], np.log(high)
    if low == 0:
        return np.exp(x - softplus(beta * (x - b)) / beta)
    a = np.log(low)
    return np.exp(a + softplus(beta * (x - a)) / beta - softplus(beta * (x - b)) / beta)


def golden(name, config, p, columns):
    """(values, gradients with respect to p) by closed form."""
    w = columns["weights"]
    if name == "cross_entropy":
        return -w * p, -w
    q, A = columns["logprobs"], columns["advantages"]
    x, r = p - q, np.exp(p - q)
    if name == "importance_sampling":
        return -w * r * A, -w * r * A
    if name == "ppo":
        clipped = np.clip(r, *bounds(config))
        flat = clipped * A < r * A
        return -w * np.minimum(r * A, clipped * A), np.where(flat, 0.0, -w * r * A)
    if name == "cispo":
        weight = cispo_weight(x, config)
        return -w * weight * p * A, -w * weight * A
    beta = config.get("beta", 0.05)
    return -w * (p * A - beta / 2 * x**2), -w * (A - beta * x)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients_are_the_published_formula(name, config, seed):
    p, columns = draw(seed, 200)
    values, gradient = run(name, config, p, columns)
    wanted_values, wanted_gradient = golden(name, config, p, columns)
    assert values.dtype == gradient.dtype == np.float64
    np.testing.assert_allclose(values, wanted_values, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_gradients_are_the_slopes_of_the_values(name, config):
    p, columns = draw(3)
    step = 1e-6

    def value(p):
        if name != "cispo":
            return golden(name, config, p, columns)[0]
        held = cispo_weight(draw(3)[0] - columns["logprobs"], config)  # the stop-gradient: the weight stays where it is
        return -columns["weights"] * held * p * columns["advantages"]

    slope = (value(p + step) - value(p - step)) / (2 * step)
    np.testing.assert_allclose(run(name, config, p, columns)[1], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_float32_is_the_same_loss_to_its_own_precision(name, config):
    p, columns = draw(4)
    values, gradient = run(name, config, p, columns, torch.float32)
    wanted_values, wanted_gradient = golden(name, config, p, columns)
    assert values.dtype == gradient.dtype == np.float32
    np.testing.assert_allclose(values, wanted_values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config", "p", "q", "A", "value", "gradient"),
    [
        ("ppo", {}, math.log(2.0), 0.0, 1.0, -1.2, 0.0),  # r = 2, above: the good token is clipped
        ("ppo", {}, math.log(2.0), 0.0, -1.0, 2.0, 2.0),  # the bad one is not
        ("ppo", {}, math.log(0.5), 0.0, 1.0, -0.5, -0.5),  # r = 1/2, below: the good token is not clipped
        ("ppo", {}, math.log(0.5), 0.0, -1.0, 0.8, 0.0),  # the bad one is
        ("cispo", {}, math.log(2.0), 0.0, 1.0, -1.2 * math.log(2.0), -1.2),  # clipped, and still teaches
        ("cispo", {}, math.log(0.5), 0.0, 1.0, -0.8 * math.log(0.5), -0.8),
        ("dro", {}, -1.0, -2.0, 0.0, 0.025, 0.05),  # a zero advantage does not silence the quadratic term
    ],
)
def test_worked_examples(name, config, p, q, A, value, gradient):
    columns = {"weights": np.ones(1), "logprobs": np.array([q]), "advantages": np.array([A])}
    values, gradients = run(name, config, np.array([p]), columns)
    assert values[0] == pytest.approx(value, abs=1e-12)
    assert gradients[0] == pytest.approx(gradient, abs=1e-12)


def test_published_formulas_that_average_yield_to_the_sum():
    """One published page averages importance_sampling and ppo; Tinker and MinT sum all losses, and so do we."""
    p, columns = draw(5)
    columns["weights"] = np.ones_like(p)
    ratio, A = np.exp(p - columns["logprobs"]), columns["advantages"]
    mean_is = -(ratio * A).mean()
    mean_ppo = -np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A).mean()
    assert run("importance_sampling", {}, p, columns)[0].sum() == pytest.approx(mean_is * len(p))
    assert run("ppo", {}, p, columns)[0].sum() == pytest.approx(mean_ppo * len(p))
    weight = np.clip(ratio, 0.8, 1.2)
    assert run("cispo", {}, p, columns)[0].sum() == pytest.approx(-(weight * p * A).sum())
    penalty = 0.5 * 0.05 * (p - columns["logprobs"]) ** 2
    assert run("dro", {}, p, columns)[0].sum() == pytest.approx(-(p * A - penalty).sum())


def test_cispo_holds_its_weight_constant():
    p, columns = draw(6)
    logp, tensors = torched(p, columns)
    (gradient,) = torch.autograd.grad(resolve("cispo")(logp, tensors).sum(), logp, create_graph=True)
    assert not gradient.requires_grad  # linear in p: the weight carries no graph


def test_weights_are_one_where_absent():
    p, columns = draw(7)
    ones = {**columns, "weights": np.ones_like(p)}
    bare = {key: value for key, value in columns.items() if key != "weights"}
    for name in RL:
        for got, wanted in zip(run(name, {}, p, bare), run(name, {}, p, ones), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", RL[:3])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_on_policy_three_losses_have_one_gradient(name, seed):
    p, columns = draw(seed)
    columns["logprobs"] = p.copy()
    np.testing.assert_allclose(run(name, {}, p, columns)[1], -columns["weights"] * columns["advantages"], rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 2**31), cut=st.integers(0, 64), scale=st.floats(-8, 8))
@settings(max_examples=25, deadline=None)
def test_the_loss_is_a_plain_weighted_sum(name, seed, cut, scale):
    """Splitting, reordering and scaling the weights do to value and gradient what they do to a sum."""
    p, columns = draw(seed)
    values, gradient = run(name, {}, p, columns)
    parts = [run(name, {}, p[s], {k: v[s] for k, v in columns.items()}) for s in (slice(cut), slice(cut, None))]
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), values, rtol=1e-13)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-13)
    order = np.random.default_rng(seed).permutation(len(p))
    shuffled = run(name, {}, p[order], {k: v[order] for k, v in columns.items()})
    np.testing.assert_allclose(shuffled[1], gradient[order], rtol=1e-13)
    scaled = run(name, {}, p, {**columns, "weights": columns["weights"] * scale})
    np.testing.assert_allclose(scaled[0], values * scale, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(scaled[1], gradient * scale, rtol=1e-12, atol=1e-300)


GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "config"), CONFIGS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_a_masked_position_never_matters(name, config, dtype, seed):
    p, columns = draw(seed)
    clean_values, clean_gradient = run(name, config, p, columns, dtype)
    masked = columns["weights"] == 0
    rng = np.random.default_rng(seed)
    dirty = {key: np.where(masked, rng.choice(GARBAGE, len(p)), value) for key, value in columns.items()}
    dirty["weights"] = columns["weights"]
    values, gradient = run(name, config, np.where(masked, rng.choice(GARBAGE, len(p)), p), dirty, dtype)
    np.testing.assert_array_equal(values[~masked], clean_values[~masked])
    np.testing.assert_array_equal(gradient[~masked], clean_gradient[~masked])
    assert (values[masked] == 0).all()
    assert (gradient[masked] == 0).all()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_a_zero_advantage_is_as_good_as_a_mask(name):
    """Prompt positions without weights have A = 0 and any filled-in q: exp(p - q) * 0 must not be NaN."""
    columns = {"logprobs": np.array([-99999.0, -1.0]), "advantages": np.array([0.0, 1.0])}
    values, gradient = run(name, {}, np.array([-1.0, -1.0]), columns, torch.float32)
    assert values[0] == gradient[0] == 0
    assert gradient[1] == -1


def test_an_overflow_that_counts_is_left_infinite_and_a_clipped_one_has_gradient_zero():
    p = np.array([-1.0, -1.0])
    columns = {"weights": np.ones(2), "logprobs": np.array([-200.0, -200.0]), "advantages": np.array([1.0, -1.0])}
    assert np.isinf(run("importance_sampling", {}, p, columns, torch.float32)[1]).all()
    values, gradient = run("ppo", {}, p, columns, torch.float32)
    assert values[0] == pytest.approx(-1.2)
    assert gradient[0] == 0
    assert np.isinf(gradient[1])  # a bad token that became likely is not clipped
    for config in ({}, {"beta": 1.0}, {"beta": 5.0, "clip_low_threshold": 0.0}):
        np.testing.assert_allclose(run("cispo", config, p, columns, torch.float32)[1], [-1.2, 1.2], rtol=1e-6)


def test_the_soft_clip_has_the_documented_value():
    columns = {"weights": np.ones(1), "logprobs": np.array([-1.0]), "advantages": np.ones(1)}
    assert run("cispo", {"beta": 1.0}, np.array([-1.0]), columns)[1][0] == pytest.approx(-0.98182, abs=5e-6)
    assert run("cispo", {"beta": 1.0}, np.array([-1.0]), columns)[1][0] == pytest.approx(-0.9 / (11 / 12), rel=1e-12)


@given(x=st.floats(-6, 6), low=st.sampled_from([0.0, 0.5, 0.8]), beta=st.floats(0.1, 1e6))
@settings(max_examples=100, deadline=None)
def test_the_soft_clip_tends_to_the_hard_clip(x, low, beta):
    config = {"clip_low_threshold": low}
    columns = {"logprobs": np.array([-8.0]), "advantages": np.ones(1)}
    hard = -run("cispo", config, np.array([x - 8.0]), columns)[1][0]
    soft = -run("cispo", {**config, "beta": beta}, np.array([x - 8.0]), columns)[1][0]
    assume(hard > 0)
    assert abs(math.log(soft / hard)) <= math.log(2) / beta + 1e-12


def test_clip_ratio_is_the_same_as_both_thresholds():
    wanted = resolve("ppo", {"clip_low_threshold": 0.75, "clip_high_threshold": 1.25})
    assert resolve("ppo", {"clip_ratio": 0.25}) == wanted
    assert (
        resolve("ppo") == resolve("ppo", {"clip_low_threshold": 0.8}) == resolve("ppo", {"clip_ratio": np.float64(0.2)})
    )


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "pppo",
            {},
            r"found 'pppo'; wanted one of cross_entropy, importance_sampling, ppo, cispo, dro, gspo; .*'ppo'\?",
        ),
        ("grpo", {}, "wanted one of cross_entropy"),
        (["ppo"], {}, r"found \['ppo'\]; wanted one of cross_entropy"),
        ("ppo", {"clip_hgh_threshold": 1.2}, r"'clip_hgh_threshold'.* of 'ppo' .*did you mean 'clip_high_threshold'\?"),
        ("ppo", {"beta": 1.0}, "it takes clip_low_threshold, clip_high_threshold, clip_ratio"),
        ("cross_entropy", {"beta": 1.0}, "it takes no parameters"),
        ("importance_sampling", {"clip_ratio": 0.2}, "it takes no parameters"),
        ("cispo", {"clip_ratio": 0.2}, "not a parameter of this loss"),
        ("ppo", {"clip_ratio": 0.2, "clip_low_threshold": 0.8}, "either clip_ratio or the two thresholds"),
        ("ppo", {"clip_ratio": 0.51}, r"found 0.51; wanted a number in \[0, 0.5\]"),
        ("ppo", {"clip_ratio": -0.1}, "found -0.1"),
        ("ppo", {"clip_low_threshold": 0.2, "clip_high_threshold": 0.28}, "bound the ratio itself"),
        ("cispo", {"clip_low_threshold": -0.1}, "found clip_low_threshold -0.1"),
        ("cispo", {"clip_low_threshold": 1.1}, "0 <= low <= 1"),
        ("cispo", {"beta": 0.0}, "wanted a number > 0, or no beta"),
        ("dro", {"beta": -1.0}, "found -1; wanted a number >= 0"),
        ("dro", {"beta": math.nan}, "found nan; wanted a finite number"),
        ("dro", {"beta": math.inf}, "found inf; wanted a finite number"),
        ("dro", {"beta": "0.1"}, "found '0.1'; wanted a finite number"),
        ("dro", {"beta": True}, "found True; wanted a finite number"),
    ],
)
def test_an_impossible_loss_is_refused_with_the_way_out(name, config, message):
    with pytest.raises(LossError, match=message):
        resolve(name, config)


def test_a_loss_says_what_it_requires_and_travels():
    assert resolve("cross_entropy").required == {"weights"}
    for name in RL:
        assert resolve(name).required == {"logprobs", "advantages"}
    for name, config in CONFIGS:
        assert pickle.loads(pickle.dumps(resolve(name, config))) == resolve(name, config)


def test_a_missing_column_is_named():
    with pytest.raises(MissingInputError, match=r"'ppo'.*found columns \['weights'\].*\['advantages', 'logprobs'\]"):
        resolve("ppo")(torch.zeros(2), {"weights": torch.ones(2)})


@pytest.mark.parametrize("name", RL)
def test_metrics_are_means_over_the_positions_that_count(name):
    p, columns = draw(8, 300)
    found = metrics(resolve(name), p, columns)
    keep = columns["weights"] != 0
    x, A = (p - columns["logprobs"])[keep], columns["advantages"][keep]
    r = np.exp(x)
    clipped = {
        "ppo": np.clip(r, 0.8, 1.2) * A < r * A,
        "cispo": (r < 0.8) | (r > 1.2),
    }.get(name, np.zeros(len(r)))
    wanted = {
        "ratio:mean": r.mean(),
        "ratio:max": r.max(),
        "clip_fraction:mean": clipped.mean(),
        "kl_k1:mean": (-x).mean(),
        "kl_k3:mean": (r - 1 - x).mean(),
        "logprob_diff:mean": np.abs(x).mean(),
        "logprob_diff:max": np.abs(x).max(),
    }
    assert found == pytest.approx(wanted, rel=1e-9)
    assert list(found) == list(wanted)
    assert all(type(value) is float for value in found.values())
    assert all(key.count(":") == 1 for key in found)
    assert name in ("importance_sampling", "dro") or 0 < found["clip_fraction:mean"] < 1


def test_metrics_do_not_see_masked_garbage_and_take_float32():
    p, columns = draw(9)
    clean = metrics(resolve("ppo"), p, columns)
    masked = columns["weights"] == 0
    dirty = {key: np.where(masked, np.nan, value) for key, value in columns.items()} | {"weights": columns["weights"]}
    assert metrics(resolve("ppo"), np.where(masked, -np.inf, p), dirty) == clean
    narrow = metrics(resolve("ppo"), p.astype(np.float32), {k: v.astype(np.float32) for k, v in columns.items()})
    assert narrow == pytest.approx(clean, rel=1e-4)


def test_metrics_of_nothing_are_zero():
    p, columns = draw(10)
    for empty in ({**columns, "weights": np.zeros_like(p)}, {key: value[:0] for key, value in columns.items()}):
        for name in ALL:
            assert set(metrics(resolve(name), p[: len(empty["weights"])], empty).values()) == {0.0}


def test_metrics_report_an_overflow_as_infinite_without_a_warning(recwarn):
    columns = {"weights": np.ones(1), "logprobs": np.array([-1000.0]), "advantages": np.ones(1)}
    found = metrics(resolve("ppo"), np.array([-1.0]), columns)
    assert found["ratio:max"] == math.inf
    assert found["logprob_diff:max"] == 999
    assert not [warning for warning in recwarn.list if issubclass(warning.category, RuntimeWarning)]


def test_metrics_of_cross_entropy_are_the_weighted_mean_nll():
    p, columns = np.array([-1.0, -2.0, -np.inf]), {"weights": np.array([1.0, 3.0, 0.0])}
    assert metrics(resolve("cross_entropy"), p, columns) == {"nll:mean": 7 / 4}


def test_without_weights_the_fillers_at_prompt_positions_do_not_count_in_the_figures() -> None:
    loss = resolve("ppo")
    prompt, sampled = np.array([-3.0, -7.0]), np.array([-1.0, -0.5])
    q, advantages = np.array([0.0, 0.0, -1.0, -0.5]), np.array([0.0, 0.0, 0.4, 0.4])
    found = metrics(loss, np.concatenate([prompt, sampled]), {"logprobs": q, "advantages": advantages})
    assert found["ratio:mean"] == 1.0 and found["logprob_diff:max"] == 0.0
