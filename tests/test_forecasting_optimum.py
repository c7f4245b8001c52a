"""What no forecast can beat: against brute-force Monte Carlo and regression, against closed forms, and as a bound of what forecasters reach."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from tformer_lab.data.series import PRESETS, SmoothedNoise, make_windows, smoothing_matrix
from tformer_lab.data.skewed_t import SkewedGeneralizedT
from tformer_lab.losses import MAE, MSE, SGT, Cauchy, Huber, Quantile, UnnormalizedCauchy, UnnormalizedSGT, make_loss
from tformer_lab.theory.forecasting import (expected_forecast_loss, expected_loss, forecast_optimum, horizon_law, informed_losses, least_expected_loss, linear_forecast,
                                            linear_reference, mixture_entropy, step_ahead_sd)

LOSSES = {"mse": MSE(), "mae": MAE(), "huber": Huber(.2), "quantile": Quantile(.8), "cauchy": Cauchy(.1), "narrow cauchy": Cauchy(1e-3), "sgt": SGT(.3, q=1.5), "skewed sgt": SGT(.3, .6, 1.5, 3.), "cusp": SGT(.3, -.3, .7, 5.),
          "unnormalized_cauchy": UnnormalizedCauchy(2.), "unnormalized_sgt": UnnormalizedSGT(.7, q=20.)}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
NORMAL = SmoothedNoise(SkewedGeneralizedT(sigma=.707, q=math.inf))
SHORT = SmoothedNoise(SkewedGeneralizedT(.4, .8, q=math.inf), "cosine_gaussian", 9, 1.5, 8.)
IN, OUT = 14, 5


@pytest.fixture(scope="module")
def regression():
    """100,000 short series, and the residuals of the horizon regressed on the window: what a forecaster learns from data alone."""
    series = SHORT.sample(100_000, np.random.default_rng(0), IN + OUT)[..., 0]
    design = np.c_[np.ones(len(series)), series[:, :IN]]
    coefficients, *_ = np.linalg.lstsq(design, series[:, IN:])
    return coefficients, series[:, IN:] - design @ coefficients


def test_the_law_is_what_a_regression_finds(regression):
    coefficients, residuals = regression
    law = horizon_law(SHORT, IN, OUT)
    np.testing.assert_allclose(residuals.std(0), law.sd, rtol=.012)
    np.testing.assert_allclose(coefficients[0], law.offset, atol=.04)
    np.testing.assert_allclose(coefficients[1:].T, law.weights, atol=.1)


@losses
def test_the_optimum_is_the_best_loss_that_brute_force_finds(regression, loss):
    """Residuals of the regression, shifted by the best constant at each step: within the chance of 100,000 draws of the quadrature."""
    found, error = [], []
    for residual in torch.from_numpy(regression[1]).T:
        sd = residual.std().item()
        costs = [loss.pointwise(residual - c) for c in (np.linspace(-1.5, 1.5, 25) * sd if not loss.symmetric else [0.])]
        best = min(costs, key=lambda cost: cost.mean().item())
        found.append(best.mean().item())
        error.append(best.std().item() / math.sqrt(len(best)))
    optimum = forecast_optimum(loss, SHORT, IN, OUT)
    assert optimum.kind == "exact" and optimum.error == 0
    assert optimum.value == pytest.approx(np.mean(found), abs=5 * np.mean(error) + 2e-3 * abs(np.mean(found)))


def test_the_law_survives_a_condition_that_a_covariance_does_not():
    """Against 60 digits."""
    import mpmath
    process = SmoothedNoise(SkewedGeneralizedT(q=math.inf), "gaussian", 25, 5.)
    S = smoothing_matrix(process.weights(), 46)
    assert np.linalg.cond(S[:40]) > 1e4
    with mpmath.workdps(60):
        past, row = mpmath.matrix(S[:40].tolist()), mpmath.matrix(S[40:41].tolist())
        exact = row * row.T - row * past.T * mpmath.lu_solve(past * past.T, past * row.T)
    assert horizon_law(process, 40, 6).sd[0]**2 == pytest.approx(float(exact[0]), rel=1e-6)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.sampled_from(["gaussian", "sine", "cosine", "cosine_gaussian"]), st.integers(1, 20), st.integers(1, 30), st.integers(1, 10))
def test_more_of_the_past_never_hurts_and_an_error_in_it_never_helps(kernel, size, length, horizon):
    process = SmoothedNoise(SkewedGeneralizedT(q=math.inf), kernel, size, 3., 7.)
    if size > length + horizon: return
    S = smoothing_matrix(process.weights(), length + horizon)
    law = horizon_law(process, length, horizon)
    prior = np.linalg.norm(S[length:], axis=1)
    assert (law.sd <= prior * (1 + 1e-9)).all() and (horizon_law(process, length, horizon, .1).sd >= law.sd - 1e-9).all()
    assert (horizon_law(process, length, horizon, 1e6).sd == pytest.approx(prior, rel=1e-6))
    np.testing.assert_allclose(horizon_law(process, length, horizon, 1e-9).sd, law.sd, atol=1e-3)


def test_noise_without_a_variance_has_no_linear_predictor():
    with pytest.raises(ValueError, match="no best linear predictor.*needs p q > 2"): horizon_law(SmoothedNoise(SkewedGeneralizedT(q=.9, standardized=False)))
    for wrong in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="has to be 1 or more"): horizon_law(NORMAL, *wrong)


# quadrature

@losses
@pytest.mark.parametrize("sd", [1e-4, .05, 3.])
@pytest.mark.parametrize("bias", [0., .3])
def test_the_quadrature_is_that_of_panels_around_the_kinks(loss, sd, bias):
    features = [(kink + bias) / sd + width / sd for kink in loss.kinks for width in (0., *np.geomspace(1e-9, 1, 40), *-np.geomspace(1e-9, 1, 40))]
    points = np.unique(np.r_[np.linspace(-10, 10, 81), [p for p in features if abs(p) < 10]])
    nodes, weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(points)[:, None] / 2
    z = points[:-1, None] + half * (1 + nodes)
    exact = (loss.pointwise(torch.from_numpy(sd * z - bias)).numpy() * stats.norm.pdf(z) * half * weights).sum()
    assert expected_loss(loss, sd, bias) == pytest.approx(exact, rel=1e-8, abs=1e-10)


@losses
def test_no_bias_beats_the_least_loss(loss):
    sd = np.array([1e-3, .1, 2.])
    least = least_expected_loss(loss, sd)
    for bias in np.linspace(-4, 4, 33): assert (expected_loss(loss, sd, bias * sd) >= least - 1e-9 * (1 + np.abs(least))).all()
    assert least_expected_loss(loss, np.zeros(2)).shape == (2,) and np.isfinite(least_expected_loss(loss, np.zeros(2))).all()


def test_closed_forms():
    sd = np.geomspace(1e-6, 1e3, 10)
    np.testing.assert_allclose(least_expected_loss(MSE(), sd), sd**2, rtol=1e-12)
    np.testing.assert_allclose(least_expected_loss(MAE(), sd), sd * math.sqrt(2 / math.pi), rtol=1e-12)
    for q in (.01, .3, .9): np.testing.assert_allclose(least_expected_loss(Quantile(q), sd), sd * stats.norm.pdf(stats.norm.ppf(q)), rtol=1e-8)
    np.testing.assert_allclose(least_expected_loss(Huber(1e9), sd), sd**2 / 2, rtol=1e-12)


# scaling

def test_under_scaling_the_optimum_is_that_of_residuals_in_units_of_the_window():
    scale = np.array([.5, 2., 7.])
    sd = horizon_law(SHORT, IN, OUT).sd
    found = forecast_optimum(MSE(), SHORT, IN, OUT, scale)
    assert found.kind == "estimate" and found.value == pytest.approx((sd**2).mean() * (1 / scale**2).mean()) and found.error == pytest.approx((sd**2).mean() * (1 / scale**2).std(ddof=1) / math.sqrt(3))
    for loss in LOSSES.values(): assert forecast_optimum(loss, SHORT, IN, OUT, np.ones((4, 1, 1))).value == pytest.approx(forecast_optimum(loss, SHORT, IN, OUT).value, rel=1e-12)


@pytest.mark.parametrize("scaling", ["none", "input"])
@losses
def test_the_sampled_loss_of_the_best_forecast_is_the_optimum_within_chance(loss, scaling):
    windows = make_windows(SHORT.sample(4000, np.random.default_rng(1), IN + OUT), IN, OUT, scaling, dtype=torch.float64)
    best = linear_forecast(SHORT, windows)
    if not loss.symmetric: best = best + min(np.linspace(-.5, .5, 11), key=lambda c: loss.pointwise(windows.targets - torch.from_numpy(best + c)).mean())
    costs = loss.pointwise(windows.targets - torch.from_numpy(best)).mean((1, 2))
    optimum = forecast_optimum(loss, SHORT, IN, OUT, windows.scale if scaling == "input" else None)
    error = (costs.std() / math.sqrt(len(costs))).item()
    assert costs.mean() - optimum.value > -5 * error
    if loss.symmetric: assert costs.mean() - optimum.value < 5 * error


@pytest.mark.parametrize("scaling", ["none", "input"])
def test_no_forecast_beats_the_optimum_in_expected_loss(scaling):
    windows = make_windows(NORMAL.sample(12, np.random.default_rng(3)), scaling=scaling)
    best, rng = torch.from_numpy(linear_forecast(NORMAL, windows)), torch.Generator().manual_seed(0)
    for loss in (MSE(), MAE(), SGT(.707, q=20.), Quantile(.9)):
        optimum = forecast_optimum(loss, NORMAL, scale=windows.scale if scaling == "input" else None).value
        reached = [expected_forecast_loss(loss, NORMAL, windows, best + size * torch.randn(best.shape, generator=rng)) for size in (0., .02, .3)]
        assert reached[0] >= optimum - 1e-9 and reached[2] > reached[1] > reached[0] - (not loss.symmetric)
        if loss.symmetric: assert reached[0] == pytest.approx(optimum, rel=1e-6)
    with pytest.raises(ValueError, match="Gaussian noise alone"): expected_forecast_loss(MSE(), PRESETS["normal"], windows, best)
    with pytest.raises(ValueError, match="that of the targets"): expected_forecast_loss(MSE(), NORMAL, windows, best[..., 0])


def test_the_reference_reads_float32_windows_nearly_as_well():
    series = NORMAL.sample(300, np.random.default_rng(4))
    coarse, fine = (linear_reference(MSE(), NORMAL, make_windows(series, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert coarse == pytest.approx(fine, rel=.01) and coarse == pytest.approx(forecast_optimum(MSE(), NORMAL).value, rel=.1)


# bounds

def test_the_mixture_entropy_bounds_every_learnt_law():
    sd = horizon_law(SHORT, IN, OUT).sd
    bound = forecast_optimum(SGT(learn=True), SHORT, IN, OUT)
    assert bound.kind == "bound" and bound.value == pytest.approx(mixture_entropy(sd))
    assert bound.value > np.mean(stats.norm(0, sd).entropy())
    reached = [least_expected_loss(SGT(scale * sd.mean(), skew, p, q / p), sd).mean() for scale in (.5, 1., 1.5) for skew in (0., .5) for p in (1., 2.) for q in (3., 10.)]
    assert bound.value < min(reached) < bound.value + .05
    assert forecast_optimum(Cauchy(learn=True), SHORT, IN, OUT).kind == "bound"


def test_the_mixture_entropy_is_the_integral():
    sd = np.array([.1, .1, .5, 2.])
    def density(x): return stats.norm.pdf(x, 0, sd).mean()
    assert mixture_entropy(sd) == pytest.approx(2 * sum(quad(lambda x: -density(x) * math.log(density(x)), a, b)[0] for a, b in ((0, .3), (.3, 2), (2, 30))), abs=1e-8)


def test_the_informed_forecaster_bounds_what_the_window_allows():
    heavy = SmoothedNoise(SkewedGeneralizedT(sigma=.8, q=2.5), "gaussian", 9, 1.5)
    windows = make_windows(heavy.sample(8000, np.random.default_rng(0), IN + OUT), IN, OUT, dtype=torch.float64)
    for loss in (MAE(), Cauchy(.2), SGT(.4, q=2.)):
        bound, reference = forecast_optimum(loss, heavy, IN, OUT, draws=400), linear_reference(loss, heavy, windows)
        assert bound.kind == "bound" and bound.error > 0 and bound.value < reference < bound.value + .05
    told = informed_losses(MSE(), SmoothedNoise(SkewedGeneralizedT(sigma=.8, q=1e9), "gaussian", 9, 1.5), np.random.default_rng(0), 2, IN, OUT)
    np.testing.assert_allclose(told, forecast_optimum(MSE(), SmoothedNoise(SkewedGeneralizedT(sigma=.8, q=math.inf), "gaussian", 9, 1.5), IN, OUT).value, rtol=1e-3)


@pytest.mark.parametrize("noise, loss, why", [(dict(q=1.001, sigma=15.), MSE(), "a moment that no sample shows"), (dict(q=1.001, sigma=15.), MAE(), "likewise"), (dict(q=100., lam=.2), MSE(), "skew"), (dict(p=1., q=100.), MSE(), "no mixture of this kind"),
                                              (dict(p=1.5, q=math.inf), MSE(), "generalized normal"), (dict(q=100.), SGT(learn=True), "learnt")])
def test_where_nothing_is_known_there_is_no_optimum(noise, loss, why):
    assert forecast_optimum(loss, SmoothedNoise(SkewedGeneralizedT(**noise))) is None, why
    assert forecast_optimum(MSE(), PRESETS["normal"], scale=np.ones(3)) is None


@losses
def test_a_teacher_forced_forecast_has_the_optimum_of_one_step_ahead(loss):
    """Each step of the horizon is the one step of a longer window; and to be told more never hurts."""
    whole = smoothing_matrix(SHORT.weights(), IN + OUT)
    def given_all_before(t): return math.sqrt(SHORT.noise.moments().variance) * np.sqrt(np.linalg.lstsq(whole[:IN + t].T, whole[IN + t], rcond=None)[1][0])
    assert np.linalg.matrix_rank(whole) == IN + OUT
    sd = np.array([given_all_before(t) for t in range(OUT)])
    np.testing.assert_allclose(step_ahead_sd(SHORT, IN, OUT), sd, rtol=1e-6)
    assert step_ahead_sd(SHORT, IN, OUT)[0] == pytest.approx(horizon_law(SHORT, IN, OUT).sd[0], rel=1e-9)
    optimum = forecast_optimum(loss, SHORT, IN, OUT, teacher_forced=True)
    assert optimum.kind == "exact" and optimum.value == pytest.approx(least_expected_loss(loss, sd).mean(), rel=1e-6)
    assert optimum.value < forecast_optimum(loss, SHORT, IN, OUT).value
    told = informed_losses(loss, SmoothedNoise(SkewedGeneralizedT(.4, .8, q=1e9), SHORT.kernel, SHORT.kernel_size, SHORT.kernel_width, SHORT.period), np.random.default_rng(0), 2, IN, OUT, teacher_forced=True)
    np.testing.assert_allclose(told, optimum.value, rtol=1e-3, atol=1e-3)


def test_what_is_known_for_sure_bounds_no_learnt_loss():
    known = SmoothedNoise(SkewedGeneralizedT(q=math.inf), kernel_size=15)  # the last steps hold no noise of their own
    assert step_ahead_sd(known, 60, 20)[-1] == 0 and forecast_optimum(SGT(learn=True), known, 60, 20, teacher_forced=True) is None


def test_the_presets_have_a_bound_close_to_what_is_reached():
    bound = forecast_optimum(make_loss("mse"), PRESETS["normal"], draws=20)
    assert bound.kind == "bound" and .95 < bound.value / forecast_optimum(make_loss("mse"), NORMAL).value < 1.005
    assert forecast_optimum(make_loss("cauchy"), PRESETS["heavy_tailed"], draws=3).kind == "bound"
    assert forecast_optimum(make_loss("cauchy"), PRESETS["heavy_tailed"], draws=3) == forecast_optimum(make_loss("cauchy"), PRESETS["heavy_tailed"], draws=3)
