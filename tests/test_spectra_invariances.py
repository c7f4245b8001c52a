"""Spectra, metrics, tails and histories: what must hold for any input, and what a brute-force loop gives."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from tformer_lab.spectra import analysis, decomposition, nulls
from tformer_lab.spectra.decomposition import MatrixSpectrum, read_spectra, singular_values, singular_vectors
from tformer_lab.spectra.history import SpectrumHistory, SpectrumRecord, pack, unpack
from tformer_lab.spectra.matrices import Product
from tformer_lab.spectra.metrics import METRICS, QUARTILES, inverse_participation, quantiles, spectral_metrics
from tformer_lab.spectra.nulls import gaussian_null, percentile_in, permutation_nulls
from tformer_lab.spectra.tails import compare_tails, fit_power_law, goodness_of_fit, hill, xmin_table
from tformer_lab.spectra.tracking import overlap_table, subspace_overlap, track
from tformer_lab.spectra.analysis import analyze

quick = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 24)
SCALED = ("spectral_norm", "frobenius_norm", *QUARTILES)
NUMBERS = ("alpha", "alpha_mle", "sigma", "xmin", "ks")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# matrices

def rotation(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def make_matrix(kind, seed, rows, columns):
    rng = np.random.default_rng(seed)
    x, r = rng.standard_normal((rows, columns)), min(rows, columns)
    if kind == "low rank": x = x[:, :max(1, r // 3)] @ rng.standard_normal((max(1, r // 3), columns))
    if kind == "graded": x = x * np.logspace(0, -4, columns)
    if kind == "steep": x = np.c_[1 + .01 * x[:, columns // 2:], 1e-9 * x[:, :columns // 2]]  # squared, the small columns drown in the rounding of the large
    if kind == "sparse": x = x * (rng.random(x.shape) < .2)
    if kind == "one value": x = np.zeros_like(x) + rng.standard_normal()
    if kind == "heavy": x = rng.standard_t(2, size=x.shape)
    return x


matrices = st.builds(make_matrix, st.sampled_from(["noise", "low rank", "graded", "sparse", "one value", "heavy"]), seeds, sides, sides)


def metrics_of(matrix):
    """All metrics of a matrix whose entries are taken to be right to ten digits."""
    return spectral_metrics(singular_values({"a": torch.as_tensor(matrix)})["a"], precision=1e-10)


def assert_equal_metrics(found, expected, **tolerance):
    for name in expected: np.testing.assert_allclose(found[name], expected[name], err_msg=name, **{"rtol": 1e-7, "atol": 1e-9} | tolerance)


@quick
@given(matrices, seeds)
def test_no_metric_sees_a_rotation_a_transpose_a_permutation_or_a_sign(matrix, seed):
    rng, expected = np.random.default_rng(seed), metrics_of(matrix)
    rows, columns = matrix.shape
    for other in (matrix.T, -matrix, matrix[rng.permutation(rows)][:, rng.permutation(columns)], rotation(rng, rows) @ matrix @ rotation(rng, columns)):
        assert_equal_metrics(metrics_of(other.copy()), expected, atol=1e-9 * (1 + expected["spectral_norm"]))


@quick
@given(matrices, st.integers(-90, 90))
def test_norms_and_quantiles_scale_with_the_matrix_and_no_other_metric_does(matrix, power):
    scale = 2. ** (3 * power)
    expected, found = metrics_of(matrix), metrics_of(matrix * scale)
    assert_equal_metrics({name: found[name] / (scale if name in SCALED else 1) for name in found}, expected)


@quick
@given(matrices)
def test_metrics_stay_in_their_ranges(matrix):
    r, found = min(matrix.shape), metrics_of(matrix)
    slack = 1 + 1e-12
    if not matrix.any():
        assert {name for name, value in found.items() if value == 0} == {"numerical_rank", *SCALED}
        return
    assert 1 <= found["stable_rank"] <= found["participation_ratio"] * slack <= found["entropy_rank"] * slack**2 <= found["effective_rank"] * slack**3 <= r * slack**4
    assert 1 <= found["numerical_rank"] <= r and found["condition_number"] >= 1 and 0 <= found["spectral_entropy"] <= np.log(r) + 1e-12
    assert found["lower_quartile"] <= found["median"] <= found["upper_quartile"] <= found["spectral_norm"] <= found["frobenius_norm"] * slack
    assert np.isnan(found["decay_r2"]) or 0 <= found["decay_r2"] <= slack


@quick
@given(st.lists(st.tuples(st.sampled_from(["noise", "zeros", "nan", "inf", "equal", "steep"]), seeds), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 3))
def test_metrics_of_a_batch_are_those_of_a_loop_in_numpy_and_torch(kinds, r, lead):
    rows = []
    for kind, seed in kinds:
        s = np.sort(np.random.default_rng(seed).lognormal(size=r) * (1e5 if kind == "steep" else 1))[::-1]
        rows.append({"noise": s, "steep": s**3, "zeros": 0 * s, "equal": 0 * s + s[0], "nan": np.where(np.arange(r) == seed % r, np.nan, s), "inf": np.where(np.arange(r) == 0, np.inf, s)}[kind])
    batch = np.stack([rows] * lead)
    with np.errstate(invalid="ignore"): table, by_torch = spectral_metrics(batch), spectral_metrics(torch.from_numpy(batch.copy()))
    assert len(table) == lead * len(rows)
    np.testing.assert_allclose(by_torch, table, rtol=1e-12, atol=1e-13)
    for i, (kind, _) in enumerate(kinds):
        single = spectral_metrics(rows[i])
        np.testing.assert_allclose(list(single.values()), table.iloc[i + (lead - 1) * len(rows)], rtol=1e-12, atol=1e-13)
        if kind in ("nan", "inf"): assert all(map(np.isnan, single.values()))


@quick
@given(seeds, st.integers(1, 60), st.floats(0, 3))
def test_metrics_in_single_precision_are_near_those_in_double(seed, r, steepness):
    s = np.random.default_rng(seed).uniform(.5, 1, r)
    s = np.sort(s * np.arange(1, r + 1)**-steepness).astype(np.float32)[::-1].copy()
    precise = spectral_metrics(s.astype(float), precision=np.finfo(np.float32).eps)
    for single in (s, torch.from_numpy(s)): assert_equal_metrics(spectral_metrics(single), precise, rtol=2e-4, atol=2e-5)


@quick
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_quantiles_are_those_of_numpy_for_any_values_with_ties(values, levels):
    s = np.sort(np.round(values))[::-1].copy()
    np.testing.assert_allclose(quantiles(s, levels), np.quantile(s, levels), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(quantiles(torch.from_numpy(s), levels), np.quantile(s, levels), rtol=1e-12, atol=1e-9)


@quick
@given(seeds, sides, sides, st.integers(-300, 300))
def test_localization_sees_neither_length_nor_sign_nor_order(seed, n, k, power):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, k))
    expected = [(v**4).sum() / (v**2).sum()**2 for v in vectors.T]
    for other in (vectors, -vectors, vectors[rng.permutation(n)], vectors * 2.**(power / 4), torch.from_numpy(vectors)): np.testing.assert_allclose(inverse_participation(other), expected, rtol=1e-10)
    assert min(expected) >= 1 / n - 1e-12 and max(expected) <= 1 + 1e-12


# singular values

@quick
@given(seeds, st.integers(1, 70), st.integers(1, 70), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), st.sampled_from(["noise", "low rank", "graded", "steep", "heavy"]))
def test_singular_values_are_those_of_an_svd_to_more_digits_than_the_entries_have(seed, rows, columns, dtype, kind):
    x = torch.from_numpy(make_matrix(kind, seed, rows, columns)).to(dtype)
    exact = torch.linalg.svdvals(x.double()).numpy()
    spectrum = dict(read_spectra({"a": x}))["a"]
    eps = torch.finfo(torch.float32).eps if dtype != torch.float64 else torch.finfo(dtype).eps
    error = eps * float(x.double().square().mean().sqrt()) if dtype != torch.float64 else 20 * eps * exact[0]
    assert np.abs(spectrum.values - exact).max() <= error and (np.diff(spectrum.values) <= 0).all() and spectrum.values.dtype == np.float64
    np.testing.assert_allclose(spectrum.variance, x.double().var(correction=0), rtol=1e-6, atol=1e-12 * exact[0]**2)
    assert spectrum.shape == (rows, columns) and spectrum.precision == torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(70, 70), (40, 60), (20, 20)])
def test_where_squares_lose_the_small_values_they_come_from_an_svd(rows, columns, dtype):
    x = torch.from_numpy(make_matrix("steep", 1, rows, columns)).to(dtype)
    exact = torch.linalg.svdvals(x.double()).numpy()
    assert np.abs(singular_values({"a": x})["a"] - exact).max() <= 1e-13 * exact[0] < np.abs(np.sqrt(np.abs(np.linalg.eigvalsh((x.double() @ x.double().mT).numpy())))[::-1][:len(exact)] - exact).max()


@quick
@given(st.lists(st.tuples(st.sampled_from([(3, 5), (5, 3), (8, 8), (1, 6), (12, 2)]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans()), min_size=1, max_size=12), seeds)
def test_matrices_read_together_have_the_values_that_they_have_alone(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i, (shape, dtype, broken) in enumerate(kinds):
        weights[f"m{i}"] = torch.randn(shape, generator=generator).to(dtype)
        if broken: weights[f"m{i}"][0, 0] = (float("nan"), float("inf"))[i % 2]
    weights["product"] = Product(torch.randn(8, 2, generator=generator), torch.randn(2, 8, generator=generator))
    together = singular_values(weights)
    assert list(together) == list(weights)
    for i, (shape, _, broken) in enumerate(kinds):
        alone = singular_values({"x": weights[f"m{i}"]})["x"]
        np.testing.assert_allclose(together[f"m{i}"], alone, rtol=1e-9, atol=1e-12)
        assert np.isnan(alone).all() == broken and len(alone) == min(shape)
    np.testing.assert_allclose(together["product"], singular_values({"x": weights["product"]})["x"], rtol=1e-12)


@quick
@given(seeds, sides, sides, st.integers(1, 30), st.floats(-3, 3).filter(lambda scale: abs(scale) > 1e-3))
def test_a_product_has_the_spectrum_the_vectors_and_the_variance_of_the_matrix_that_it_makes(seed, rows, columns, inner, scale):
    generator = torch.Generator().manual_seed(seed)
    product = Product(torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator), scale)
    dense = scale * product.left.double() @ product.right.double()
    exact = torch.linalg.svdvals(dense)[:inner]
    spectrum = dict(read_spectra({"p": product}))["p"]
    np.testing.assert_allclose(spectrum.values, exact, rtol=1e-8, atol=1e-12 * float(exact[0]))
    np.testing.assert_allclose(spectrum.variance, dense.var(correction=0), rtol=1e-8, atol=1e-12 * float(exact[0])**2)
    u, s, v = singular_vectors(product)
    np.testing.assert_allclose(u * s @ v.mT, dense, atol=1e-11 * float(exact[0]))
    for vectors in (u, v): np.testing.assert_allclose(vectors.mT @ vectors, np.eye(len(s)), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, columns", [(150, 40), (40, 150), (90, 90)])
def test_beyond_the_size_of_a_chunk_a_matrix_is_decomposed_alone_and_alike(monkeypatch, dtype, rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, kept = {"a": x, "b": 2 * x, "turned": x.mT, "broken": x / 0}, x.clone()
    monkeypatch.setattr(decomposition, "CHUNK_BYTES", 20_000)
    found = singular_values(weights)
    exact = torch.linalg.svdvals(x.double())
    for name, factor in (("a", 1), ("b", 2), ("turned", 1)): np.testing.assert_allclose(found[name], factor * exact, rtol=1e-9, atol=1e-9)
    assert np.isnan(found["broken"]).all() and torch.equal(x, kept)


# tails

def make_sample(kind, seed, n):
    rng = np.random.default_rng(seed)
    pareto = rng.pareto(rng.uniform(.3, 6), n) + 1
    return {"pareto": pareto, "ties": np.round(pareto, 1), "integers": rng.integers(1, 30, n).astype(float), "lognormal": rng.lognormal(size=n), "zeros": np.r_[pareto[:-3], 0., 0., 0.],
            "steep": 1 + .01 * rng.random(n), "noise": np.linalg.svd(rng.standard_normal((n, 2 * n)), compute_uv=False)**2}[kind]


kinds_of_samples = st.sampled_from(["pareto", "ties", "integers", "lognormal", "zeros", "steep", "noise"])
samples = st.builds(make_sample, kinds_of_samples, seeds, st.integers(12, 90))


def fits_by_loop(x):
    """From every candidate on the exponent and the distance, as Clauset, Shalizi and Newman (2009) write them; thresholds leave three distinct values."""
    x = x[x > 0]
    for xmin in np.unique(x)[:-2]:
        tail = x[x >= xmin]
        alpha = 1 + len(tail) / np.log(tail / xmin).sum()
        yield xmin, alpha, len(tail), max(abs((tail >= v).mean() - (v / xmin)**(1 - alpha)) for v in tail)


@quick
@given(samples)
def test_the_fit_is_that_of_a_loop_over_all_thresholds(x):
    fit, rows = fit_power_law(x), list(fits_by_loop(x))
    if len(np.unique(x[x > 0])) < 8:
        assert fit.status.startswith("fewer") and np.isnan(fit.alpha)
        return
    smallest = min(row[3] for row in rows)
    xmin, alpha, count, ks = next(row for row in rows if row[0] == fit.xmin)
    assert fit.status == "ok" and abs(fit.ks - smallest) < 1e-11 and ks < smallest + 1e-11
    np.testing.assert_allclose([fit.alpha_mle, fit.alpha, fit.sigma], [alpha, 1 + (alpha - 1) * (count - 1) / count, (alpha - 1) / np.sqrt(count)], rtol=1e-9)
    assert fit.n_tail == count and fit.xmax == np.inf


@quick
@given(samples)
def test_the_table_of_thresholds_is_that_loop_and_each_row_the_fit_from_there(x):
    table, rows = xmin_table(x), np.array(list(fits_by_loop(x)))
    np.testing.assert_allclose(table[["xmin", "alpha_mle", "n_tail", "ks"]], rows, rtol=1e-8, atol=1e-11)
    if len(np.unique(x[x > 0])) < 8: return
    for i in {0, len(table) // 2, len(table) - 1}:
        fit = fit_power_law(x, xmin=float(table.xmin[i]))
        np.testing.assert_allclose([getattr(fit, name) for name in (*NUMBERS, "n_tail")], table.loc[i, [*NUMBERS, "n_tail"]], rtol=1e-9, atol=1e-12)


@quick
@given(samples, seeds, st.integers(-200, 200))
def test_the_fit_sees_no_order_and_scales_with_the_values(x, seed, power):
    fit, scale = fit_power_law(x), 2.**power
    for other in (np.random.default_rng(seed).permutation(x), torch.from_numpy(x), x.tolist()):
        again = fit_power_law(other)
        np.testing.assert_array_equal([getattr(again, name) for name in (*NUMBERS, "n_tail")], [getattr(fit, name) for name in (*NUMBERS, "n_tail")])
    again = fit_power_law(x * scale)
    assert again.status == fit.status
    np.testing.assert_allclose(again.ks, fit.ks, atol=1e-10)
    if again.xmin == fit.xmin * scale: np.testing.assert_allclose([again.alpha, again.sigma, again.n_tail], [fit.alpha, fit.sigma, fit.n_tail], rtol=1e-8)
    else: assert min(abs(row[3] - fit.ks) for row in fits_by_loop(x) if row[0] * scale == again.xmin) < 1e-10  # of two thresholds with one distance rounding chooses


@settings(quick, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["pareto", "ties", "integers", "lognormal", "zeros", "noise", "nan", "nothing"]), seeds), min_size=1, max_size=4), st.integers(12, 100), st.integers(1, 2), st.sampled_from([np.inf, 12.]))
def test_a_batch_of_samples_is_fitted_as_a_loop_does(kinds, n, lead, xmax):
    rows = [np.full(n, np.nan) if kind == "nan" else np.zeros(n) if kind == "nothing" else make_sample(kind, seed, n) for kind, seed in kinds]
    table = fit_power_law(np.stack([rows] * lead), xmax=xmax)
    assert len(table) == lead * len(rows)
    for row, x in zip(table.itertuples(), rows * lead):
        single = fit_power_law(x, xmax=xmax)
        assert row.status == single.status and row.n_tail == single.n_tail
        np.testing.assert_allclose([getattr(row, name) for name in NUMBERS], [getattr(single, name) for name in NUMBERS], rtol=1e-12)
    np.testing.assert_allclose(hill(np.stack(rows)), [hill(x) for x in rows], rtol=1e-12)


@quick
@given(samples, st.floats(1e-7, .2))
def test_values_that_rounding_could_have_made_count_as_zero(x, precision):
    floor = precision**2 * x.mean()
    cut = np.where(x > floor, x, 0.)
    given, by_hand = fit_power_law(x, precision=precision), fit_power_law(cut)
    if given.status != "ok": assert np.isnan(given.xmin)
    elif by_hand.alpha_mle - 1 < 1 / (4 * precision): np.testing.assert_array_equal([getattr(given, name) for name in (*NUMBERS, "n_tail")], [getattr(by_hand, name) for name in (*NUMBERS, "n_tail")])
    assert np.isnan(given.xmin) or given.xmin > floor


@quick
@given(samples)
def test_hill_is_the_mean_excess_of_logarithms_above_each_order_statistic(x):
    largest = np.sort(x)[::-1]
    found = hill(x)
    assert found.shape == (len(x) - 1,)
    for k in range(1, len(x)):
        if largest[k] == 0 or largest[k] == largest[0]: assert np.isnan(found[k - 1])
        else: np.testing.assert_allclose(found[k - 1], 1 + k / np.log(largest[:k] / largest[k]).sum(), rtol=1e-8)


def truncated_likelihood(alpha, x, xmin, xmax):
    """Sum of the log density of a power law between xmin and xmax."""
    b, width = alpha - 1, np.log(xmax / xmin)
    normalization = -np.log(width) if abs(b * width) < 1e-9 else np.log(abs(b)) - np.log(abs(np.expm1(-b * width)))
    return (normalization - alpha * np.log(x / xmin) - np.log(xmin)).sum()


@quick
@given(seeds, st.integers(10, 300), st.floats(-2, 5), st.floats(1.2, 1000), st.floats(1e-6, 1e6))
def test_the_truncated_fit_maximizes_its_likelihood(seed, n, alpha, ratio, xmin):
    b, u = alpha - 1, np.random.default_rng(seed).random(n)
    x = xmin * np.exp(np.log(ratio) * u if abs(b) < 1e-6 else -np.log1p(u * np.expm1(-b * np.log(ratio))) / b)
    x = np.clip(x, xmin, xmin * ratio)
    fit = fit_power_law(x, xmin=xmin, xmax=xmin * ratio)
    assert fit.status == "ok" and fit.n_tail == n and fit.alpha == fit.alpha_mle
    spread = 30 / np.log(ratio) * np.sqrt(1 / n) + 3
    best = optimize.minimize_scalar(lambda a: -truncated_likelihood(a, x, xmin, xmin * ratio), bounds=(fit.alpha - spread, fit.alpha + spread), method="bounded", options={"xatol": 1e-10})
    assert truncated_likelihood(fit.alpha, x, xmin, xmin * ratio) >= -best.fun - 1e-9 * max(1, abs(best.fun))
    np.testing.assert_allclose(fit.alpha, best.x, atol=1e-3 * fit.sigma)
    h = 1e-3 * fit.sigma
    curvature = -(truncated_likelihood(fit.alpha + h, x, xmin, xmin * ratio) - 2 * truncated_likelihood(fit.alpha, x, xmin, xmin * ratio) + truncated_likelihood(fit.alpha - h, x, xmin, xmin * ratio)) / h**2
    np.testing.assert_allclose(fit.sigma, curvature**-.5, rtol=.05)


@quick
@given(samples.filter(lambda x: len(np.unique(x[x > 0])) >= 10), st.floats(.5, .95))
def test_the_truncated_fit_chooses_its_threshold_by_the_distance_to_the_law_between_the_limits(x, level):
    xmax = float(np.quantile(x[x > 0], level))
    fit, table = fit_power_law(x, xmax=xmax), xmin_table(x, xmax=xmax)
    if fit.status != "ok":
        assert len(np.unique(x[(x > 0) & (x <= xmax)])) < 8
        return
    tail = x[(x >= fit.xmin) & (x <= xmax)]
    b = fit.alpha - 1
    survival = lambda v: 1 - np.log(v / fit.xmin) / np.log(xmax / fit.xmin) if abs(b) < 1e-9 else 1 - np.expm1(-b * np.log(v / fit.xmin)) / np.expm1(-b * np.log(xmax / fit.xmin))
    np.testing.assert_allclose(fit.ks, max(abs((tail >= v).mean() - survival(v)) for v in tail), atol=1e-8)
    assert fit.n_tail == len(tail) and abs(fit.ks - table.ks.min()) < 1e-11 and abs(table.ks[table.xmin == fit.xmin].item() - fit.ks) < 1e-11


@settings(quick, max_examples=12)
@given(st.builds(make_sample, st.sampled_from(["pareto", "lognormal", "noise"]), seeds, st.integers(20, 80)), seeds)
def test_bootstrap_and_comparison_see_neither_order_nor_scale(x, seed):
    other = np.random.default_rng(seed).permutation(x) * 2.**20
    a, b = goodness_of_fit(x, draws=40), goodness_of_fit(other, draws=40)
    np.testing.assert_allclose([a.p_value, a.low, a.high], [b.p_value, b.low, b.high], rtol=1e-6, atol=.026)
    first, second = compare_tails(x), compare_tails(other)
    assert first.alternative.tolist() == second.alternative.tolist() == ["exponential", "lognormal", "truncated power law"]
    np.testing.assert_allclose(first[["log_ratio", "p_value"]], second[["log_ratio", "p_value"]], rtol=1e-4, atol=1e-4)
    assert first.log_ratio[2] <= 1e-9  # the power law is a truncated one whose rate is 0


@quick
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(st.integers(-1, 11), min_size=1, max_size=9), st.booleans())
def test_a_percentile_counts_the_draws_below_and_half_of_the_equal_ones(null, values, broken):
    null, values = np.array(null, float) / 3, np.array(values, float) / 3
    expected = [100 * ((null < v - 1e-6).sum() + .5 * (abs(null - v) < 1e-6).sum()) / len(null) for v in values]
    rounded = values * (1 + 1e-13)
    np.testing.assert_allclose(percentile_in(rounded, np.r_[null, np.nan] if broken else null), expected)


@quick
@given(kinds_of_samples, seeds, st.integers(20, 60), st.floats(.1, 10))
def test_a_verdict_is_where_the_exponent_falls_among_those_of_the_null(kind, seed, n, scale):
    x, null = make_sample(kind, seed, n), gaussian_null(n, 2 * n, 40)**2
    fit, alphas = fit_power_law(x, null=null * scale), np.array([fit_power_law(row).alpha for row in null])
    if fit.status != "ok": assert fit.verdict == "" and np.isnan(fit.percentile)
    else:
        low, high = np.quantile(alphas, (.025, .975), method="weibull")
        np.testing.assert_allclose([fit.null_low, fit.null_high], [low, high], rtol=1e-6)
        np.testing.assert_allclose(fit.percentile, 100 * (alphas < fit.alpha).mean(), atol=100 / 40)
        if min(abs(fit.alpha - low), abs(fit.alpha - high)) > 1e-6: assert fit.verdict == ("heavier than noise" if fit.alpha < low else "lighter than noise" if fit.alpha > high else "like noise")


@quick
@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(1, 4))
def test_a_shuffled_matrix_keeps_its_norm_and_each_matrix_has_its_own_null(seed, rows, columns, draws):
    a, b = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed % 2**31 + i)) for i in range(2))
    together = permutation_nulls({"a": a, "b": b, "turned": a.mT}, draws, seed % 1000)
    for name, matrix in (("a", a), ("b", b), ("turned", a.mT)):
        assert together[name].shape == (draws, min(rows, columns))
        np.testing.assert_allclose((together[name]**2).sum(1), float(matrix.double().square().sum()), rtol=1e-9)
        np.testing.assert_allclose(together[name], permutation_nulls({name: matrix}, draws, seed % 1000)[name], rtol=1e-8, atol=1e-10)


def normal(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


SHUFFLED = {"square": normal(90, 90), "oblong": normal(40, 130), "tall": normal(200, 30), "a row": normal(1, 70), "a column": normal(70, 1), "turned": normal(130, 40).mT, "every other entry": normal(80, 260)[::2, ::2],
            "rank-deficient": normal(60, 150) * (normal(60, 150) > 1.9), "all alike": torch.full((20, 50), .3, dtype=torch.float64), "one entry": torch.eye(30, 70, dtype=torch.float64) * (torch.arange(30) == 4)[:, None],
            "a large mean": 10 + normal(20, 60), "heavy": torch.from_numpy(np.random.default_rng(0).standard_t(1.5, size=(50, 160))), "tiny": 1e-22 * normal(40, 130), "subnormal": 1e-40 * normal(40, 130), "huge": 1e37 * normal(40, 130),
            "a parameter": torch.nn.Parameter(normal(64, 160)), "a product": Product(normal(40, 12), normal(12, 30), 3.), "a product of parameters": Product(torch.nn.Parameter(normal(16, 20)), normal(20, 16))}


def as_type(matrix, dtype):
    return Product(matrix.left.to(dtype), matrix.right.to(dtype), matrix.scale) if isinstance(matrix, Product) else matrix.to(dtype)


def shuffled_by_hand(matrix, draws, seed):
    """The matrices in float64, entry by entry in the order that the seed gives, and their singular values by the SVD."""
    factors = (matrix.left, matrix.right) if isinstance(matrix, Product) else (matrix,)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(factors))]
    for _ in range(draws):
        parts = []
        for factor, generator in zip(factors, generators):
            entries, order = factor.detach().double().contiguous().view(-1), torch.randperm(factor.numel(), generator=generator)
            parts.append(torch.stack([entries[i] for i in order]).view(factor.shape))
        yield parts[0] if len(parts) == 1 else matrix.scale * parts[0] @ parts[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_a_permutation_null_is_the_svd_of_the_same_entries_in_the_order_that_the_seed_gives(kind, dtype):
    if dtype == torch.float16 and kind in ("tiny", "subnormal", "huge"): pytest.skip("nothing of it is left in float16")
    matrix = as_type(SHUFFLED[kind], dtype)
    for seed, draws in ((0, 3), (11, 2)):
        drawn = permutation_nulls({"a": matrix}, draws, seed)["a"]
        formed = list(shuffled_by_hand(matrix, draws, seed))
        exact = np.stack([torch.linalg.svdvals(x).numpy()[:drawn.shape[1]] for x in formed])
        np.testing.assert_allclose(drawn, exact, rtol=1e-5, atol=1e-9 * exact[0, 0])
        largest = max(float(x.abs().max()) for x in formed)  # its square may underflow
        np.testing.assert_allclose(np.linalg.norm(drawn / largest, axis=1), [float(torch.linalg.norm(x / largest)) for x in formed], rtol=1e-12)


BORDERLINE = {"border": 1.3 + torch.randn(20, 60, generator=torch.Generator().manual_seed(0)), "small": torch.randn(16, 40, generator=torch.Generator().manual_seed(1)), "same size": torch.randn(40, 16, generator=torch.Generator().manual_seed(2)),
              "larger": torch.randn(100, 128, generator=torch.Generator().manual_seed(3)), "product": Product(normal(20, 4), normal(4, 60))}


def test_draws_depend_neither_on_threads_nor_on_other_draws_nor_on_other_matrices(monkeypatch):
    good, original = [], nulls._from_grams
    monkeypatch.setattr(nulls, "_from_grams", lambda *args: good.append(original(*args)[1]) or original(*args))
    expected = permutation_nulls(BORDERLINE, 40)
    assert 0 < sum(map(np.sum, good[:1])) < 40  # some draws of one stack are computed from the Gram matrix, and others by the SVD
    monkeypatch.undo()
    for threads, little in ((2, decomposition.LITTLE), (2, 0), (3, 0), (5, 0)):
        monkeypatch.setattr(decomposition, "LITTLE", little)
        torch.set_num_threads(threads)
        for name, s in permutation_nulls(BORDERLINE, 40).items(): np.testing.assert_array_equal(s, expected[name])
        spectra = singular_values(BORDERLINE)
    torch.set_num_threads(1)
    for name, matrix in BORDERLINE.items():
        np.testing.assert_array_equal(permutation_nulls({name: matrix}, 7)[name], expected[name][:7])
        np.testing.assert_array_equal(singular_values({name: matrix})[name], spectra[name])


def test_beyond_the_size_of_a_chunk_nulls_need_no_room_for_a_stack(monkeypatch):
    weights = {"a": torch.randn(150, 40), "b": torch.randn(40, 150), "product": Product(torch.randn(150, 5), torch.randn(5, 40))}
    expected = permutation_nulls(weights, 3)
    monkeypatch.setattr(decomposition, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(nulls.Workspace, "arrays", lambda *_: pytest.fail("a stack of large matrices"))
    for name, s in permutation_nulls(weights, 3).items(): np.testing.assert_allclose(s, expected[name], rtol=1e-6)


def test_overlapping_callers_leave_the_numbers_of_threads_as_they_were():
    found = lambda: sorted((library["filepath"], library["num_threads"]) for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas")
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        before, (first, second) = found(), (decomposition.single_threaded() for _ in range(2))
        for enter in (first, second): enter.__enter__()
        for leave in (first, second):
            assert all(n == 1 for _, n in found())
            leave.__exit__(None, None, None)
        assert found() == before and all(n == 3 for _, n in before)
        with ThreadPoolExecutor(3) as pool: list(pool.map(lambda i: [permutation_nulls({"a": normal(60, 60 + i)}, 3) for _ in range(10)], range(3)))
        assert found() == before


def test_weights_that_want_gradients_are_decomposed_in_any_thread():
    torch.set_num_threads(2)
    weights = {f"{i}": torch.nn.Parameter(normal(20 + i % 2, 20).to(dtype)) for i, dtype in enumerate([torch.float32, torch.float64] * 6)} | {"product": Product(torch.nn.Parameter(normal(20, 4)), normal(4, 20)), "other": Product(torch.nn.Parameter(normal(9, 4)), normal(4, 9))}
    found = singular_values(weights)
    torch.set_num_threads(1)
    assert torch.is_grad_enabled()
    for name, w in weights.items(): np.testing.assert_allclose(found[name], torch.linalg.svdvals(w.dense() if isinstance(w, Product) else w.double()).detach()[:len(found[name])], rtol=1e-6)


@pytest.mark.parametrize("null", ["gaussian", "permutation"])
def test_the_progress_bar_moves_in_steps_and_ends_at_its_end(monkeypatch, null):
    steps, totals = [], []

    class Bar:
        def __init__(self, *_, total=None, **__): totals.append(total)
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def update(self, n): steps.append(n)

    original = analysis.tqdm
    monkeypatch.setattr(analysis, "tqdm", lambda *args, **options: original(*args, **options) if args else Bar(**options))
    analyze({f"m{i}": torch.randn(30, 31 + i % 2) for i in range(4)} | {"larger": torch.randn(120, 100)}, null, 40, progress=False)
    assert sum(steps) == totals[0] == 5 * 40 and len(steps) > 1


# directions

@quick
@given(seeds, st.integers(3, 14), st.integers(3, 14), st.integers(1, 3), st.floats(.01, 100))
def test_overlaps_are_symmetric_and_see_neither_scale_nor_rotation_nor_which_side_is_which(seed, rows, columns, k, scale):
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(rng.standard_normal((rows, columns))) for _ in range(2))
    left, right = torch.from_numpy(rotation(rng, rows)), torch.from_numpy(rotation(rng, columns))
    expected = subspace_overlap(a, b, k)
    u, _, v = np.linalg.svd(a.numpy())
    u2, _, v2 = np.linalg.svd(b.numpy())
    np.testing.assert_allclose([expected.left, expected.right], [np.linalg.norm(u[:, :k].T @ u2[:, :k])**2 / k, np.linalg.norm(v[:k] @ v2[:k].T)**2 / k], atol=1e-9)
    swapped, turned = subspace_overlap(b, a, k), subspace_overlap(a.mT, b.mT, k)
    moved = subspace_overlap(scale * left @ a @ right, -left @ b @ right, k)
    for other, pair in ((swapped, (swapped.left, swapped.right)), (turned, (turned.right, turned.left)), (moved, (moved.left, moved.right))):
        np.testing.assert_allclose((*pair, other.gap), (expected.left, expected.right, expected.gap), atol=1e-8)
    assert subspace_overlap(a, scale * a, k).left == pytest.approx(1)


@quick
@given(seeds, st.integers(2, 5), st.integers(2, 6))
def test_tracking_follows_the_planted_directions_in_any_basis_sign_and_order_of_checkpoints(seed, k, checkpoints):
    rng = np.random.default_rng(seed)
    u, v = rotation(rng, 9)[:, :k], rotation(rng, 7)[:, :k]
    strengths = np.stack([rng.permutation(np.arange(1., k + 1) * 2**i) for i in range(checkpoints)])  # at no checkpoint two equal ones
    weights = {i: {"W": torch.from_numpy((-1)**i * u * s @ v.T)} for i, s in enumerate(strengths)}
    for at, step in (("first", 0), ("last", checkpoints - 1)):
        order = np.argsort(-strengths[step])
        paths = track(dict(reversed(weights.items())), "W", k=k, leading_at=at)
        np.testing.assert_allclose(paths.values, strengths[:, order], rtol=1e-9)
        np.testing.assert_allclose(paths.similarity, 1, atol=1e-9)
        assert (paths.ranks == (strengths[:, :, None] < strengths[:, None, :]).sum(2)[:, order]).all() and paths.steps.tolist() == list(range(checkpoints))
    np.testing.assert_allclose(overlap_table(weights, "W", k)[["left", "right"]], 1)


# histories

def spectrum(name, seed):
    rank = {"a": 1, "b": 2, "c": 2}[name]
    rng = np.random.default_rng(seed)
    return MatrixSpectrum(np.sort(rng.random(rank))[::-1], (rank, 3), float(rng.random()), (1e-7, 1e-3)[seed % 2])


adding = st.tuples(st.integers(0, 6), st.sets(st.sampled_from("abc"), min_size=1), st.integers(0, 10**6), st.booleans())


@settings(quick, max_examples=100)
@given(st.lists(adding, max_size=14))
def test_a_history_is_what_was_added_last_for_each_step(operations):
    records = [SpectrumRecord(3, {name: spectrum(name, 0) for name in "abc"})] + [SpectrumRecord(step if step != 3 else 7, {name: spectrum(name, seed) for name in sorted(names)}) for step, names, seed, _ in operations]
    history, model = SpectrumHistory(run="r"), {}
    for r, look in zip(records, [False, *(look for *_, look in operations)]):
        history.add(r)
        model[r.step] = r
        if look: assert history.steps.tolist() == sorted(model)
    assert history.matrices == list("abc") and len(history) == len(model)
    for name in "abc":
        missing = np.full(history[name].shape[1], np.nan)
        np.testing.assert_array_equal(history[name], [model[step].spectra[name].values if name in model[step].spectra else missing for step in sorted(model)])
        np.testing.assert_array_equal(history.variances(name), [model[step].spectra[name].variance if name in model[step].spectra else np.nan for step in sorted(model)])
    table = history.metrics().set_index(["matrix", "metric", "step"])["value"]
    assert len(table) == 3 * len(model) * len(METRICS | dict.fromkeys(QUARTILES))
    for step in model: np.testing.assert_array_equal(table["b", "spectral_norm", step], model[step].spectra["b"].values[0] if "b" in model[step].spectra else np.nan)


@quick
@given(st.integers(0, 10**12), st.sets(st.sampled_from("abc")), seeds)
def test_a_record_comes_back_from_its_tensors_as_it_was(step, names, seed):
    r = SpectrumRecord(step, {name: spectrum(name, seed) for name in sorted(names, reverse=True)})
    again = unpack(*pack(r))
    assert again.step == step and list(again.spectra) == list(r.spectra)
    for name, s in r.spectra.items():
        other = again.spectra[name]
        assert np.array_equal(other.values, s.values) and (other.shape, other.variance, other.precision) == (s.shape, s.variance, s.precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_precision_does_not_change_what_noise_and_a_power_law_are(dtype):
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(256, 512, generator=generator), full_matrices=False)
    heavy = (u * torch.arange(1, 257)**-.5) @ vh
    full, half = (analyze({"noise": torch.randn(256, 512, generator=torch.Generator().manual_seed(1)).to(d), "heavy": heavy.to(d)}, draws=30, progress=False) for d in (torch.float32, dtype))
    assert half.numerical_rank.tolist() == full.numerical_rank.tolist() == [256, 256]
    np.testing.assert_allclose(half[["condition_number", "decay_exponent", "alpha"]], full[["condition_number", "decay_exponent", "alpha"]], rtol=.05)


def test_a_history_forgets_a_matrix_that_was_replaced_away_before_it_was_looked_at():
    s = MatrixSpectrum(np.array([1.]), (1, 1), 0., 1e-7)
    history = SpectrumHistory([SpectrumRecord(1, {"a": s, "b": s}), SpectrumRecord(1, {"a": s})])
    assert history.steps.tolist() == [1] and history["a"].shape == (1, 1)


@pytest.mark.parametrize("kinds", ["pt", "tp", "pq"])
def test_products_and_matrices_of_one_shape_have_permutation_nulls(kinds):
    make = {"p": Product(torch.randn(8, 2), torch.randn(2, 8)), "q": Product(torch.randn(8, 3), torch.randn(3, 8)), "t": torch.randn(8, 8)}
    together = permutation_nulls({name: make[name] for name in kinds}, 3)
    for name in kinds: np.testing.assert_allclose(together[name], permutation_nulls({name: make[name]}, 3)[name], rtol=1e-6)


@pytest.mark.parametrize("dtype, n", [(torch.float32, 64), (torch.float32, 16), (torch.bfloat16, 64), (torch.float64, 256)])
def test_equal_singular_values_have_no_power_law_and_no_decay(dtype, n):
    w = torch.nn.init.orthogonal_(torch.empty(n, n, dtype=torch.float64), generator=torch.Generator().manual_seed(0)).to(dtype)
    row = analyze({"w": w}, None, progress=False).iloc[0]
    assert np.isnan(row.alpha) and np.isnan(row.decay_r2)
