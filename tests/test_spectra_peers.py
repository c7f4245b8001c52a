"""Metrics, tails and nulls beside powerlaw, WeightWatcher, scipy and sampled ensembles."""
import contextlib
import io
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg, stats

from tformer_lab.spectra.analysis import analyze
from tformer_lab.spectra.decomposition import singular_values, singular_vectors
from tformer_lab.spectra.matrices import Product
from tformer_lab.spectra.metrics import condition_number, effective_rank, frobenius_norm, inverse_participation, numerical_rank, spectral_entropy, spectral_norm
from tformer_lab.spectra.nulls import compare_with_null, gaussian_null, permutation_nulls, product_null, with_tail
from tformer_lab.spectra.tails import compare_tails, fit_power_law, goodness_of_fit, hill, xmin_table
from tformer_lab.spectra.tracking import principal_cosines


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def quiet():
    """powerlaw and WeightWatcher print and warn."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def eigenvalues(rng, rows, columns): return np.linalg.svd(rng.standard_normal((rows, columns)), compute_uv=False)**2


def sample(kind, seed):
    rng = np.random.default_rng(seed)
    heavy = rng.standard_t(2.5, size=(80, 120))
    return {"pareto": lambda: rng.pareto(1.5, 200) + 1, "flat tail": lambda: rng.pareto(.2, 120) + 1, "steep tail": lambda: rng.pareto(30, 150) + 1,
            "above a bulk": lambda: np.r_[rng.uniform(.1, 1, 150), rng.pareto(2, 80) + 1], "ties": lambda: np.round(rng.pareto(1.5, 200) + 1, 1),
            "integers": lambda: rng.integers(1, 40, 150).astype(float), "lognormal": lambda: rng.lognormal(size=200), "exponential": lambda: rng.exponential(size=200),
            "Marchenko-Pastur": lambda: eigenvalues(rng, 80, 160), "square": lambda: eigenvalues(rng, 60, 60), "one row for each column": lambda: eigenvalues(rng, 30, 900),
            "heavy matrix": lambda: np.linalg.svd(heavy, compute_uv=False)**2, "spikes": lambda: np.linalg.svd(rng.standard_normal((60, 90)) + np.diag(np.r_[30., 20., np.zeros(58)]) @ np.eye(60, 90), compute_uv=False)**2,
            "tiny numbers": lambda: 1e-12 * (rng.pareto(2, 100) + 1), "few": lambda: rng.pareto(1.5, 12) + 1, "uniform": lambda: rng.uniform(1, 2, 120)}[kind]()


KINDS = ("pareto", "flat tail", "steep tail", "above a bulk", "ties", "integers", "lognormal", "exponential", "Marchenko-Pastur", "square", "one row for each column",
         "heavy matrix", "spikes", "tiny numbers", "few", "uniform")
TIED = ("ties", "integers")


# powerlaw

def of_powerlaw(x, **options):
    import powerlaw
    with quiet(): return powerlaw.Fit(x, **{"parameter_ranges": {"alpha": [1, 100]}, "verbose": 0} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_powerlaw_chooses_the_same_threshold_and_exponent(kind):
    for seed in range(2):
        x = sample(kind, seed)
        theirs, ours = of_powerlaw(x), fit_power_law(x)
        assert theirs.alpha < 99
        np.testing.assert_allclose([ours.xmin, ours.ks, ours.n_tail], [theirs.xmin, theirs.D, theirs.n_tail], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([ours.alpha_mle, ours.sigma], [theirs.alpha, theirs.sigma], rtol=1e-6)


@pytest.mark.parametrize("kind", ["pareto", "above a bulk", "integers", "Marchenko-Pastur"])
def test_powerlaw_has_the_same_exponent_from_a_given_threshold_on(kind):
    x = sample(kind, 5)
    table = xmin_table(x)
    for row in table.iloc[[0, len(table) // 3, len(table) // 2, -1]].itertuples():
        ours = fit_power_law(x, xmin=row.xmin)
        with quiet():
            theirs = of_powerlaw(x, xmin=row.xmin)
            expected = theirs.power_law.alpha, theirs.power_law.standard_err, theirs.power_law.D, theirs.n_tail
        if not expected[0] < 99: continue
        np.testing.assert_allclose([ours.alpha_mle, ours.sigma, ours.ks, ours.n_tail], expected, rtol=1e-6)
        np.testing.assert_allclose([row.alpha_mle, row.sigma, row.ks, row.n_tail], expected, rtol=1e-6)


def lognormal_likelihood(tail, xmin, mu, sigma):
    """Of a lognormal above xmin; powerlaw's own sum goes wrong where the normalization underflows."""
    return (stats.lognorm(sigma, scale=1).logpdf(tail * math.exp(-mu)) - mu - stats.norm.logsf((math.log(xmin) - mu) / sigma)).sum()


@pytest.mark.parametrize("kind", ["pareto", "above a bulk", "lognormal", "exponential", "uniform", "heavy matrix", "Marchenko-Pastur"])
def test_likelihood_ratios_are_those_of_powerlaw_or_its_search_stopped_early(kind):
    equal = []
    for seed in range(2):
        x = sample(kind, 10 + seed)
        fit = fit_power_law(x)
        ours, theirs = compare_tails(x, fit).set_index("alternative"), of_powerlaw(x, xmin=fit.xmin)
        tail = x[x >= fit.xmin]
        for name, other in (("exponential", "exponential"), ("lognormal", "lognormal"), ("truncated power law", "truncated_power_law")):
            with quiet():
                law = getattr(theirs, other)
                ratio, p = theirs.distribution_compare("power_law", other)
                likelihood = law.loglikelihoods(tail).sum()
            if name == "lognormal":
                if law.mu - math.log(fit.xmin) < -100 * np.log(tail).std(): continue  # so broad that it is a power law
                likelihood = lognormal_likelihood(tail, fit.xmin, law.mu, law.sigma)
            if not math.isfinite(likelihood): continue
            best = theirs.power_law.loglikelihoods(tail).sum() - ours.log_ratio[name]
            assert best > likelihood - 1e-5, name  # a maximum is never below what another search found
            if best - likelihood < 1e-6:
                equal.append(name)
                np.testing.assert_allclose(ours.log_ratio[name], ratio, atol=1e-3)
                own = {"exponential": ours.p_value[name], "lognormal": math.erfc(abs(ours.normalized[name]) / math.sqrt(2)), "truncated power law": 2 * ours.p_value[name]}  # powerlaw takes the lognormal for one that does not nest the power law
                if ratio < -1e-3 or name == "exponential": np.testing.assert_allclose(own[name], p, atol=2e-3)
    assert equal  # of one law at least


def test_the_alternatives_are_as_likely_as_scipy_says():
    x = sample("lognormal", 3)
    fit = fit_power_law(x, xmin=float(np.quantile(x, .4)))
    table, z = compare_tails(x, fit).set_index("alternative"), x[x >= fit.xmin] / fit.xmin
    rate, (mu, sigma), (alpha, cut) = table.parameters["exponential"]["rate"], table.parameters["lognormal"].values(), table.parameters["truncated power law"].values()
    shape = stats.lognorm(sigma, scale=math.exp(mu))
    from scipy.integrate import quad
    normalization = quad(lambda t: t**-alpha * math.exp(-cut * t), 1, np.inf)[0]
    power_law = stats.pareto(fit.alpha_mle - 1).logpdf(z).sum()
    np.testing.assert_allclose(power_law - table.log_ratio["exponential"], stats.expon(loc=1, scale=1 / rate).logpdf(z).sum(), rtol=1e-9)
    np.testing.assert_allclose(power_law - table.log_ratio["lognormal"], (shape.logpdf(z) - shape.logsf(1)).sum(), rtol=1e-7)
    np.testing.assert_allclose(power_law - table.log_ratio["truncated power law"], (-alpha * np.log(z) - cut * z - math.log(normalization)).sum(), rtol=1e-6)
    np.testing.assert_allclose(rate, 1 / stats.expon.fit(z, floc=1)[1], rtol=1e-9)


# WeightWatcher

@pytest.fixture(scope="module")
def weightwatcher():
    with quiet():
        from weightwatcher import RMT_Util, WW_powerlaw
    return {"fit": WW_powerlaw.WWFit, "util": RMT_Util}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*TIED, "few")])
def test_weightwatcher_finds_the_same_tail_where_it_fits_as_clauset_does(weightwatcher, kind):
    for seed in range(3):
        x = sample(kind, 20 + seed)
        with quiet(): theirs = weightwatcher["fit"](x)
        ours = fit_power_law(x)
        np.testing.assert_allclose([ours.alpha_mle, ours.xmin, ours.ks, ours.sigma], [theirs.alpha, theirs.xmin, theirs.D, theirs.sigma], rtol=1e-6, atol=1e-12)
        assert ours.n_tail == len(theirs.data)


def test_weightwatcher_has_the_same_entropy_and_rank(weightwatcher):
    rng = np.random.default_rng(0)
    for matrix in (rng.standard_normal((30, 50)), rng.standard_t(2, size=(40, 40)), np.outer(rng.standard_normal(20), np.ones(30)) + 1e-3 * rng.standard_normal((20, 30))):
        s = np.linalg.svd(matrix, compute_uv=False)
        with quiet():
            entropy = weightwatcher["util"].matrix_entropy(s, max(matrix.shape))
            rank = weightwatcher["util"].matrix_rank(s, max(matrix.shape))
        assert numerical_rank(s) == rank
        np.testing.assert_allclose(spectral_entropy(s) / np.log(rank), entropy, rtol=1e-6, atol=1e-7)


# scipy and numpy

@pytest.mark.parametrize("alpha", [1.3, 2.5, 6.])
def test_scipy_fits_the_same_pareto_law_with_and_without_a_cut(alpha):
    x = 3. * (np.random.default_rng(0).pareto(alpha - 1, 500) + 1)
    b = stats.pareto.fit(x, floc=0, fscale=3.)[0]
    np.testing.assert_allclose(fit_power_law(x, xmin=3.).alpha_mle, 1 + b, rtol=1e-6)
    cut = x[x <= 30]
    b = stats.truncpareto.fit(cut, alpha - 1, 10., fc=10., floc=0, fscale=3.)[0]
    np.testing.assert_allclose(fit_power_law(cut, xmin=3., xmax=30.).alpha_mle, 1 + b, rtol=1e-3)
    fit = fit_power_law(x, xmin=3.)
    law = stats.pareto(fit.alpha_mle - 1, scale=3.)
    below = np.abs(np.arange(500) / 500 - law.cdf(np.sort(x))).max()  # the empirical distribution before each step
    np.testing.assert_allclose(fit.ks, below, rtol=1e-9)
    assert -1e-12 < stats.kstest(x, law.cdf).statistic - fit.ks <= 1 / 500  # scipy looks at both sides of a step


def test_norms_ranks_and_entropies_are_those_of_numpy_and_scipy():
    rng = np.random.default_rng(1)
    for matrix in (rng.standard_normal((20, 31)), rng.standard_normal((31, 20)) * 1e-8, rng.standard_normal((25, 4)) @ rng.standard_normal((4, 25)), np.diag(np.arange(1., 9)), rng.standard_t(1.5, (17, 17))):
        s = singular_values({"a": torch.from_numpy(matrix)})["a"]
        np.testing.assert_allclose([spectral_norm(s), frobenius_norm(s)], [np.linalg.norm(matrix, 2), np.linalg.norm(matrix)], rtol=1e-12)
        assert numerical_rank(s) == np.linalg.matrix_rank(matrix, tol=min(matrix.shape) * np.finfo(float).eps * s[0])
        if numerical_rank(s) == len(s): np.testing.assert_allclose(condition_number(s), np.linalg.cond(matrix), rtol=1e-6)
        else: assert np.isinf(condition_number(s))
        np.testing.assert_allclose([spectral_entropy(s), np.log(effective_rank(s))], [stats.entropy(s**2), stats.entropy(s)], rtol=1e-9)
        u, values, v = singular_vectors(torch.from_numpy(matrix))
        left, _, right = linalg.svd(matrix, full_matrices=False)
        kept = np.r_[True, np.diff(s) < -1e-6 * s[0]] & np.r_[np.diff(s) < -1e-6 * s[0], s[-1] > 1e-6 * s[0]]
        np.testing.assert_allclose(inverse_participation(u)[kept], (left**4).sum(0)[kept], rtol=1e-6)
        np.testing.assert_allclose(inverse_participation(v)[kept], (right**4).sum(1)[kept], rtol=1e-6)


def test_angles_between_subspaces_are_those_of_scipy():
    rng = np.random.default_rng(2)
    for n, k, l in ((10, 3, 3), (12, 2, 5), (6, 6, 1), (5, 1, 1)):
        a, b = (np.linalg.qr(rng.standard_normal((n, m)))[0] for m in (k, l))
        np.testing.assert_allclose(np.arccos(principal_cosines(torch.from_numpy(a), torch.from_numpy(b)).numpy()), np.sort(linalg.subspace_angles(a, b)), atol=1e-7)


# sampled ensembles

def binomial(n, p, level=.999): return stats.binom.ppf(((1 - level) / 2, (1 + level) / 2), n, p) / n


@pytest.mark.parametrize("alpha, n", [(1.8, 40), (2.5, 400), (5., 100)])
def test_two_standard_errors_cover_the_exponent_as_often_as_they_should(alpha, n):
    x = np.random.default_rng(3).pareto(alpha - 1, size=(600, n)) + 1
    fits = fit_power_law(x, xmin=1.)
    low, high = binomial(600, .9545)
    covered = ((fits.alpha - alpha).abs() < 2 * fits.sigma).mean()
    assert low - .02 < covered < high
    assert abs(fits.alpha.mean() - alpha) < 4 * fits.alpha.std() / math.sqrt(600)  # the correction takes the bias away
    np.testing.assert_allclose(fits.alpha_mle.mean() - fits.alpha.mean(), (alpha - 1) / n, rtol=.05)
    np.testing.assert_allclose(fits.alpha.std(), (alpha - 1) / math.sqrt(n), rtol=.15)


def test_standard_errors_of_the_truncated_fit_cover_too():
    u, b, width = np.random.default_rng(4).random((600, 150)), 1.2, math.log(20)
    fits = fit_power_law(np.exp(-np.log1p(u * math.expm1(-b * width)) / b), xmin=1., xmax=20.)
    low, high = binomial(600, .9545)
    assert low - .02 < ((fits.alpha - 2.2).abs() < 2 * fits.sigma).mean() < high


def test_hill_is_the_exponent_of_any_pareto_tail():
    x = np.random.default_rng(5).pareto(3., size=(400, 500)) + 1
    inverse = 1 / (hill(x)[:, [19, 99, 399]] - 1)
    assert (abs(inverse.mean(0) - 1 / 3) < 4 * inverse.std(0) / math.sqrt(400)).all()
    np.testing.assert_allclose(inverse.std(0) * np.sqrt([20, 100, 400]), 1 / 3, rtol=.12)


def test_bootstrap_does_not_reject_power_laws_and_rejects_what_is_none():
    rng = np.random.default_rng(6)
    p = np.array([goodness_of_fit(rng.pareto(1.5, 50) + 1, draws=60, seed=i).p_value for i in range(60)])
    assert binomial(60, .1)[0] <= (p < .1).mean() <= binomial(60, .1)[1] and (p > .5).mean() > binomial(60, .5)[0]
    assert p.min() < .25 and p.max() > .9
    cut = [goodness_of_fit((x := rng.pareto(1., 500) + 1)[x < 4], draws=40).p_value for _ in range(4)]
    half_normal = [goodness_of_fit(1 + abs(rng.standard_normal(400)), draws=40).p_value for _ in range(6)]
    assert max(cut) < .05 and np.mean(half_normal) < .15


@pytest.mark.parametrize("kind", ["above a bulk", "exponential", "Marchenko-Pastur", "integers"])
def test_the_bootstrap_is_the_procedure_of_clauset_shalizi_and_newman_step_by_step(kind):
    x = sample(kind, 1)
    fit, rng, distances = fit_power_law(x), np.random.default_rng(12), []
    for _ in range(250):  # each value from the fit with the tail's share of the sample, else from the values below it
        synthetic = [fit.xmin * (1 - rng.random())**(-1 / (fit.alpha_mle - 1)) if rng.random() < fit.n_tail / len(x) else rng.choice(x[x < fit.xmin]) for _ in x]
        distances.append(fit_power_law(synthetic).ks)
    expected, found = np.mean(np.array(distances) >= fit.ks), goodness_of_fit(x, draws=1000).p_value
    assert abs(found - expected) < 4 * math.sqrt(max(expected * (1 - expected), .02) / 250)


def test_bootstrap_interval_covers_the_exponent():
    rng = np.random.default_rng(7)
    tests = [goodness_of_fit(rng.pareto(1.5, 80) + 1, draws=80, level=.9, seed=i) for i in range(50)]
    assert binomial(50, .9)[0] - .1 <= np.mean([test.low < 2.5 < test.high for test in tests])
    assert all(test.low < test.high and test.draws == 80 for test in tests)


@pytest.mark.parametrize("rows, columns", [(16, 64), (40, 40), (64, 24)])
def test_noise_is_called_noise_as_often_as_the_band_says(rows, columns):
    rng = np.random.default_rng(8)
    formed = np.linalg.svd(rng.standard_normal((400, rows, columns)), compute_uv=False)**2
    fits = fit_power_law(formed, null=gaussian_null(rows, columns, 1000)**2)
    for verdict in ("heavier than noise", "lighter than noise"):
        low, high = binomial(400, .025)
        assert low <= (fits.verdict == verdict).mean() <= high + .01, verdict
    assert stats.kstest(fits.percentile / 100, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("rows, columns", [(12, 30), (25, 25)])
def test_every_metric_of_the_gaussian_null_is_spread_as_that_of_formed_matrices(rows, columns):
    formed = with_tail(np.linalg.svd(np.random.default_rng(9).standard_normal((1500, rows, columns)), compute_uv=False))
    drawn = with_tail(gaussian_null(rows, columns, 1500))
    for name, values in drawn.items():
        if name != "numerical_rank": assert stats.ks_2samp(values[np.isfinite(values)], formed[name][np.isfinite(formed[name])]).pvalue > 1e-3, name


def test_every_metric_of_the_null_of_products_is_spread_as_that_of_formed_products():
    rng = np.random.default_rng(10)
    formed = with_tail(np.linalg.svd(rng.standard_normal((1500, 14, 9)) @ rng.standard_normal((1500, 9, 20)), compute_uv=False)[:, :9])
    for name, values in with_tail(product_null(14, 9, 20, 1500)).items():
        if name != "numerical_rank": assert stats.ks_2samp(values[np.isfinite(values)], formed[name][np.isfinite(formed[name])]).pvalue > 1e-3, name


def test_a_heavy_tailed_matrix_is_heavier_than_gaussian_noise_and_like_its_own_entries_shuffled():
    heavy = {f"heavy{i}.weight": torch.from_numpy(np.random.default_rng(i).standard_t(1.5, size=(100, 150))).float() for i in range(6)}
    gaussian, shuffled = analyze(heavy, draws=200, progress=False), analyze(heavy, "permutation", 40, progress=False)
    assert (gaussian.alpha_verdict == "heavier than noise").all() and (gaussian.alpha_percentile == 0).all()
    assert (shuffled.alpha_verdict == "like noise").sum() >= 5
    np.testing.assert_allclose(gaussian.alpha, shuffled.alpha)
    correlated = {"w": torch.from_numpy(np.random.default_rng(9).standard_normal((48, 64)) * np.arange(1, 65)**-.7)}
    table = compare_with_null(singular_values(correlated)["w"], permutation_nulls(correlated, 60)["w"])
    assert table.verdict["stable_rank"] == "below" and table.verdict["frobenius_norm"] == "like noise" and table.verdict["spectral_norm"] == "above"


def test_products_of_noise_are_like_noise_against_the_null_of_products_and_not_against_that_of_matrices():
    rng = np.random.default_rng(11)
    products = {f"p{i}": Product(*(torch.from_numpy(rng.standard_normal(shape)) for shape in ((32, 16), (16, 32)))) for i in range(60)}
    null, wrong = product_null(32, 16, 32, 300), gaussian_null(32, 16, 300)
    verdicts = np.array([[compare_with_null(s, draws).verdict["effective_rank"] for draws in (null, wrong)] for s in singular_values(products).values()])
    assert binomial(60, .95)[0] <= (verdicts[:, 0] == "like noise").mean() and (verdicts[:, 1] == "below").mean() > .95


def test_gaussian_percentiles_of_a_table_are_uniform_for_noise_of_any_variance():
    generator = torch.Generator().manual_seed(1)
    noise = {f"n{i}.weight": 10.**(i % 7 - 3) * torch.randn(20, 44, generator=generator) for i in range(150)}
    table = analyze(noise, draws=600, progress=False)
    for name in ("spectral_norm", "stable_rank", "spectral_entropy", "effective_rank", "median", "condition_number", "alpha"):
        assert stats.kstest(table[f"{name}_percentile"] / 100, "uniform").pvalue > 1e-3, name


def test_a_lognormal_so_broad_that_it_is_a_power_law_is_never_worse_than_one():
    rng = np.random.default_rng(0)
    x = np.r_[rng.pareto(4, 300) + 1, rng.pareto(.5, 40) + 1]
    row = compare_tails(x, fit_power_law(x, xmin=1.)).set_index("alternative").loc["lognormal"]
    assert row.log_ratio < 1e-3 and row.favored != "power law"
