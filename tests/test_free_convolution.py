"""Free convolution and what the theory of teacher and student takes from it, over many parameters."""
import warnings

import numpy as np
import pytest
import torch

from tformer_lab.spectra.free_convolution import FreeLaw, denoise, denoise_symmetric, denoising_error, product_law, semicircle_law, wishart_law
from tformer_lab.spectra.random_matrix import MarchenkoPastur
from tformer_lab.theory.teacher_student import bayes_optimal_smse, recovery_threshold, untied_bounds


@pytest.mark.parametrize("law", [wishart_law, product_law])
@pytest.mark.parametrize("ratio", [.03, .3, 1., 3.])
@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1., 100.])
def test_laws_have_their_moments_whatever_the_noise(law, ratio, noise):
    sum_ = law(ratio) + semicircle_law(noise)
    points = sum_.quadrature(400)
    mean, variance = law(ratio).mean, law(ratio).variance + noise
    assert points.weight.sum() == pytest.approx(1, abs=1e-5) and points.weight @ points.x == pytest.approx(mean, abs=1e-4 * max(1, variance**.5))
    assert points.weight @ points.x**2 == pytest.approx(variance + mean**2, rel=1e-4)
    assert points.weight @ (points.x * points.hilbert) == pytest.approx(.5, abs=1e-4)  # of any law
    z = np.array([sum_.support[-1][1] + 1, sum_.support[0][0] - 1])
    np.testing.assert_allclose(sum_.hilbert(z), [(points.weight / (one - points.x)).sum() for one in z], rtol=1e-5)


PURE = {"w": wishart_law, "2w": lambda r: 2 * wishart_law(r), "p": product_law}
RATIOS = .3, .5, 1., 1.5, 2.
LAWS = {f"{name}({r})": law(r) for name, law in PURE.items() for r in RATIOS}
LAWS |= {f"w({r}){sign}w({t})": wishart_law(r) + factor * wishart_law(t) for r in RATIOS for t in RATIOS for sign, factor in (("+", 1), ("-", -1)) if t >= r}
LAWS |= {f"p({r})+{name}({t})": product_law(r) + PURE[name](t) for r, t in ((.3, .7), (.5, .5), (1., .5), (2., 1.5)) for name in ("w", "p")}
LAWS |= {"w(.3)+w(.7)": wishart_law(.3) + wishart_law(.7), "w(.5)+w(.3)+w(.5)": wishart_law(.5) + wishart_law(.3) + wishart_law(.5)}


def moments(law, n=6):
    """From free cumulants: those of R, and what they sum up to over partitions that do not cross."""
    p, q = (np.r_[part, np.zeros(n)] for part in (law.p, law.q))
    free, m = [], np.ones(1)
    for j in range(n): free.append((p[j] - sum(q[i] * free[j - i] for i in range(1, j + 1))) / q[0])
    for j in range(1, n + 1):
        power, padded, total = np.ones(1), np.r_[m, 0], 0.
        for size in range(1, j + 1):
            power = np.convolve(power, padded)[:j + 1]
            total += free[size - 1] * power[j - size]
        m = np.r_[m, total]
    return m


@pytest.mark.parametrize("name", LAWS)
def test_laws_without_noise_have_their_mass_and_moments(name):
    law = LAWS[name]
    points, (place, mass) = law.quadrature(400), law.atom or (0., 0.)
    found = [points.weight @ points.x**k + mass * place**k for k in range(7)]
    np.testing.assert_allclose(found, moments(law), rtol=1e-7, atol=1e-7)
    low, high = law.support[0][0], law.support[-1][1]
    for x in (low - .5, high + .5): assert law.hilbert(x) == pytest.approx((points.weight / (x - points.x)).sum() + mass / (x - place), rel=1e-7) and law.density(x) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = np.array([0., np.nan, np.inf, -np.inf])
        density, hilbert = law.density(x), law.hilbert(x)
    assert density[0] >= 0 and np.isnan([density[1], hilbert[1]]).all() and (density[2:] == 0).all() and (hilbert[2:] == 0).all()
    assert np.isnan(hilbert[0]) == (law.atom is not None or np.isinf(density[0]))
    if np.isfinite(hilbert[0]): assert [density[0], hilbert[0]] == pytest.approx([float(law.density(1e-9)), float(law.hilbert(1e-9))], abs=1e-6)


@pytest.mark.parametrize("rows", [150, 500, 1000, 1500])
def test_wishart_laws_are_marchenko_and_pasturs(rows):
    law, closed = wishart_law(rows / 1000), MarchenkoPastur(rows, 1000, 1 / np.sqrt(rows * 1000))
    low, high = closed.edges
    x = low + (high - low) * np.array([1e-6, 1e-3, .1, .5, .9, 1 - 1e-6])
    np.testing.assert_allclose(law.density(x), min(1, rows / 1000) * closed.pdf(x), rtol=1e-6)
    np.testing.assert_allclose(law.support, [closed.edges], atol=1e-12)


@pytest.mark.parametrize("law, parts", [(wishart_law(.5) + wishart_law(.5), ((1, .5), (1, .5))), (wishart_law(.3) + wishart_law(.7), ((1, .3), (1, .7))), (wishart_law(2.) + -1 * wishart_law(2.), ((1, 2.), (-1, 2.))),
                                        (wishart_law(.5) + -1 * wishart_law(.5), ((1, .5), (-1, .5))), (wishart_law(.3) + -1 * wishart_law(.5), ((1, .3), (-1, .5)))])
def test_sums_are_those_of_sampled_matrices(law, parts):
    D, rng = 500, np.random.default_rng(0)
    def wishart(ratio):
        x = rng.normal(size=(round(ratio * D), D))
        return x.T @ x / (len(x) * D)**.5
    values = np.linalg.eigvalsh(sum(sign * wishart(ratio) for sign, ratio in parts))
    points, atom = law.quadrature(400), law.atom or (0., 0.)
    for x in np.quantile(values, np.linspace(.05, .95, 10)) + .02: assert abs(points.weight[points.x < x].sum() + atom[1] * (atom[0] < x) - (values < x).mean()) < .01


def test_what_is_no_law_has_no_quadrature():
    with pytest.raises(ValueError, match="no law's"): FreeLaw((0., 1., 0., 1.)).quadrature()


@pytest.mark.parametrize("law", [wishart_law, product_law])
def test_denoising_leaves_less_than_it_was_given(law):
    for ratio in (.05, .5, 2.):
        shares = np.array([denoising_error(law(ratio), s) / s for s in np.geomspace(1e-3, 1e3, 25)])
        assert (np.diff(shares) < 0).all() and 0 < shares[-1] and shares[0] < 1
        assert denoising_error(law(ratio), 1e5) == pytest.approx(law(ratio).variance, rel=1e-3)  # nothing is seen


def test_denoising_turns_with_the_matrix():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 60))
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in x.shape)
    np.testing.assert_allclose(denoise(u @ x @ v, .01), u @ denoise(x, .01) @ v, atol=1e-10)
    np.testing.assert_allclose(denoise(x.T, .01), denoise(x, .01).T, atol=1e-12)
    s = x @ x.T
    np.testing.assert_allclose(denoise_symmetric(u @ s @ u.T, .01), u @ denoise_symmetric(s, .01) @ u.T, atol=1e-9)
    np.testing.assert_allclose(denoise(x, 1e-14), x, atol=1e-10)


def test_zero_stays_zero_and_tensors_are_matrices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (denoise(np.zeros((3, 5)), .1) == 0).all() and (denoise_symmetric(np.zeros((4, 4)), .1) == 0).all()
    weight = torch.nn.Linear(6, 4).weight
    for tensor in (weight, weight.bfloat16(), weight.half()): np.testing.assert_array_equal(denoise(tensor, .01), denoise(tensor.detach().double().numpy(), .01))
    symmetric = weight @ weight.T
    np.testing.assert_array_equal(denoise_symmetric(symmetric, .01), denoise_symmetric(symmetric.detach().double().numpy(), .01))


@pytest.mark.parametrize("noise", [.1, 1., 5.])
def test_gaussian_matrices_shrink_by_one_factor(noise):
    """Of Gaussian entries in Gaussian noise the posterior mean is what is seen, over 1 + noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 200))
    symmetric = (x + x.T) * np.sqrt((1 + noise) / 400)  # 200 times the variance off the diagonal is 1 + noise
    left = noise / (1 + noise)  # squared, of each entry of variance 1
    assert np.square(denoise_symmetric(symmetric, noise / 200, semicircle_law(1 + noise)) - symmetric / (1 + noise)).sum() < .002 * left * 200
    inside = np.linspace(-1.9, 1.9, 9) * (1 + noise)**.5
    np.testing.assert_allclose(inside - 2 * noise * semicircle_law(1 + noise).hilbert(inside), inside / (1 + noise), rtol=1e-9)
    for shape in ((200, 600), (600, 200), (300, 300)):
        seen = rng.normal(size=shape) * np.sqrt(1 + noise)
        assert np.square(denoise(seen, noise) - seen / (1 + noise)).mean() < .03 * left


@pytest.mark.parametrize("p, q", [((), (1.,)), ((0., 1.), (0., 1.)), ((0., np.nan), (1.,)), ((1.,), (1.,)), ((0., -1.), (1.,))])
def test_what_is_no_law_is_refused(p, q):
    with pytest.raises(ValueError): FreeLaw(p, q)


def test_the_bayes_error_over_a_grid():
    alphas, deltas = np.geomspace(.02, 2, 10), (0., .01, .5, 2.)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rho in (.1, .5, 1., 2.):
            best = np.array([bayes_optimal_smse(alphas, rho, delta) for delta in deltas])
            assert (best >= 0).all() and (best <= 1).all() and (np.diff(best, axis=1) <= 1e-9).all() and (np.diff(best, axis=0) >= -1e-9).all()
            assert ((best[0] == 0) == (alphas >= recovery_threshold(rho))).all() and (best[1:] > 0).all()


def test_the_bayes_error_of_labels_with_almost_no_noise():
    for rho, delta in ((.5, 1e-9), (.1, 1e-8), (2., 1e-9)):
        threshold = recovery_threshold(rho)
        for alpha in (1.5 * threshold, 5 * threshold): assert bayes_optimal_smse(alpha, rho, delta) == pytest.approx(delta / 2 * threshold / (alpha - threshold), rel=.01)


def test_the_bracket_over_a_grid():
    alphas = np.geomspace(.05, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rho, delta in ((.2, 0.), (.2, .5), (2., .5)):
            lower, upper, approximation = untied_bounds(alphas, rho, delta)
            assert (lower <= approximation + 1e-7).all() and (approximation <= upper + 1e-7).all() and (upper <= 1).all() and (np.diff([lower, upper, approximation]) <= 1e-9).all()


def test_more_tokens_are_more_measurements():
    assert bayes_optimal_smse(.25, .5, .5, L=3) == pytest.approx(bayes_optimal_smse(.25 * 5 / 2, .5, .5, L=2), rel=1e-6)
