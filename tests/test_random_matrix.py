"""Laws of random matrices: what must hold for any shape and scale, and what hostile spectra must not do."""
import warnings

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from tformer_lab.spectra.random_matrix import (BulkFit, MarchenkoPastur, QuarterCircle, Semicircle, detection_threshold, fit_marchenko_pastur,
                                               largest_eigenvalue_quantile, spike_overlap, spike_strength, spiked_singular_value, spikes,
                                               tracy_widom_cdf, tracy_widom_pdf, tracy_widom_ppf, tracy_widom_sf)

sides = st.one_of(st.integers(1, 40), st.integers(1, 100_000))
variances = st.floats(1e-12, 1e12)
probabilities = st.lists(st.one_of(st.floats(0, 1), st.floats(0, 1e-6)), min_size=1, max_size=30).map(lambda q: np.where(np.array(q) > 1e-100, q, 0))
NUMBERS = ("variance", "low", "high", "threshold", "n_spikes", "ks")


def noise(seed, *shape):
    return np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), compute_uv=False)


def spectra(seed, n, rows, columns):
    """Noise with 0 to 4 spikes of all strengths."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, rows, columns))
    for i in range(n):
        for j in range(i % 5): x[i, j, j] += detection_threshold(rows, columns) * rng.uniform(.5, 6)
    return np.linalg.svd(x, compute_uv=False)


def numbers(fit):
    return np.stack([np.asarray(getattr(fit, name), dtype=float) for name in NUMBERS])


# the laws

@settings(deadline=None, derandomize=True, max_examples=150)
@given(sides, sides, variances, probabilities)
def test_quantiles_and_probabilities_are_inverse_for_any_shape(rows, columns, variance, q):
    law = MarchenkoPastur(rows, columns, variance)
    x = law.ppf(q)
    ordered = law.ppf(np.sort(q))
    assert np.all(np.diff(ordered) >= -1e-14 * ordered[1:])
    assert np.all((x >= law.edges[0] * (1 - 1e-15)) & (x <= law.edges[1] * (1 + 1e-15)))
    inner = np.clip(x, law.edges[0] * (1 + 1e-9), law.edges[1] * (1 - 1e-9))
    rounding = 1e-15 * x * law.pdf(np.where(inner > 0, inner, law.edges[1] / 2))  # what the last digit of x does
    assert np.all(np.abs(law.cdf(x) - q) <= 1e-12 + rounding)
    np.testing.assert_array_equal(x, MarchenkoPastur(columns, rows, variance).ppf(q))


def exact_cdf(rows, columns, x):
    """The closed form, in 50 digits."""
    small, large = sorted((rows, columns))
    c = mpmath.sqrt(mpmath.mpf(small) / large)
    angle = mpmath.acos((rows + columns - mpmath.mpf(x)) / (2 * mpmath.sqrt(mpmath.mpf(rows) * columns)))
    arg = -mpmath.atan2(c * mpmath.sin(angle), 1 - c * mpmath.cos(angle))
    return (angle + ((1 - c * c) * arg + c * mpmath.sin(angle)) / c**2) / mpmath.pi


@pytest.mark.parametrize("rows, columns", [(384, 384), (30522, 384), (30522, 1), (64, 63), (100_000, 99_999), (5, 1), (1, 1), (1112, 1), (1111, 1)])
def test_quantiles_are_right_to_ten_digits(rows, columns):
    law, q = MarchenkoPastur(rows, columns), np.r_[1e-9, 1e-6, 1e-3, np.linspace(.01, .99, 9), .999]
    with mpmath.workdps(50):
        for x, share in zip(law.ppf(q).tolist(), q.tolist()):
            assert abs(exact_cdf(rows, columns, x) - mpmath.mpf(float(law.cdf(x)))) < 2e-14
            slope = (exact_cdf(rows, columns, x * (1 + mpmath.mpf(10)**-20)) - exact_cdf(rows, columns, x)) / mpmath.mpf(10)**-20  # by log x
            assert abs((exact_cdf(rows, columns, x) - mpmath.mpf(share)) / slope) < 1e-10


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 2000), st.integers(1, 2000), st.floats(.01, .99))
def test_the_density_integrates_to_the_probability_and_the_moments(rows, columns, q):
    law = MarchenkoPastur(rows, columns, .3)
    low, high = np.sqrt(law.edges)
    middle, half = (high + low) / 2, (high - low) / 2

    def integral(f, stop):  # an angle in place of s smooths the ends
        angle = np.arccos(np.clip((middle - stop) / half, -1, 1))
        return quad(lambda t: f(middle - half * np.cos(t)) * half * np.sin(t), 0, angle, limit=200)[0]
    assert integral(law.singular_value_pdf, np.sqrt(law.ppf(q))) == pytest.approx(q, abs=1e-7)
    assert integral(lambda s: 2 * s * law.pdf(s**2), np.sqrt(law.ppf(q))) == pytest.approx(q, abs=1e-7)
    for k in range(6):
        assert integral(lambda s: s**(2 * k) * law.singular_value_pdf(s), high) == pytest.approx(law.moment(k), rel=1e-7)


def test_the_density_is_zero_outside_and_infinite_only_at_the_hard_edge():
    assert MarchenkoPastur(4, 4).pdf(0.) == np.inf and MarchenkoPastur(4, 5).pdf(0.) == 0
    assert MarchenkoPastur(4, 4).singular_value_pdf(0.) == pytest.approx(QuarterCircle(4.).pdf(0.))
    for law in (MarchenkoPastur(4, 9), Semicircle(3.), QuarterCircle(3.)):
        low, high = law.edges
        with warnings.catch_warnings(action="error"): assert law.pdf([low - .1, high + .1]).tolist() == [0, 0]
    assert MarchenkoPastur(4, 9).singular_value_pdf([-2., .9, 5.1]).tolist() == [0, 0, 0]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.floats(1e-6, 1e6), probabilities)
def test_circles_scale_and_their_quantiles_invert(radius, q):
    for law in (Semicircle, QuarterCircle):
        np.testing.assert_allclose(law(radius).cdf(law(radius).ppf(q)), q, atol=1e-14)
        np.testing.assert_allclose(law(radius).ppf(q), radius * law(1.).ppf(q), rtol=1e-12, atol=1e-12 * radius)
        for k in range(7):
            assert quad(lambda t: np.sin(t)**k * law(1.).pdf(np.sin(t)) * np.cos(t), np.arcsin(law(1.).edges[0]), np.pi / 2)[0] * radius**k == pytest.approx(law(radius).moment(k), rel=1e-8, abs=1e-12 * radius**k)


@pytest.mark.parametrize("wrong", [0, -3, 2.5, 64., "64", None, np.nan])
def test_sides_that_are_no_counts_are_refused_everywhere(wrong):
    s = noise(0, 16, 16)
    for call in (lambda: MarchenkoPastur(wrong, 16), lambda: MarchenkoPastur(16, wrong), lambda: largest_eigenvalue_quantile(wrong, 16), lambda: fit_marchenko_pastur(s, 16, wrong),
                 lambda: detection_threshold(wrong, 16), lambda: spike_strength(9., wrong, 16), lambda: spike_overlap(9., 16, wrong), lambda: spiked_singular_value(9., wrong, 16), lambda: spikes(s, wrong, 16)):
        with pytest.raises(ValueError, match="whole number"): call()


@pytest.mark.parametrize("wrong", [0, -1., np.nan, np.inf, "1", [1., 2.]])
def test_variances_that_are_none_are_refused_everywhere(wrong):
    for call in (lambda: MarchenkoPastur(4, 4, wrong), lambda: Semicircle(wrong), lambda: QuarterCircle(wrong), lambda: largest_eigenvalue_quantile(4, 4, wrong),
                 lambda: detection_threshold(4, 4, wrong), lambda: spike_strength(9., 4, 4, wrong), lambda: spikes(np.ones(4), 4, 4, wrong)):
        with pytest.raises(ValueError, match="above 0"): call()


# the largest value

def test_tracy_widom_keeps_shapes_and_its_two_tails_add_up():
    x = np.linspace(-9, 12, 300).reshape(10, 30)
    np.testing.assert_allclose(tracy_widom_cdf(x) + tracy_widom_sf(x), 1, rtol=1e-15)
    assert np.all(np.diff(tracy_widom_cdf(x).ravel()) >= 0) and np.all(np.diff(tracy_widom_sf(x).ravel()) <= 0) and np.all(tracy_widom_pdf(x) > 0)
    assert tracy_widom_ppf(tracy_widom_cdf(x)).shape == x.shape and np.ndim(tracy_widom_cdf(0.)) == np.ndim(tracy_widom_ppf(.5)) == 0
    assert tracy_widom_cdf([]).shape == (0,)
    np.testing.assert_allclose(tracy_widom_cdf(x), [[tracy_widom_cdf(one) for one in row] for row in x], rtol=1e-9, atol=1e-15)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(1e-15, 1 - 1e-15))
def test_tracy_widom_quantiles_invert(q):
    assert tracy_widom_cdf(tracy_widom_ppf(q)) == pytest.approx(q, rel=1e-6, abs=1e-7)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(sides, sides, variances)
def test_the_largest_value_is_symmetric_in_the_sides_and_scales_with_the_variance(rows, columns, variance):
    quantiles = largest_eigenvalue_quantile(rows, columns, variance, [.9, .99])
    assert quantiles[0] < quantiles[1]
    np.testing.assert_allclose(quantiles, largest_eigenvalue_quantile(columns, rows, variance, [.9, .99]), rtol=1e-12)
    np.testing.assert_allclose(quantiles, variance * largest_eigenvalue_quantile(rows, columns, q=np.array([.9, .99])), rtol=1e-12)


# the fit of the bulk

@pytest.mark.parametrize("rows, columns", [(64, 64), (24, 96), (100, 9)])
def test_a_batch_fits_as_a_loop_does_in_any_leading_shape(rows, columns):
    s = spectra(0, 12, rows, columns)
    batch = fit_marchenko_pastur(s, rows, columns)
    loop = [fit_marchenko_pastur(one, rows, columns) for one in s]
    np.testing.assert_allclose(numbers(batch), np.stack([numbers(one) for one in loop], axis=-1), rtol=1e-12)
    assert batch.status.tolist() == [one.status for one in loop]
    np.testing.assert_array_equal(numbers(fit_marchenko_pastur(s.reshape(3, 2, 2, -1), rows, columns)), numbers(batch).reshape(6, 3, 2, 2))
    assert len(set(batch.n_spikes)) > 2 and isinstance(loop[0].n_spikes, int) and isinstance(loop[0].ks, float) and isinstance(loop[0].status, str)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 30), st.floats(1e-100, 1e100))
def test_the_fit_scales_with_the_matrix_and_ignores_which_side_is_which(seed, scale):
    s = spectra(seed, 5, 16, 40)
    fit, scaled, turned = (numbers(fit_marchenko_pastur(*args)) for args in ((s, 16, 40), (s * scale, 16, 40), (s, 40, 16)))
    np.testing.assert_allclose(scaled[:4], fit[:4] * scale**2, rtol=1e-9)
    np.testing.assert_allclose(scaled[4:], fit[4:], rtol=1e-9)
    np.testing.assert_array_equal(turned, fit)


def test_numpy_torch_and_single_precision_agree():
    s = spectra(3, 10, 32, 48)
    fit = numbers(fit_marchenko_pastur(s, 32, 48))
    np.testing.assert_array_equal(numbers(fit_marchenko_pastur(torch.tensor(s, requires_grad=True), 32, 48)), fit)
    np.testing.assert_allclose(numbers(fit_marchenko_pastur(s.astype(np.float32), 32, 48)), fit, rtol=1e-3)
    assert len(spikes(torch.tensor(s[4]), 32, 48)) == fit[4, 4]


def test_the_fit_says_what_its_fields_mean():
    s = spectra(4, 20, 40, 60)
    fit = fit_marchenko_pastur(s, 40, 60, level=.9)
    for i in range(20):
        k = int(fit.n_spikes[i])
        law = MarchenkoPastur(40 - k, 60 - k, fit.variance[i])
        np.testing.assert_allclose([fit.low[i], fit.high[i]], law.edges)
        np.testing.assert_allclose(fit.threshold[i], largest_eigenvalue_quantile(40 - k, 60 - k, fit.variance[i], .9))
        assert np.sum(s[i]**2 > fit.threshold[i]) == k
        x = np.sort(s[i, k:]**2)
        steps = np.arange(len(x) + 1) / len(x)
        assert fit.ks[i] == pytest.approx(max(np.abs(law.cdf(x) - steps[1:]).max(), np.abs(law.cdf(x) - steps[:-1]).max()))


def test_a_lower_level_finds_more_spikes():
    s = spectra(5, 100, 32, 64)
    counts = [fit_marchenko_pastur(s, 32, 64, level=level).n_spikes.sum() for level in (.5, .9, .99, .9999)]
    assert counts[0] > counts[1] > counts[2] >= counts[3]


def test_a_spike_does_not_move_the_variance_however_strong():
    s = noise(6, 200, 32, 96)
    x = np.concatenate([np.full((200, 1), 1e6), s[:, :-1]], axis=1)  # noise of 31 x 95 has nearly these values
    assert fit_marchenko_pastur(x, 32, 96).variance.mean() == pytest.approx(fit_marchenko_pastur(s, 32, 96).variance.mean(), rel=.05)
    weak, strong = (fit_marchenko_pastur(np.concatenate([np.full((200, 1), top), s[:, :-1]], axis=1), 32, 96) for top in (30., 1e6))
    np.testing.assert_allclose(weak.variance, strong.variance, rtol=1e-9)


HOSTILE = {"zero matrix": np.zeros(16), "not finite": np.r_[np.inf, np.ones(15)], "too few values": np.ones(7), "no bulk": 2. ** -np.arange(16),
           "rank deficient": np.r_[3., 2., 1e-17 * np.ones(14)]}


@pytest.mark.parametrize("status", HOSTILE)
def test_a_spectrum_that_cannot_be_read_gives_nan_and_says_why(status):
    s = HOSTILE[status]
    with warnings.catch_warnings(action="error"):
        fit = fit_marchenko_pastur(s, len(s), 4 * len(s))
        table = spikes(s, len(s), 4 * len(s))
    assert isinstance(fit, BulkFit) and fit.status == status and np.isnan(numbers(fit)).all()
    assert len(table) == 0 and table.attrs["status"] == status and np.isnan(table.attrs["variance"])


@pytest.mark.parametrize("s, status", [(np.full(16, np.nan), "not finite"), (np.r_[1., np.nan, np.ones(14)], "not finite"), (np.r_[np.ones(15), np.nan], "not finite"),
                                       (1e200 * noise(0, 16, 64), "not finite"), (1e-200 * noise(0, 16, 64), "zero matrix"),
                                       (np.r_[1e10, np.zeros(15)], "rank deficient"), (np.r_[noise(0, 16, 64)[:11], np.zeros(5)], "rank deficient"),
                                       (np.linalg.svd(np.outer(np.arange(16.), np.ones(64)).astype(np.float32), compute_uv=False), "rank deficient")])
def test_values_beyond_floating_point_and_missing_ranks_are_no_fit(s, status):
    with warnings.catch_warnings(action="error"): fit = fit_marchenko_pastur(s, 16, 64)
    assert fit.status == status and np.isnan(numbers(fit)).all()


def test_a_bad_spectrum_leaves_its_neighbours_alone():
    s = spectra(7, 4, 16, 64)
    mixed = np.stack([s[0], np.zeros(16), s[1], np.full(16, np.nan), s[2], HOSTILE["no bulk"], s[3]])
    fit = fit_marchenko_pastur(mixed, 16, 64)
    np.testing.assert_allclose(numbers(fit)[:, ::2], numbers(fit_marchenko_pastur(s, 16, 64)), rtol=1e-12)
    assert fit.status.tolist() == ["ok", "zero matrix", "ok", "not finite", "ok", "no bulk", "ok"]


def test_a_few_missing_ranks_show_as_a_distance():
    fit = fit_marchenko_pastur(np.r_[noise(0, 64, 256)[:60], np.zeros(4)], 64, 256)
    assert fit.status == "ok" and fit.ks > 4 / 64 * .9


def test_empty_batches_and_one_row_are_no_accident():
    for shape in ((0, 16), (0,), (3, 0), (0, 0)):
        fit = fit_marchenko_pastur(np.zeros(shape), 16, 64)
        assert np.isnan(numbers(fit)).all() and np.shape(fit.status) == shape[:-1] and np.shape(fit.ks) == shape[:-1]
    assert fit_marchenko_pastur([8.], 1, 64).status == "too few values"
    assert len(spikes([8.], 1, 64, variance=1.)) == 0 and len(spikes([80.], 1, 64, variance=1.)) == 1


@pytest.mark.parametrize("s, words", [(np.ones(8), "9 singular values, here are 8"), (np.arange(9.), "descending"), (-np.arange(9.), "negative"),
                                      (np.array(["a"] * 9), "real numbers"), (np.ones(9) * 1j, "real numbers"), (3., "single number")])
def test_what_is_no_spectrum_is_refused_with_the_reason(s, words):
    for call in (fit_marchenko_pastur, spikes):
        with pytest.raises(ValueError, match=words): call(s, 9, 20)


@pytest.mark.parametrize("level", [0, 1, 99, -.1, np.nan, "high"])
def test_a_level_that_is_no_probability_is_refused(level):
    for call in (fit_marchenko_pastur, spikes):
        with pytest.raises(ValueError, match="between 0 and 1"): call(np.ones(9), 9, 20, level=level)


# spikes

@settings(deadline=None, derandomize=True, max_examples=100)
@given(sides, sides, variances, st.floats(0, 100))
def test_strength_undoes_the_noise_and_overlaps_stay_between_0_and_1(rows, columns, variance, ratio):
    critical = detection_threshold(rows, columns, variance)
    theta = ratio * critical
    y = spiked_singular_value(theta, rows, columns, variance)
    left, right = spike_overlap(theta, rows, columns, variance)
    assert 0 <= left <= 1 and 0 <= right <= 1
    np.testing.assert_allclose(spike_overlap(theta, columns, rows, variance), (right, left))
    assert y >= max(theta, MarchenkoPastur(rows, columns, variance).edges[1]**.5) * (1 - 1e-12)
    assume(ratio > 1.01)
    assert spike_strength(y, rows, columns, variance) == pytest.approx(theta, rel=1e-6)
    assert left > 0 and right > 0 and (left >= right if rows <= columns else left <= right)


def test_below_the_transition_there_is_no_overlap_and_no_strength():
    theta = detection_threshold(50, 200, 3.) * np.array([0, .5, 1])
    np.testing.assert_allclose(spike_overlap(theta, 50, 200, 3.), 0, atol=1e-15)
    edge = MarchenkoPastur(50, 200, 3.).edges[1]**.5
    np.testing.assert_allclose(spiked_singular_value(theta, 50, 200, 3.), edge)
    assert np.isnan(spike_strength(edge * np.array([0, .5, .9999]), 50, 200, 3.)).all()
    for wrong in (spike_overlap, spiked_singular_value, spike_strength):
        with pytest.raises(ValueError, match="negative"): wrong(-1., 50, 200)


def test_the_table_of_spikes_lists_what_the_fit_counts():
    for s in spectra(8, 30, 32, 64):
        fit, table = fit_marchenko_pastur(s, 32, 64), spikes(s, 32, 64)
        assert len(table) == fit.n_spikes and table.attrs == {"status": "ok", "variance": fit.variance}
        assert table["rank"].tolist() == list(range(1, fit.n_spikes + 1)) and (table["tracy_widom"] < .01).all() and table.notna().all(axis=None)
        known = spikes(s, 32, 64, variance=fit.variance)
        np.testing.assert_allclose(known, table)


def test_each_spike_is_seen_in_the_noise_that_the_others_leave():
    found = set()
    for s in spectra(10, 40, 24, 30):
        table, k = spikes(s, 24, 30, variance=1., level=.5), 0
        while s[k]**2 > largest_eigenvalue_quantile(24 - k, 30 - k, q=.5): k += 1
        assert len(table) == k
        found.add(k)
        if k == 0: continue
        center = [largest_eigenvalue_quantile(24 - k, 30 - k, q=tracy_widom_cdf(x)) for x in (0., 1.)]  # centre, centre + scale
        np.testing.assert_allclose(table["tracy_widom"], tracy_widom_sf((s[:k]**2 - center[0]) / (center[1] - center[0])), rtol=1e-4, atol=1e-300)
        np.testing.assert_allclose(table["strength"], spike_strength(s[:k], 25 - k, 31 - k))
        np.testing.assert_allclose(table[["left_overlap", "right_overlap"]].T, spike_overlap(table["strength"], 25 - k, 31 - k))
    assert len(found) > 4


def test_with_a_known_variance_noise_is_called_a_spike_as_often_as_the_level_says():
    s = noise(9, 1500, 12, 30)
    share = np.mean([len(spikes(one, 12, 30, variance=1., level=.9)) > 0 for one in s])
    assert abs(share - .1) < 4 * np.sqrt(.09 / 1500)


def test_with_a_known_variance_every_value_can_be_a_spike():
    table = spikes(np.array([300., 200., 100.]), 3, 9, variance=1.)
    assert len(table) == 3 and table["strength"].between(90, 300).all() and (table["tracy_widom"] == 0).all()
    for s, status in ((np.full(3, np.nan), "not finite"), (np.zeros(0), "too few values"), (np.zeros(3), "ok")):
        table = spikes(s, 3, 9, variance=1.)
        assert len(table) == 0 and table.attrs["status"] == status
