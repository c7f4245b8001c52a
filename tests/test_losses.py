"""Losses: against the laws they come from, against finite differences, far out, in float32, and learnt."""
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tformer_lab.data.skewed_t import SkewedGeneralizedT
from tformer_lab.losses import LOSSES, MAE, MSE, SGT, Cauchy, Huber, Quantile, UnnormalizedCauchy, UnnormalizedSGT, _log_gamma_ratio, log1p_power, make_loss

BUILT = {"mse": MSE(), "mae": MAE(), "huber": Huber(.7), "quantile": Quantile(.9), "quantile low": Quantile(1e-3), "cauchy": Cauchy(.3), "cauchy tiny": Cauchy(1e-4), "cauchy learnt": Cauchy(2., learn=True),
         "sgt heavy": SGT(15., q=1.001), "sgt normal": SGT(.707, q=100.), "sgt q=5": SGT(.707, q=5.), "sgt skew": SGT(2., -.6, 1.5, 3.), "sgt cusp": SGT(1., .3, .6, 5.), "sgt raw": SGT(1., .3, 1., .2, standardized=False),
         "sgt flat": SGT(1., 0., 12., 2.), "sgt light": SGT(1., .1, 2., 1e5), "sgt learnt": SGT(2., -.6, 1.5, 3., learn=True), "sgt learnt raw": SGT(1., .3, 1.2, .5, standardized=False, learn=("sigma", "q")),
         "unnormalized_cauchy": UnnormalizedCauchy(2.), "unnormalized_sgt": UnnormalizedSGT(.707, q=20.)}
losses = pytest.mark.parametrize("loss", BUILT.values(), ids=BUILT)


def slope(loss, residual):
    residual = residual.clone().requires_grad_()
    return torch.autograd.grad(loss.pointwise(residual).sum(), residual)[0]


# values

@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("parameters", [dict(q=1.001, sigma=15.), dict(q=100., sigma=.707), dict(q=1e5), dict(skew=.7, p=1.3, q=4.), dict(skew=-.4, p=.7, q=.5, standardized=False), dict(p=9., q=3.)])
def test_sgt_is_the_negative_log_density_of_its_law(parameters, learn):
    loss, x = SGT(**parameters, learn=learn), np.r_[-np.geomspace(1e6, 1e-9, 31), 0, np.geomspace(1e-9, 1e6, 31)]
    given = {"lam" if name == "skew" else name: value for name, value in parameters.items()}
    expected = -SkewedGeneralizedT(**given).logpdf(x)
    np.testing.assert_allclose(loss.pointwise(torch.from_numpy(x)).detach(), expected, rtol=1e-5 if learn else 1e-9, atol=1e-4 if learn else 1e-9)  # what is learnt is stored in float32
    assert loss.law.entropy() == pytest.approx(SkewedGeneralizedT(**given).entropy(), abs=1e-4)


@pytest.mark.parametrize("a", [-20., -1., -.01, .3, 1., 20.])
def test_ratios_of_gamma_functions_and_their_slopes_are_right_for_any_q(a):
    for q in (q for q in (.05, .3, 2., 10., 24.9, 25., 26., 100., 1e4, 1e8, 1e12, 1e16, 1e100) if q + a > 0):
        log_q, shift = torch.tensor(math.log(q), dtype=torch.float64, requires_grad=True), torch.tensor(a, dtype=torch.float64, requires_grad=True)
        value = _log_gamma_ratio(log_q.exp(), shift)
        slopes = torch.autograd.grad(value, (log_q, shift))
        with mpmath.workdps(150):
            exact = mpmath.mpf(log_q.exp().item())
            psi = mpmath.digamma(exact + a)
            expected = [float(mpmath.loggamma(exact + a) - mpmath.loggamma(exact) - a * mpmath.log(exact)), float(exact * (psi - mpmath.digamma(exact)) - a), float(psi - mpmath.log(exact))]
        np.testing.assert_allclose([x.item() for x in (value, *slopes)], expected, rtol=1e-11, atol=1e-13, err_msg=f"q = {q}")


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_a_law_that_becomes_normal_becomes_the_normal_one(dtype, learn):
    r = torch.linspace(-5, 5, 11, dtype=dtype)
    for q in (1e8, 1e10, 1e12, 1e14, 1e20):
        loss = SGT(1.5, q=q, learn=learn)
        expected = -torch.distributions.Normal(0., 1.5).log_prob(r)
        np.testing.assert_allclose(loss.pointwise(r).detach(), expected, atol=1e-7 if dtype == torch.float64 and not learn else 3e-6, err_msg=f"q = {q}")
        if learn:
            loss(torch.zeros_like(r), r).backward()
            assert loss.free["sigma"].grad.item() == pytest.approx(1 - (r / 1.5).square().mean().item(), abs=1e-5) and abs(loss.free["q"].grad.item()) < 1e-5


def test_cauchy_and_the_unnormalized_losses_are_what_their_names_say():
    r = torch.linspace(-20, 20, 81, dtype=torch.float64)
    np.testing.assert_allclose(Cauchy(.3).pointwise(r), -torch.distributions.Cauchy(0., torch.tensor(.3, dtype=torch.float64)).log_prob(r), rtol=1e-12)
    np.testing.assert_allclose(UnnormalizedCauchy(2.).pointwise(r), 2 * torch.log1p(r**2 / 2), rtol=1e-12)
    proper, bare = SGT(.7, .2, 2., 5.), UnnormalizedSGT(.7, .2, 2., 5.)
    difference = proper.pointwise(r) - bare.pointwise(r)
    np.testing.assert_allclose(difference, proper.law.log_norm, rtol=1e-12)
    assert bare.pointwise(torch.tensor(-proper.law.m, dtype=torch.float64)) == pytest.approx(0, abs=1e-12)


def test_the_simple_losses_agree_with_torchs():
    f, y = torch.randn(2, 4, 60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(MSE()(f, y), torch.nn.functional.mse_loss(f, y))
    torch.testing.assert_close(MAE()(f, y), torch.nn.functional.l1_loss(f, y))
    torch.testing.assert_close(Huber(.7)(f, y), torch.nn.functional.huber_loss(f, y, delta=.7))
    assert Quantile(.9)(f, f + 1) == pytest.approx(.9) and Quantile(.9)(f + 1, f) == pytest.approx(.1)  # too low a forecast costs more


def test_a_positive_skew_forgives_targets_above_the_forecast():
    assert SGT(skew=.6, q=3.).pointwise(torch.tensor(4.)) < SGT(skew=.6, q=3.).pointwise(torch.tensor(-4.))


# gradients

@losses
def test_slopes_are_those_of_finite_differences(loss):
    r = torch.from_numpy(np.r_[-np.geomspace(1e3, 1e-2, 12), np.geomspace(1e-2, 1e3, 12)])
    r = r[[min(abs(float(x) - kink) for kink in (*loss.kinks, 1e9)) > 1e-3 for x in r]]
    step = 1e-5 * r.abs()
    with torch.no_grad(): difference = (loss.pointwise(r + step) - loss.pointwise(r - step)) / (2 * step)
    scale = loss.pointwise(r).detach().abs() / r.abs()  # what rounding does to the difference
    assert ((slope(loss, r) - difference).abs() <= 1e-5 * difference.abs() + 1e-8 * scale + 1e-9).all()


@losses
def test_at_its_kinks_and_at_zero_the_slope_is_finite_and_within_the_one_sided_ones(loss):
    for at in {0., *loss.kinks}:
        for dtype in (torch.float32, torch.float64):
            x = torch.tensor([at, at - 1e-3, at + 1e-3], dtype=dtype)
            here, left, right = slope(loss, x).tolist()
            assert math.isfinite(here) and min(left, right) - 2e-2 <= here <= max(left, right) + 2e-2


@pytest.mark.parametrize("standardized", [True, False])
def test_slopes_of_learnt_parameters_are_those_of_finite_differences(standardized):
    r = torch.from_numpy(np.random.default_rng(0).standard_t(2, (50, 1, 1)))
    loss = SGT(1.3, -.4, 1.6, 2.5, standardized, learn=True).double()
    loss(0 * r, r).backward()
    for name, parameter in loss.free.items():
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad(): parameter += step
            values.append(loss(0 * r, r).item())
            with torch.no_grad(): parameter -= step
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-8), name


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.floats(0, 1e30), st.floats(.05, 30))
def test_log1p_power_is_right_for_any_size(a, p):
    x = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    value = log1p_power(x, p)
    exact = np.logaddexp(0, p * np.log(a)) if a > 0 else 0.
    assert value.item() == pytest.approx(exact, rel=1e-12, abs=1e-300)
    value.backward()
    assert x.grad.isfinite().all() or a < 1e-200
    power = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    log1p_power(x.detach(), power).backward()
    assert power.grad.isfinite() or a < 1e-200


# float32

@losses
def test_float32_is_right_from_tiny_residuals_to_a_million(loss):
    r = np.r_[-np.geomspace(1e6, 1e-6, 49), 0, np.geomspace(1e-6, 1e6, 49)].astype(np.float32)
    with torch.no_grad(): exact, found = (loss.pointwise(torch.from_numpy(r.astype(dtype))) for dtype in (np.float64, np.float32))
    assert found.dtype == torch.float32 and found.isfinite().all()
    wide = np.abs(exact.numpy()) + (1 if loss.growth == 0 else 0)  # a logarithm's constant rounds like a number near 1
    assert (np.abs(found.numpy() - exact.numpy()) <= 1e-5 * wide).all()
    assert slope(loss, torch.from_numpy(r)).isfinite().all()
    steep, slow = slope(loss, torch.from_numpy(r.astype(np.float64))).numpy(), slope(loss, torch.from_numpy(r)).numpy()
    away = np.min([np.abs(r - kink) for kink in (*loss.kinks, 1e9)], axis=0) > 1e-3
    np.testing.assert_allclose(slow[away], steep[away], rtol=2e-3, atol=1e-6)


@losses
def test_a_huge_residual_neither_overflows_nor_poisons_the_others(loss):
    r = torch.tensor([1e6, -1e6, .5], requires_grad=True)
    loss(torch.zeros(3), r).backward()
    assert r.grad.isfinite().all()
    if loss.growth == 0: assert r.grad[:2].abs().max() < .1  # logarithms let go


# learning

def test_learning_recovers_the_law_and_the_loss_its_entropy():
    law = SkewedGeneralizedT(0., 3., -.5, 2., 4.)
    sample = torch.from_numpy(law.sample(np.random.default_rng(0), (40_000, 1, 1)))
    loss = SGT(learn=True)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=80, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        value = loss(torch.zeros_like(sample), sample)
        value.backward()
        return value
    optimizer.step(closure)
    assert closure().item() == pytest.approx(law.entropy(), abs=.02) and closure().item() < -law.logpdf(sample.numpy()).mean() + 1e-6
    assert loss.law.sigma == pytest.approx(3, rel=.05) and loss.law.lam == pytest.approx(-.5, abs=.05)


def test_what_is_fixed_is_no_parameter_and_what_is_learnt_stays_in_its_range():
    loss = SGT(2., .1, 2., 3., learn=("skew", "q"))
    assert set(loss.free) == {"skew", "q"} and loss.learns and not SGT().learns and not list(SGT().parameters()) and not SGT().state_dict()
    with torch.no_grad():
        for value in loss.free.values(): value.fill_(-6.)
    assert -1 < loss.law.lam < 0 and loss.law.p * loss.law.q > 2 and loss.law.sigma == pytest.approx(2) and loss.pointwise(torch.linspace(-5, 5, 9)).isfinite().all()
    other = SGT(2., .1, 2., 3., learn=("skew", "q"))
    other.load_state_dict(loss.state_dict())
    assert other.law == loss.law


def test_the_best_constant_of_each_loss_is_the_one_it_is_known_for():
    x = torch.from_numpy(np.random.default_rng(0).gamma(2., size=2001))
    grid = torch.linspace(0, 6, 1201, dtype=torch.float64)
    def best(loss): return grid[torch.stack([loss.pointwise(x - c).mean() for c in grid]).argmin()].item()
    assert best(MSE()) == pytest.approx(x.mean().item(), abs=.006)
    assert best(MAE()) == pytest.approx(x.median().item(), abs=.02)
    for share in (.1, .5, .95): assert best(Quantile(share)) == pytest.approx(x.quantile(share).item(), abs=.05)
    assert best(Huber(1e4)) == pytest.approx(best(MSE())) and best(Huber(1e-4)) == pytest.approx(best(MAE()), abs=.02)


# refusals

@pytest.mark.parametrize("name, wrong, says", [("huber", dict(delta=0.), "delta"), ("huber", dict(delta=math.inf), "delta"), ("cauchy", dict(scale=-1.), "scale"), ("cauchy", dict(scale=math.nan), "scale"), ("quantile", dict(quantile=0.), "quantile"),
                                               ("quantile", dict(quantile=95), "quantile"), ("unnormalized_cauchy", dict(gamma=0), "gamma"), ("sgt", dict(sigma=0.), "sigma"), ("sgt", dict(skew=-1.), "skew"), ("sgt", dict(p=0.), "p is"),
                                               ("sgt", dict(q=1.), "standardized=False"), ("sgt", dict(q=math.inf), "mse"), ("sgt", dict(learn="lam"), "skew"), ("unnormalized_sgt", dict(learn=True, sigma=-1.), "sigma"), ("unnormalized_sgt", dict(learn="sigma"), "nothing"),
                                               ("sgt", dict(sgima=1.), "did you mean 'sigma'"), ("sgtt", {}, "did you mean 'sgt'"), ("mse", dict(delta=1.), "no parameter")])
def test_wrong_names_and_values_are_refused_with_what_would_be_right(name, wrong, says):
    with pytest.raises(ValueError, match=says): make_loss(name, **wrong)


@losses
def test_shapes_that_would_be_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match="shapes"): loss(torch.zeros(4, 60, 1), torch.zeros(4, 60))
    assert loss(torch.zeros(4, 60, 1), torch.ones(4, 60, 1)).shape == ()


def test_every_loss_can_be_made_by_its_name():
    for name, kind in LOSSES.items(): assert type(make_loss(name)) is kind
    assert [name for name, kind in LOSSES.items() if kind.proper] == ["cauchy", "sgt"]
