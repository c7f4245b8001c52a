"""The theory of teacher and student attention: beside training, message passing, sampling, and what must hold of any minimiser."""
import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tformer_lab.spectra.free_convolution import denoising_error, wishart_law
from tformer_lab.theory.attention_erm import ErmPrediction, erm_plateau, erm_tied_smse
from tformer_lab.theory.gamp_rie import gamp_rie, measured_labels
from tformer_lab.theory.teacher_student import bayes_label_error, bayes_optimal_smse, label_error, untied_bounds


def teacher(D, rho_star, rng):
    W = rng.normal(size=(round(rho_star * D), D))
    return W.T @ W / math.sqrt(len(W) * D)


def logits(x, S):
    return (x @ S @ x.swapaxes(1, 2) - np.trace(S) * np.eye(x.shape[1])) / math.sqrt(len(S))


def softmax(a):
    y = np.exp(a - a.max(-1, keepdims=True))
    return y / y.sum(-1, keepdims=True)


def samples(S, N, delta, rng, L=2, beta=1.):
    x, noise = rng.normal(size=(N, L, len(S))), rng.normal(size=(N, L, L))
    noise = (noise + noise.swapaxes(1, 2)) / 2  # 1 on the diagonal, 1/2 off it
    return x, softmax(beta * (logits(x, S) + math.sqrt(delta) * noise))


def trained(x, y, R, lam, beta, rng):
    """The experiment as it is written: a matrix W, the softmax, the ridge; gradients by autograd"""
    D = x.shape[2]
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    def parts(W):
        k = x @ W.T
        a = k @ k.transpose(1, 2) / (D * math.sqrt(R)) - torch.eye(2, dtype=x.dtype) * W.square().sum() / (D * math.sqrt(R))
        return (torch.softmax(beta * a, -1) - y).square().sum(), lam / math.sqrt(R / D) * W.square().sum()
    def objective(flat):
        W = torch.tensor(flat.reshape(R, D), requires_grad=True)
        total = sum(parts(W))
        total.backward()
        return total.item(), W.grad.numpy().ravel()
    W = minimize(objective, rng.normal(size=R * D), jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-9, "gtol": 1e-6}).x.reshape(R, D)
    return W.T @ W / math.sqrt(R * D), [part.item() / D**2 for part in parts(torch.from_numpy(W))]


# -------- ridge regression

@pytest.mark.parametrize("alpha, lam, said, simulated, apart", [(.5, .01, .2005, .202, .004), (1., .01, .0934, .0915, .003), (.5, .1, .3360, .336, .012)])
def test_the_error_of_a_ridge_is_the_known_one(alpha, lam, said, simulated, apart):
    found = erm_tied_smse(alpha, .5, .5, lam)
    assert found.status == "converged" and found.rank < .75
    assert found.smse == pytest.approx(said, abs=2e-4) and abs(found.smse - simulated) < apart
    assert found.smse == pytest.approx(1.5 - 2 * found.m + found.q, abs=1e-12)


@pytest.mark.parametrize("alpha, rho_star, delta, lam, beta", [(.5, .5, .5, .02, 1.), (.6, .3, .2, .1, 2.)])
def test_a_trained_student_has_the_order_parameters_losses_and_spectrum_of_the_theory(alpha, rho_star, delta, lam, beta):
    D, rng, seen, ranks = 60, np.random.default_rng(1), [], []
    for _ in range(3):
        S = teacher(D, rho_star, rng)
        student, parts = trained(*samples(S, round(alpha * D**2), delta, rng, beta=beta), round(.9 * D), lam, beta, rng)
        seen.append([(student * S).sum() / D, (student**2).sum() / D, *parts])
        ranks.append((np.linalg.eigvalsh(student) > 2e-3).mean())
    found = erm_tied_smse(alpha, rho_star, delta, lam, beta)
    np.testing.assert_allclose(np.mean(seen, 0), [found.m, found.q, found.data_loss, found.regularizer], rtol=.1)
    assert np.mean(ranks) == pytest.approx(found.rank, abs=.05) and found.spectrum.atom[1] == pytest.approx(1 - found.rank, abs=1e-3)
    places, weights = found.spectrum.quadrature()
    assert weights @ places * lam == pytest.approx(found.regularizer, rel=1e-3) and weights @ places**2 == pytest.approx(found.q, rel=1e-3)


def test_the_least_objective_moves_with_the_ridge_by_the_trace():
    """Of any minimum, and known to no equation of the fixed point."""
    for alpha, lam, beta in ((.5, .03, 1.), (1., .1, 1.5)):
        low, mid, high = (erm_tied_smse(alpha, .5, .5, lam * factor, beta, tolerance=5e-4) for factor in (.94, 1, 1.06))
        slope = (high.data_loss + high.regularizer - low.data_loss - low.regularizer) / (.12 * lam)
        assert slope == pytest.approx(mid.regularizer / lam, rel=3e-3)
        assert low.data_loss < mid.data_loss < high.data_loss and low.regularizer / .94 > mid.regularizer > high.regularizer / 1.06


def test_what_must_rise_or_fall_does():
    more_samples = [erm_tied_smse(alpha, .5, .5, .1) for alpha in (.05, .2, .6, 2.)]
    more_noise = [erm_tied_smse(.6, .5, delta, .1) for delta in (0., .3, 1.)]
    for name, sign in (("smse", -1), ("data_loss", 1), ("V", None)):
        if sign: assert (sign * np.diff([getattr(one, name) for one in more_samples]) > 0).all()
    assert (np.diff([one.smse for one in more_noise]) > 0).all() and (np.diff([one.data_loss for one in more_noise]) > 0).all()
    assert all(one.smse > bayes_optimal_smse(alpha, .5, .5) for one, alpha in zip(more_samples, (.05, .2, .6, 2.)))


def test_a_ridge_too_large_leaves_nothing_and_the_way_there_is_continuous():
    none = erm_tied_smse(.1, .5, .5, 5.)
    assert (none.smse, none.rank, none.regularizer, none.spectrum.support, none.spectrum.atom) == (1.5, 0, 0, (), (0, 1))
    edge = none.V_hat * none.spectrum.law.support[-1][1]
    assert erm_tied_smse(.1, .5, .5, 1.001 * edge).rank == 0
    little = erm_tied_smse(.1, .5, .5, .97 * edge)
    assert 0 < little.rank < .02 and 0 < little.q < .01 and little.data_loss == pytest.approx(none.data_loss, rel=.02)


def test_many_samples_end_on_the_plateau():
    plateau = erm_plateau(.5, .5)
    assert plateau.c == pytest.approx(.876, abs=5e-4) and plateau.smse == pytest.approx(.0230, abs=5e-5)
    rng = np.random.default_rng(0)
    t, n = rng.normal(size=(2, 400_000)) * [[math.sqrt(4.5)], [math.sqrt(.75)]]
    gaps = [np.square(1 / (1 + np.exp(-c * t)) - 1 / (1 + np.exp(-t - n))).mean() for c in (.8, .876, .95)]
    assert gaps[1] < gaps[0] and gaps[1] < gaps[2]
    for beta in (.5, 2.): assert erm_tied_smse(2000., .5, .5, 1e-3, beta, tolerance=1e-3).smse == pytest.approx(erm_plateau(.5, .5, beta).smse, rel=.02)


def test_twenty_points_over_many_parameters_and_no_number_that_is_not_vouched_for():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(20):
            rho_star, delta, beta = rng.uniform(.1, 1.5), rng.choice([0., .5, 1.5]), rng.choice([.5, 1.])
            alpha, lam = 10**rng.uniform(-2, .5), 10**rng.uniform(-2.3, -.3)
            found = erm_tied_smse(alpha, rho_star, delta, lam, beta)
            assert found.status == "converged", (alpha, rho_star, delta, lam, beta, found.status)
            values = [value for value in dataclasses.astuple(found) if isinstance(value, float)]
            assert np.isfinite(values).all() and found.smse >= bayes_optimal_smse(alpha, rho_star, delta) - 2e-3 and 0 <= found.rank <= 1


@pytest.mark.parametrize("alpha, rho_star, delta, lam", [(.05, .5, .5, 1e-3), (.4, .5, .5, 1e-3), (1., 1., .5, 1e-3), (.02, .5, .5, 1e-4), (.24, .5, .5, 1e-4), (.8, .3, 0., 1e-4), (1., .5, .5, 1e-5)])
def test_a_small_ridge_gives_no_warning_and_a_number_or_a_reason_why_there_is_none(alpha, rho_star, delta, lam):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = erm_tied_smse(alpha, rho_star, delta, lam)
    values = [value for value in dataclasses.astuple(found)[:10]]
    if found.status.startswith("not converged"): assert len(found.status) > 20 and np.isnan(values).all() and found.spectrum is None
    else:
        assert found.status == "converged" or found.status.startswith("approximate")
        assert np.isfinite(values).all() and found.smse >= bayes_optimal_smse(alpha, rho_star, delta) - 2e-3 and 0 < found.rank <= 1 and found.data_loss > 0


def test_where_samples_jump_between_minima_there_is_no_number():
    found = erm_tied_smse(.3, .5, .5, 1e-5)  # about as many samples as parameters, and next to no ridge
    assert found.status.startswith("not converged") and math.isnan(found.smse) and math.isnan(found.rank) and found.spectrum is None
    near = erm_tied_smse(.3, .5, .5, 1e-3)
    assert near.status.startswith("approximate") and near.smse == pytest.approx(.866, rel=.02) and abs(near.jumps) > .005


@pytest.mark.parametrize("changed", [{"alpha": 0.}, {"alpha": math.nan}, {"rho_star": 0.}, {"delta_in": -1.}, {"lam": 0.}, {"lam": math.inf}, {"beta": 0.}, {"L": 3}])
def test_what_has_no_prediction_is_refused(changed):
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"^{name} is"): erm_tied_smse(**{"alpha": .5, "rho_star": .5, "delta_in": .5, "lam": .1} | changed)
    if name in ("rho_star", "delta_in", "beta", "L"):
        with pytest.raises(ValueError, match=f"^{name} is"): erm_plateau(**{"rho_star": .5, "delta_in": .5} | changed)


# -------- message passing

@pytest.mark.parametrize("alpha, delta, said", [(.2, .5, .3191), (.4, .5, .1441), (.7, .5, .0762), (1., .5, .0516), (.1, 0., .3922)])
def test_message_passing_reaches_the_bayes_optimal_error(alpha, delta, said):
    D, rng, errors = 60, np.random.default_rng(2), []
    best = bayes_optimal_smse(alpha, .5, delta)
    assert best == pytest.approx(said, abs=1e-4)
    for _ in range(8):
        S = teacher(D, .5, rng)
        found = gamp_rie(*samples(S, round(alpha * D**2), delta, rng), .5, delta, tolerance=1e-5)
        assert found.converged and found.error[-1] == pytest.approx(best, rel=5e-3)
        errors.append(np.square(found.S - S).sum() / D)
    chance = np.std(errors, ddof=1) / math.sqrt(8)
    assert -2.5 * chance < np.mean(errors) - best < .09 * best + 2.5 * chance  # so small a matrix is some percent harder


@pytest.mark.parametrize("L, alpha", [(3, .2), (4, .1)])
def test_message_passing_with_more_tokens(L, alpha):
    D, rng, errors = 50, np.random.default_rng(3), []
    for _ in range(4):
        S = teacher(D, .5, rng)
        errors.append(np.square(gamp_rie(*samples(S, round(alpha * D**2), .5, rng, L, 2.), .5, .5, 2.).S - S).sum() / D)
    assert .95 < np.mean(errors) / bayes_optimal_smse(alpha, .5, .5, L) < 1.15


def test_without_noise_a_teacher_is_found_above_the_threshold_alone():
    rng = np.random.default_rng(4)
    S = teacher(40, .5, rng)
    above, below = (gamp_rie(*samples(S, round(alpha * 1600), 0., rng), .5, 0., tolerance=1e-5) for alpha in (.4, .12))
    assert np.square(above.S - S).sum() / 40 < 1e-5 < .1 < np.square(below.S - S).sum() / 40


def test_measurements_are_those_of_formed_matrices():
    rng = np.random.default_rng(5)
    for L in (2, 3):
        x, y = samples(teacher(6, .5, rng), 9, .5, rng, L)
        data, M = measured_labels(x, y), rng.normal(size=(6, 6))
        M += M.T
        tensors = np.einsum("kab,nai,nbj->nkij", data.basis, x, x) - np.trace(data.basis, axis1=1, axis2=2)[None, :, None, None] * np.eye(6)
        tensors = (tensors + tensors.swapaxes(2, 3)) / 2 / math.sqrt(6)
        g = rng.normal(size=data.s.shape)
        np.testing.assert_allclose(data.forward(M), np.einsum("nkij,ij->nk", tensors, M), atol=1e-12)
        np.testing.assert_allclose(data.adjoint(g), np.einsum("nkij,nk->ij", tensors, g), atol=1e-12)


def test_message_passing_refuses_what_it_cannot_read_and_says_when_it_has_not_converged():
    rng = np.random.default_rng(6)
    S = teacher(20, .5, rng)
    x, y = samples(S, 160, .5, rng)
    for call, said in ((lambda: gamp_rie(x, np.round(y), .5, .5), "not above 0"), (lambda: gamp_rie(x[0], y, .5, .5), "x has the shape"), (lambda: gamp_rie(x, y[:3], .5, .5), "y has the shape"),
                       (lambda: gamp_rie(x, y * 2, .5, .5), "sum to 1"), (lambda: gamp_rie(x, y, .5, -.5), "delta_in is"), (lambda: gamp_rie(x, y, .5, .5, damping=1.), "damping is"),
                       (lambda: gamp_rie(x, y, .5, .5, iterations=0), "iterations is"), (lambda: gamp_rie(x, y, .5, .5, beta=0.), "beta is"), (lambda: gamp_rie(x, y, 0., .5), "width_ratio is")):
        with pytest.raises(ValueError, match=said): call()
    short = gamp_rie(x, y, .5, .5, iterations=2)
    assert not short.converged and "still changes" in short.status and len(short.error) == 2


# -------- errors of labels, and all of it over a grid

def test_errors_of_fresh_labels():
    D, rng = 60, np.random.default_rng(7)
    found = {"clean": [], "noisy": [], "plain": []}
    for _ in range(4):
        S = teacher(D, .5, rng)
        estimate = gamp_rie(*samples(S, round(.3 * D**2), .5, rng), .5, .5, tolerance=1e-5).S
        x, y = samples(S, 2000, .5, rng)
        own, clean, E = logits(x, estimate), softmax(logits(x, S)), bayes_optimal_smse(.3, .5, .5)
        z = rng.normal(size=(100, 1, 2, 2))
        z = (z + z.swapaxes(2, 3)) / 2 * math.sqrt(2)  # variance 2 on the diagonal, 1 off it
        mean = lambda variance: softmax(own + math.sqrt(variance) * z).mean(0)
        found["clean"].append(np.square(mean(E) - clean).sum((1, 2)).mean())
        found["noisy"].append(np.square(mean(E + .25) - y).sum((1, 2)).mean())
        m, q, Q0 = ((a * b).sum() / D for a, b in ((estimate, S), (estimate, estimate), (S, S)))
        found["plain"].append([np.square(softmax(own) - y).sum((1, 2)).mean(), label_error(m, q, Q0, .5), np.square(softmax(own) - clean).sum((1, 2)).mean(), label_error(m, q, Q0, .5, noisy=False)])
    assert np.mean(found["clean"]) == pytest.approx(bayes_label_error(E, 1.5, .5, noisy=False), rel=.08)
    assert np.mean(found["noisy"]) == pytest.approx(bayes_label_error(E, 1.5, .5), rel=.04)
    plain = np.mean(found["plain"], 0)
    assert plain[0] == pytest.approx(plain[1], rel=.03) and plain[2] == pytest.approx(plain[3], rel=.05)
    assert np.mean(found["noisy"]) < plain[0] and np.mean(found["clean"]) < plain[2]


@pytest.mark.parametrize("call, said", [(lambda: label_error(2., 1., 1.5, .5), "m is"), (lambda: label_error(math.nan, 1., 1.5, .5), "m is"), (lambda: label_error(1., 1., 1.5, -1.), "delta_in is"),
                                        (lambda: bayes_label_error(-.1, 1.5, .5), "E is"), (lambda: bayes_label_error(1.6, 1.5, .5), "E is"), (lambda: bayes_label_error(.1, 1.5, .5, L=3), "L is"), (lambda: label_error(1., 1., 1.5, .5, beta=1e4), "beta times")])
def test_labels_that_have_no_error_are_refused(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_the_best_errors_over_a_wide_grid():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alphas, deltas = np.geomspace(.01, 5, 10), (0., .01, .5, 3.)  # 400 points
        for rho in (.03, .3, .75, 1., 3.):
            best = np.array([[bayes_optimal_smse(alphas, rho, delta, L) for delta in deltas] for L in (2, 4)])
            assert np.isfinite(best).all() and (best >= 0).all() and (best <= 1).all() and (np.diff(best, axis=1) >= -1e-9).all() and (np.diff(best, axis=2) <= 1e-9).all() and (best[1] <= best[0] + 1e-9).all()


def test_the_bracket_over_a_wide_grid():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rho in (.05, .3, .75, 1., 2.5):  # 400 points
            for delta in (0., .01, .1, .5, 3.):
                lower, upper, approximation = untied_bounds(np.geomspace(.01, 5, 16), rho, delta)
                assert np.isfinite([lower, upper, approximation]).all() and (lower <= approximation + 1e-7).all() and (approximation <= upper + 1e-7).all() and (upper <= 1).all()
    assert untied_bounds(.8, .5, .5).approximation == pytest.approx(.2387, abs=5e-4)


def test_denoising_leaves_what_was_measured():
    for noise, said in ((.05, .0353), (.5, .2493), (2., .5756)): assert denoising_error(wishart_law(.5), noise) == pytest.approx(said, abs=1e-4)
    assert {"smse", "status", "spectrum"} <= {field.name for field in dataclasses.fields(ErmPrediction)}
