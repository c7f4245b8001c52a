"""Noise, smoothed series and windows: the laws against numerical integration and scipy, the samples against the laws, and nothing leaks."""
import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from tformer_lab.data.series import (PRESETS, SmoothedNoise, chunk_series, make_windows, shape_statistics, smooth, smoothing_kernel, smoothing_matrix,
                                     split_windows, taleb_kappa)
from tformer_lab.data.skewed_t import SkewedGeneralizedT, log_gamma_ratio, magnitude_isf, magnitude_sf

LAWS = [dict(q=1.001, sigma=15.), dict(q=100., sigma=.707), dict(q=math.inf), dict(lam=.6, q=3.), dict(lam=-.9, p=1.3, q=4.), dict(p=4., q=.7, mu=-3.), dict(p=1., q=math.inf, lam=.3),
        dict(p=.8, q=.5, standardized=False), dict(q=.5, standardized=False, lam=.5, mu=2.), dict(q=1e7), dict(p=2.5, q=25.3, lam=.2)]
laws = pytest.mark.parametrize("parameters", LAWS, ids=lambda p: " ".join(f"{k}={v}" for k, v in p.items()))
skews, shapes = st.floats(-.95, .95), st.floats(.5, 8)


def integral(f, law, low, high):
    """By pieces that end at the mode and grow with the distance from it."""
    mode = law.mu - law.m
    edges = mode + law.v * law.sigma * np.r_[-np.geomspace(1e40, 1e-3, 87), 0, np.geomspace(1e-3, 1e40, 87)]
    edges = [low, *edges[(edges > low) & (edges < high)], high]
    return sum(quad(f, a, b, epsabs=1e-13, epsrel=1e-11, limit=200)[0] for a, b in zip(edges, edges[1:]))


# the law

@laws
def test_the_density_integrates_to_the_distribution_function(parameters):
    law = SkewedGeneralizedT(**parameters)
    far = law.v * law.sigma * 1e40
    for share in (.02, .5, .9):
        stop = float(law.ppf(share))
        assert integral(law.pdf, law, -far, stop) == pytest.approx(law.cdf(stop), abs=1e-6)
        assert law.cdf(stop) == pytest.approx(share, rel=1e-10)
    np.testing.assert_allclose(law.logpdf(law.ppf([.1, .6])), np.log(law.pdf(law.ppf([.1, .6]))), rtol=1e-12)


@laws
def test_entropy_and_moments_are_the_integrals_where_they_exist(parameters):
    law = SkewedGeneralizedT(**parameters)
    far, order, moments = law.v * law.sigma * 1e40, law.p * law.q, law.moments()
    assert integral(lambda x: -law.pdf(x) * law.logpdf(x), law, -far, far) == pytest.approx(law.entropy(), abs=1e-5)
    if order > 3:
        mean = integral(lambda x: x * law.pdf(x), law, -far, far)
        assert moments.mean == pytest.approx(mean, abs=1e-6)
    if order > 5.5:
        central = [integral(lambda x, k=k: (x - mean)**k * law.pdf(x), law, -far, far) for k in (2, 3, 4)]
        assert (moments.variance, moments.skewness, moments.excess_kurtosis) == pytest.approx((central[0], central[1] / central[0]**1.5, central[2] / central[0]**2 - 3), abs=1e-5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(skews, shapes, st.floats(.05, 200), st.floats(-5, 5), st.floats(1e-3, 1e3))
def test_standardized_means_the_mean_and_the_standard_deviation(lam, p, more, mu, sigma):
    law = SkewedGeneralizedT(mu, sigma, lam, p, (2 + more) / p)
    raw = SkewedGeneralizedT(0, 1, lam, p, (2 + more) / p, standardized=False).moments()
    assert law.moments().mean == mu and law.moments().variance == pytest.approx(sigma**2, rel=1e-9)
    assert law.v == pytest.approx(raw.variance**-.5, rel=1e-8) and law.m == pytest.approx(sigma * raw.mean * raw.variance**-.5, rel=1e-8, abs=1e-12 * sigma)


@pytest.mark.parametrize("nu", [.7, 1., 2.002, 5., 200., 1e6])
def test_student_and_cauchy_and_normal_are_special_cases(nu):
    x = np.r_[-1e8, -1e3, np.linspace(-9, 9, 37), 1e5]
    law, peer = SkewedGeneralizedT(1.5, 3 * math.sqrt(2), q=nu / 2, standardized=False), stats.t(nu, 1.5, 3)
    np.testing.assert_allclose(law.logpdf(x), peer.logpdf(x), rtol=1e-9)
    np.testing.assert_allclose(law.cdf(x), peer.cdf(x), rtol=1e-9)
    np.testing.assert_allclose(law.ppf([1e-9, .1, .5, .99]), peer.ppf([1e-9, .1, .5, .99]), rtol=1e-8)
    assert law.entropy() == pytest.approx(peer.entropy(), rel=1e-8)


def test_infinite_q_is_the_generalized_normal_law_and_large_q_comes_near():
    x = np.linspace(-6, 6, 41)
    for p in (1., 2., 5.):
        law, peer = SkewedGeneralizedT(0, 1, 0, p, math.inf, standardized=False), stats.gennorm(p)
        np.testing.assert_allclose(law.logpdf(x), peer.logpdf(x), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(law.cdf(x), peer.cdf(x), rtol=1e-11)
        np.testing.assert_allclose(law.ppf([.01, .4, .999]), peer.ppf([.01, .4, .999]), rtol=1e-10)
        assert law.moments().excess_kurtosis == pytest.approx(peer.stats("k"), abs=1e-10)
    np.testing.assert_allclose(SkewedGeneralizedT(q=math.inf).pdf(x), stats.norm.pdf(x), rtol=1e-12)
    for q in (1e4, 1e6, 1e9, 1e13):
        np.testing.assert_allclose(SkewedGeneralizedT(q=q).cdf(x[:30]), stats.norm.cdf(x[:30]), rtol=300 / q + 1e-8)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.floats(.02, 1e12), st.floats(-20, 20))
def test_ratios_of_gamma_functions_keep_their_digits(q, a):
    if q + a < .01: return
    with mpmath.workdps(60):
        exact = mpmath.loggamma(mpmath.mpf(q) + mpmath.mpf(a)) - mpmath.loggamma(q) - mpmath.mpf(a) * mpmath.log(q)
        assert abs(float(exact) - log_gamma_ratio(q, a)) < 3e-13 * max(1, abs(float(exact)), abs(a * math.log(q)))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.floats(.3, 10), st.floats(.05, 1e6), st.lists(st.floats(1e-300, 1), min_size=1, max_size=9))
@example(10., .05, [1e-100])
@example(10., .2, [1e-300, .3])
@example(.75, .05, [1e-300, 1e-299])  # both infinite
@example(10., 14.58, [1e-199])  # where scipy's inverse is far off
@example(2., .9999999999999999, [1e-12])
def test_magnitudes_and_their_probabilities_are_inverse_in_the_far_tail(p, q, t):
    z = magnitude_isf(np.array(t), p, q)
    inside = (z > 1e-280) & (z < 1e280)
    np.testing.assert_allclose(magnitude_sf(z[inside], p, q), np.array(t)[inside], rtol=1e-7)
    falling = magnitude_isf(np.sort(t), p, q)
    assert np.all(falling[1:] <= falling[:-1] * (1 + 1e-12))


@pytest.mark.parametrize("p, q", [(2., 1.001), (.5, 3.), (10., 14.58), (1., .3), (1.5, 40.)])
def test_far_tail_is_the_incomplete_beta_function(p, q):
    """On both sides of where a series takes over, and far beyond, in fifty digits."""
    for odds in (6.5, 7.5, 9., 20., 40., 90.):
        z = (q * math.exp(odds))**(1 / p)
        with mpmath.workdps(50):
            u = 1 / (1 + mpmath.mpf(z)**p / mpmath.mpf(q))
            exact = float(mpmath.betainc(q, 1 / mpmath.mpf(p), 0, u, regularized=True))
        if exact < 1e-300: continue
        assert magnitude_sf(np.array([z]), p, q)[0] == pytest.approx(exact, rel=1e-10)
        assert magnitude_isf(np.array([exact]), p, q)[0] == pytest.approx(z, rel=1e-10)


def test_quantiles_of_impossible_probabilities_are_nan_and_the_ends_are_infinite():
    law = SkewedGeneralizedT(lam=.3)
    assert np.isnan(law.ppf([-.1, 1.1, np.nan])).all() and law.ppf([0., 1.]).tolist() == [-np.inf, np.inf]
    assert law.cdf([-np.inf, np.inf]).tolist() == [0, 1] and law.pdf([-np.inf, np.inf]).tolist() == [0, 0]
    assert np.isnan(law.cdf(np.nan)) and np.isnan(law.pdf(np.nan)) and np.isscalar(law.ppf(.3)) and np.isscalar(law.cdf(.3))
    assert law.cdf(law.mu - law.m) == pytest.approx((1 - .3) / 2)


@pytest.mark.parametrize("order, mean, variance, skewness, kurtosis", [(1., 0, 0, 0, 0), (1.5, 1, 0, 0, 0), (2., 1, 0, 0, 0), (2.002, 1, 1, 0, 0), (3., 1, 1, 0, 0), (3.5, 1, 1, 1, 0), (4.1, 1, 1, 1, 1)])
def test_a_moment_that_does_not_exist_says_so(order, mean, variance, skewness, kurtosis):
    found = SkewedGeneralizedT(p=2., q=order / 2, lam=.2, standardized=False).moments()
    assert [math.isfinite(value) for value in found[:4]] == [bool(x) for x in (mean, variance, skewness, kurtosis)]
    for name, there in (("mean", mean), ("variance", variance), ("skewness", skewness), ("kurtosis", kurtosis)): assert (name in found.status) != bool(there)
    if mean and not variance: assert found.variance == math.inf and math.isnan(found.skewness)
    if variance and not kurtosis: assert found.excess_kurtosis == math.inf


@pytest.mark.parametrize("wrong, says", [(dict(sigma=0.), "sigma"), (dict(sigma=math.nan), "sigma"), (dict(lam=1.), "skew"), (dict(lam=math.nan), "skew"), (dict(p=0.), "p is"), (dict(p=math.inf), "p is"),
                                         (dict(q=-1.), "q is"), (dict(q=math.nan), "q is"), (dict(mu=math.inf), "mu"), (dict(q=1.), "standardized=False"), (dict(p=1., q=2.), "standardized=False")])
def test_parameters_that_give_no_law_are_refused_by_name(wrong, says):
    with pytest.raises(ValueError, match=says): SkewedGeneralizedT(**wrong)


# samples

@laws
def test_samples_follow_the_distribution_function(parameters):
    law = SkewedGeneralizedT(**parameters)
    assert stats.kstest(law.sample(np.random.default_rng(5), 40_000), law.cdf).pvalue > 1e-3


def test_samples_have_the_shape_and_the_moments_and_come_from_the_generator_alone():
    law = SkewedGeneralizedT(1., 2., .5, 2., 6.)
    rng = np.random.default_rng(0)
    x = law.sample(rng, (100_000, 2))
    assert x.shape == (100_000, 2) and np.isscalar(law.sample(rng))
    assert abs(x.mean() - 1) < .02 and abs(x.std() - 2) < .02 and abs(stats.skew(x, axis=None) - law.moments().skewness) < .1
    np.testing.assert_array_equal(law.sample(np.random.default_rng(0), (100_000, 2)), x)
    assert abs(np.corrcoef(x.T)[0, 1]) < .015


def test_a_sampler_that_rejects_by_the_wrong_density_is_caught():
    """What the Kolmogorov-Smirnov test is for: draws that follow density times proposal."""
    law, rng = SkewedGeneralizedT(q=3.), np.random.default_rng(0)
    proposed = rng.standard_t(6, 200_000)
    wrong = proposed[rng.random(200_000) * law.pdf(0.) < law.pdf(proposed)][:40_000]
    assert stats.kstest(wrong, law.cdf).pvalue < 1e-10


# smoothing

@pytest.mark.parametrize("kernel", ["gaussian", "sine", "cosine", "cosine_gaussian"])
@pytest.mark.parametrize("size", [1, 2, 15, 99, 100])
def test_smoothing_is_numpys_convolution_and_a_matrix(kernel, size):
    k, x = smoothing_kernel(kernel, size), np.random.default_rng(0).standard_t(2, (2, 120, 3))
    assert k.shape == (size,) and k.sum() == pytest.approx(1, abs=1e-14) and (k >= 0).all()
    expected = np.stack([[np.convolve(x[i, :, f], k, "same") for f in range(3)] for i in range(2)]).transpose(0, 2, 1)
    np.testing.assert_allclose(smooth(x, k), expected, atol=1e-12)
    np.testing.assert_allclose(smoothing_matrix(k, 120) @ x, expected, atol=1e-12)


def test_the_presets_are_the_published_ones():
    assert {name: (p.noise.sigma, p.noise.q, p.noise.p, p.noise.lam, p.noise.mu, p.kernel, p.kernel_size) for name, p in PRESETS.items()} == {
        "normal": (.707, 100., 2., 0., 0., "cosine_gaussian", 99), "heavy_tailed": (15., 1.001, 2., 0., 0., "cosine_gaussian", 99),
        "normal_short": (.707, 100., 2., 0., 0., "cosine_gaussian", 15), "heavy_tailed_short": (15., 1.001, 2., 0., 0., "cosine_gaussian", 15)}
    series = SmoothedNoise().sample(300, np.random.default_rng(0), features=2)
    expected = .707 * np.linalg.norm(smoothing_matrix(SmoothedNoise().weights(), 300), axis=1)
    np.testing.assert_allclose(series.std((0, 2)), expected, rtol=.15)


def test_kernels_that_cannot_be_are_refused():
    for wrong, says in ((dict(kernel="box"), "no kernel"), (dict(size=0), "size"), (dict(size=2.5), "size"), (dict(width=0.), "width"), (dict(period=math.nan), "period")):
        with pytest.raises(ValueError, match=says): smoothing_kernel(**wrong)
    with pytest.raises(ValueError, match="size"): SmoothedNoise(kernel_size=-1)
    np.testing.assert_array_equal(smoothing_kernel(size=np.int64(15)), smoothing_kernel(size=15))
    with pytest.raises(ValueError, match="not longer than the series"): SmoothedNoise().sample(1, np.random.default_rng(0), 50)


# windows

def long_series(n=9, features=1, seed=0):
    rng = np.random.default_rng(seed)
    return [10.**rng.uniform(-3, 6) * (rng.normal(size=(int(rng.integers(30, 90)), features)).cumsum(0) + rng.normal()) for _ in range(n)]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 25), st.floats(.05, .95), st.integers(0, 99))
def test_no_step_of_a_series_is_on_both_sides_of_a_split(n, stride, share, seed):
    """Every step has a number of its own: no number may be seen in training and in validation."""
    lengths = np.random.default_rng(seed).integers(30, 90, n)
    starts = np.cumsum(lengths) - lengths
    chunks, group = chunk_series([start + np.arange(length, dtype=float) for start, length in zip(starts, lengths)], 30, stride)
    train, validation = split_windows(make_windows(chunks, 20, 10, group=group, dtype=torch.float64), np.random.default_rng(seed), share)
    seen, held = (set(torch.cat([part.inputs, part.targets], 1).flatten().long().tolist()) for part in (train, validation))
    assert seen and held and not seen & held and seen | held == set(range(int(lengths.sum())))
    assert len(train.group) + len(validation.group) == len(group)


def test_the_input_and_its_scale_know_nothing_of_the_target():
    chunks, group = chunk_series(long_series(features=2), 30, 7)
    windows = make_windows(chunks, 20, 10, "input", group)
    for change in (lambda y: y * 1e9, lambda y: y - 1e12, lambda y: 0 * y):
        other = chunks.copy()
        other[:, 20:] = change(other[:, 20:])
        changed = make_windows(other, 20, 10, "input", group)
        assert torch.equal(windows.inputs, changed.inputs) and torch.equal(windows.center, changed.center) and torch.equal(windows.scale, changed.scale)


def test_scaled_windows_go_back_to_the_units_of_the_data():
    chunks, group = chunk_series(long_series(features=2), 30, 7)
    windows = make_windows(chunks, 20, 10, "input", group, torch.float64)
    np.testing.assert_allclose(windows.inputs.mean(1), 0, atol=1e-9)
    np.testing.assert_allclose(windows.inputs.std(1, correction=0), 1, rtol=1e-9)
    np.testing.assert_allclose(windows.unscale(windows.inputs), chunks[:, :20], rtol=1e-9)
    np.testing.assert_allclose(windows.unscale(windows.targets), chunks[:, 20:], rtol=1e-9)
    shifted = make_windows(7. * chunks + 3., 20, 10, "input", group, torch.float64)
    np.testing.assert_allclose(shifted.targets, windows.targets, rtol=1e-6, atol=1e-6)
    unscaled = make_windows(chunks, 20, 10, group=group, dtype=torch.float64)
    np.testing.assert_array_equal(torch.cat([unscaled.inputs, unscaled.targets], 1), chunks)


def test_windows_without_a_scale_are_left_out_and_counted():
    chunks, _ = chunk_series(long_series(), 30, 30)
    chunks[2, :20], chunks[4, :20] = 5., 0.
    with pytest.warns(UserWarning, match=f"2 of {len(chunks)} windows have a constant input"): windows = make_windows(chunks, 20, 10, "input")
    assert len(windows.inputs) == len(chunks) - 2 and not {2, 4} & set(windows.group.tolist()) and windows.targets.isfinite().all()
    with warnings.catch_warnings(action="error"): assert len(make_windows(chunks, 20, 10).inputs) == len(chunks)


def test_chunks_cover_a_series_and_end_where_it_ends():
    chunks, group = chunk_series([np.arange(65.), np.arange(30.)], 30)
    assert [int(chunk[0, 0]) for chunk in chunks] == [0, 30, 35, 0] and group.tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(chunk_series([np.ones((40, 3))], 30, 100)[0].shape, (2, 30, 3))


@pytest.mark.parametrize("wrong, says", [(lambda c: dict(series=c[:, :29]), "29 steps"), (lambda c: dict(series=c[..., 0]), "features"), (lambda c: dict(series=c[:0]), "no series"), (lambda c: dict(series=np.where(c == c[1, 3], np.nan, c)), "number 1"),
                                         (lambda c: dict(series=c, scaling="chunk"), "scaling"), (lambda c: dict(series=c, group=[1, 2]), "group"), (lambda c: dict(series=0 * c, scaling="input"), "constant")])
def test_series_that_give_no_windows_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): make_windows(**{"input_length": 20, "horizon": 10, **wrong(chunk_series(long_series(), 30, 30)[0])})


def test_splits_and_chunks_that_cannot_be_are_refused():
    windows = make_windows(chunk_series(long_series(1), 30, 3)[0], 20, 10, group=np.zeros(len(chunk_series(long_series(1), 30, 3)[0])))
    with pytest.raises(ValueError, match="one series"): split_windows(windows, np.random.default_rng(0))
    for share in (0., 1., math.nan):
        with pytest.raises(ValueError, match="validation"): split_windows(windows, np.random.default_rng(0), share)
    with pytest.raises(ValueError, match="series Malta has 3 steps"): chunk_series([np.ones(9), np.ones(3)], 5, names=["Cyprus", "Malta"])
    with pytest.raises(ValueError, match="no series"): chunk_series([], 5)
    with pytest.raises(ValueError, match="stride"): chunk_series([np.ones(9)], 5, 0)


# shape

def test_shape_statistics_do_not_depend_on_scale_and_shift_and_mirror_with_the_sign():
    x = np.random.default_rng(0).gamma(2., size=(3, 400)).cumsum(-1) % 7
    found, moved, mirrored = (shape_statistics(y, np.random.default_rng(1)) for y in (x, 1e5 * x - 3e4, -x))
    for a, b, c in zip(found, moved, mirrored): np.testing.assert_allclose(a, b, rtol=1e-8)
    np.testing.assert_allclose(mirrored.skewness, -found.skewness)
    np.testing.assert_allclose(mirrored.difference_skewness, -found.difference_skewness)
    np.testing.assert_allclose(mirrored.kappa, found.kappa)
    np.testing.assert_allclose(found.skewness, stats.skew(x, axis=-1))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.])
def test_kappa_of_stable_noise_is_two_minus_alpha(alpha):
    x = stats.levy_stable(alpha, 0).rvs((20, 20_000), random_state=0)
    assert taleb_kappa(x, np.random.default_rng(0), 10).mean() == pytest.approx(2 - alpha, abs=.12)


def test_constant_series_have_no_shape_and_short_ones_are_refused():
    assert all(np.isnan(value) for value in shape_statistics(np.full(50, 3e7), np.random.default_rng(0)))
    for wrong in (np.ones(2), np.float64(3.), np.r_[np.nan, np.ones(9)]):
        with pytest.raises(ValueError): shape_statistics(wrong, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 values"): taleb_kappa(np.arange(9.), np.random.default_rng(0), 1)
