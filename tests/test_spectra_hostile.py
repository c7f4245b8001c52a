"""Hostile input to the instrument: NaN with a status, or an error that says what is wrong; never a crash deep in LAPACK, never a plausible number."""
import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tformer_lab.spectra.analysis import analyze, main
from tformer_lab.spectra.changes import gradient_matrices, weight_difference
from tformer_lab.spectra.checkpoints import find_checkpoints, from_checkpoints
from tformer_lab.spectra.decomposition import read_spectra, singular_values, singular_vectors
from tformer_lab.spectra.history import SpectrumHistory, SpectrumRecord, pack, record, unpack
from tformer_lab.spectra.matrices import Product, weight_matrices
from tformer_lab.spectra.metrics import QUARTILES, inverse_participation, quantiles, spectral_metrics
from tformer_lab.spectra.nulls import compare_with_null, gaussian_null, null_band, percentile_in, permutation_nulls, with_tail
from tformer_lab.spectra.tails import PowerLawFit, compare_tails, fit_power_law, goodness_of_fit, hill, xmin_table
from tformer_lab.spectra.tracking import subspace_overlap, track

SAMPLE = np.random.default_rng(0).pareto(1.5, 60) + 1
NOTHING = {"zeros": np.zeros(20), "one value": [3.], "empty": [], "two values": [2., 2., 2., 1., 1.], "all equal": np.full(30, 2.), "equal but for zeros": np.r_[np.full(20, 3.), np.zeros(9)],
           "NaN": np.r_[np.nan, SAMPLE], "infinite": np.r_[SAMPLE, np.inf], "nothing but NaN": np.full(9, np.nan), "booleans": np.arange(30) % 2 == 0, "seven values": [1, 2, 3, 4, 5, 6, 7]}


# values that no tail can be fitted to

@pytest.mark.parametrize("name", NOTHING)
def test_values_without_a_tail_give_nan_and_the_reason(name):
    x = NOTHING[name]
    fit = fit_power_law(x)
    assert fit.status not in ("ok", "") and fit.n_tail == 0 and np.isnan([fit.alpha, fit.alpha_mle, fit.sigma, fit.xmin, fit.ks]).all() and fit.verdict == ""
    test = goodness_of_fit(x, draws=5)
    assert test.status == fit.status and test.draws == 0 and np.isnan([test.p_value, test.low, test.high]).all()
    assert len(compare_tails(x)) == 0
    if len(x) >= 12:
        beside = fit_power_law(x, null=gaussian_null(len(x), 2 * len(x), 30)**2)
        assert beside.verdict == "" and np.isnan(beside.percentile)
    assert fit_power_law(x, xmin=1.5).status != "ok" and fit_power_law(x, xmax=9.).status != "ok"


@pytest.mark.parametrize("name", ["zeros", "all equal", "two values", "NaN", "infinite", "empty", "one value", "nothing but NaN"])
def test_thresholds_and_hill_are_empty_or_nan_where_there_is_nothing_to_fit(name):
    x = NOTHING[name]
    assert len(xmin_table(x)) == 0
    found = hill(x)
    assert found.shape == (max(len(x) - 1, 0),)
    if name != "two values": assert np.isnan(found).all()
    else: np.testing.assert_allclose(found, [np.nan, np.nan, 1 + 3 / (3 * np.log(2)), 1 + 4 / (3 * np.log(2))])


FITS = (hill, fit_power_law, xmin_table, goodness_of_fit, compare_tails)


@pytest.mark.parametrize("function", FITS)
@pytest.mark.parametrize("x", [-SAMPLE, np.r_[SAMPLE, -1e-300], 3., np.float64(3), torch.tensor(2.), None, ["a", "b"], {"a": 1.}, [[1., 2.], [3.]], object()], ids=lambda x: type(x).__name__)
def test_what_is_no_sample_is_refused(function, x):
    with pytest.raises((ValueError, TypeError)) as error: function(x)
    assert len(str(error.value)) > 10


@pytest.mark.parametrize("options, words", [(dict(xmin=0.), "xmin"), (dict(xmin=-1.), "xmin"), (dict(xmin=np.nan), "xmin"), (dict(xmin=np.inf), "xmin"), (dict(xmax=0.), "xmax"), (dict(xmax=np.nan), "xmax"),
                                            (dict(xmin=3., xmax=3.), "between"), (dict(precision=0.), "precision"), (dict(precision=-.1), "precision"), (dict(precision=np.nan), "precision"),
                                            (dict(null=np.zeros((4, 20))), "null"), (dict(null=[]), "null"), (dict(null=np.full((3, 9), np.nan)), "null"), (dict(null=np.ones((3, 9))), "null"), (dict(null="gaussian"), "real numbers")])
def test_limits_that_are_none_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words): fit_power_law(SAMPLE, **options)


@pytest.mark.parametrize("options", [dict(draws=0), dict(draws=-3), dict(level=0.), dict(level=1.), dict(level=np.nan), dict(precision=0.)])
def test_a_bootstrap_of_nothing_is_refused(options):
    with pytest.raises(ValueError): goodness_of_fit(SAMPLE, **options)


def test_a_threshold_beyond_the_values_or_a_cut_below_them_leaves_no_fit():
    largest = float(SAMPLE.max())
    for fit in (fit_power_law(SAMPLE, xmin=2 * largest), fit_power_law(SAMPLE, xmin=largest), fit_power_law(SAMPLE, xmax=.5), fit_power_law(np.r_[SAMPLE, 2 * largest, 2 * largest], xmin=2 * largest)):
        assert fit.status != "ok" and np.isnan(fit.alpha) and fit.n_tail == 0
    assert len(xmin_table(SAMPLE, xmax=.5)) == 0
    with pytest.raises(ValueError, match="cut-off"): compare_tails(SAMPLE, fit_power_law(SAMPLE, xmax=largest / 2))


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_the_fit_holds_at_the_ends_of_floating_point(scale):
    for options in ({}, {"xmax": 20.}):
        fit, again = fit_power_law(SAMPLE, **options), fit_power_law(SAMPLE * scale, **{name: value * scale for name, value in options.items()})
        np.testing.assert_allclose([again.alpha, again.sigma, again.ks, again.xmin / scale, again.n_tail], [fit.alpha, fit.sigma, fit.ks, fit.xmin, fit.n_tail], rtol=1e-8)
    np.testing.assert_allclose(hill(SAMPLE * scale), hill(SAMPLE), rtol=1e-8)
    np.testing.assert_allclose(goodness_of_fit(SAMPLE * scale, draws=20).p_value, goodness_of_fit(SAMPLE, draws=20).p_value)
    np.testing.assert_allclose(compare_tails(SAMPLE * scale).log_ratio, compare_tails(SAMPLE).log_ratio, rtol=1e-4, atol=1e-4)


def test_integers_lists_and_small_floats_are_fitted_as_the_numbers_that_they_are():
    x = np.arange(30, 0, -1)
    expected = fit_power_law(x.astype(float))
    for same in (x, x.tolist(), x.astype(np.uint8), x.astype(np.float16), torch.from_numpy(x), torch.from_numpy(x).bfloat16()): assert fit_power_law(same) == expected
    assert fit_power_law(torch.from_numpy(x).double().requires_grad_()) == expected


def test_a_hopeless_sample_leaves_its_neighbours_alone():
    batch = np.stack([SAMPLE, np.r_[np.nan, SAMPLE[1:]], np.zeros(60), np.ones(60), SAMPLE[::-1]])
    table = fit_power_law(batch, null=gaussian_null(60, 90, 30)**2)
    assert (table.status == "ok").tolist() == [True, False, False, False, True] and table.alpha.notna().tolist() == [True, False, False, False, True]
    np.testing.assert_allclose(table.alpha[[0, 4]], fit_power_law(SAMPLE).alpha)
    assert table.status.nunique() == 4 and (table.verdict[1:4] == "").all()


def test_a_batch_of_no_samples_and_samples_of_no_values_are_no_accident():
    assert len(fit_power_law(np.zeros((0, 5)))) == 0 and fit_power_law(np.zeros((3, 0))).status.tolist() == ["no positive values"] * 3
    assert hill(np.zeros((3, 0))).shape == (3, 0) and hill(np.ones((3, 1))).shape == (3, 0)


# singular values

@pytest.mark.parametrize("s", [[1., 2.], [2., -1.], [-1.], np.float64(3), 3., None, ["b", "a"], {"a": 1.}, torch.tensor(1.), [[3., 1.], [2.]]], ids=lambda s: type(s).__name__)
def test_what_are_no_singular_values_is_refused(s):
    for function in (spectral_metrics, quantiles):
        with pytest.raises((ValueError, TypeError)): function(s)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_metrics_of_spectra_that_say_nothing_are_nan(make):
    for s in ([float("nan"), 1., 0.], [3., float("nan"), 1.], [float("inf"), 1.], [float("inf"), float("inf")], [float("nan")], []):
        assert all(map(np.isnan, spectral_metrics(make(s)).values())), s
    zero = spectral_metrics(make([0.] * 12))
    assert {name for name, value in zero.items() if value == 0} == {"numerical_rank", "spectral_norm", "frobenius_norm", *QUARTILES} and sum(map(np.isnan, zero.values())) == len(zero) - 6
    one = spectral_metrics(make([2.]))
    assert one["stable_rank"] == one["effective_rank"] == one["condition_number"] == 1 and np.isnan(one["decay_exponent"]) and np.isnan(one["decay_r2"])
    assert len(spectral_metrics(make(np.zeros((0, 9))))) == 0 and spectral_metrics(make(np.zeros((4, 0)))).isna().all(axis=None)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-160, 1e160, 1e300])
def test_metrics_neither_overflow_nor_underflow(scale):
    s = 1 / np.arange(1., 21)
    usual, extreme = spectral_metrics(s), spectral_metrics(s * scale)
    for name in usual: np.testing.assert_allclose(extreme[name] / (scale if name in ("spectral_norm", "frobenius_norm", *QUARTILES) else 1), usual[name], rtol=1e-2 if scale < 1e-310 else 1e-9, err_msg=name)


def test_integers_and_booleans_are_singular_values_too():
    np.testing.assert_allclose(list(spectral_metrics(np.arange(9, 0, -1)).values()), list(spectral_metrics(np.arange(9., 0, -1)).values()))
    assert spectral_metrics(torch.tensor([3, 2, 1]))["stable_rank"] == pytest.approx(14 / 9) and spectral_metrics([True, True, False])["numerical_rank"] == 2


@pytest.mark.parametrize("levels", [(-.1,), (1.1,), (float("nan"),), (.5, 2)])
def test_levels_that_are_no_shares_are_refused(levels):
    with pytest.raises(ValueError, match="levels"): quantiles([3., 2.], levels)
    with pytest.raises(ValueError, match="level"): null_band(gaussian_null(4, 4, 5), level=levels[-1])


def test_localization_of_what_are_no_columns_is_refused_and_of_zeros_is_nan():
    with pytest.raises(ValueError, match="columns"): inverse_participation(np.ones(4))
    with np.errstate(invalid="ignore"): assert np.isnan(inverse_participation(np.zeros((4, 2)))).all() and inverse_participation(torch.full((4, 1), float("nan"))).isnan().all()


# matrices

WRONG = {"numpy": np.eye(3), "one dimension": torch.ones(3), "none": torch.tensor(1.), "three": torch.ones(2, 2, 2), "integers": torch.eye(3).long(), "booleans": torch.eye(3).bool(),
         "complex": torch.eye(3).cfloat(), "None": None, "text": "a", "list": [[1.]]}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_matrix_is_refused_with_its_name(name):
    for function in (lambda x: singular_values({"the weight": x}), lambda x: list(read_spectra({"the weight": x})), lambda x: singular_values({"good": torch.eye(2), "the weight": x})):
        with pytest.raises((ValueError, TypeError), match="the weight"): function(WRONG[name])
    with pytest.raises((ValueError, TypeError), match="the matrix"): singular_vectors(WRONG[name])
    with pytest.raises((ValueError, TypeError)): record({"a": WRONG[name]}, 0)
    with pytest.raises((ValueError, TypeError)): analyze({"a": WRONG[name]}, progress=False)


NAN, INF = float("nan"), float("inf")
BROKEN = {"NaN": torch.tensor([[1., NAN], [2., 3.], [4., 5.]]), "infinite": torch.tensor([[INF, 1., 2.]]), "minus infinite": torch.tensor([[-INF, INF], [1., 1.]]), "all NaN": torch.full((4, 6), NAN),
          "overflown half": (torch.full((3, 3), 60000.) * 2).half(), "NaN in double": torch.eye(4).double() * NAN, "NaN in a factor": Product(torch.full((5, 2), NAN), torch.ones(2, 5))}


@pytest.mark.parametrize("name", BROKEN)
def test_entries_that_are_not_finite_give_nan_and_leave_their_neighbours_alone(name):
    broken = BROKEN[name]
    good = torch.randn(broken.shape, generator=torch.Generator().manual_seed(0)).to(broken.dtype)
    found = dict(read_spectra({"before": good, "broken": broken, "after": 2 * good}))
    assert np.isnan(found["broken"].values).all() and np.isnan(found["broken"].variance) and found["broken"].shape == tuple(broken.shape)
    for neighbour, factor in (("before", 1), ("after", 2)): np.testing.assert_allclose(found[neighbour].values, torch.linalg.svdvals(factor * good.double()), rtol=1e-6)
    assert np.isnan(permutation_nulls({"x": broken}, 3)["x"]).all()
    with pytest.raises(ValueError, match="finite"): singular_vectors(broken)
    with pytest.raises(ValueError, match="finite"): subspace_overlap(broken, good, 1)
    with pytest.raises(ValueError, match="finite"): track({0: {"w": good}, 1: {"w": broken if not isinstance(broken, Product) else broken.dense()}}, "w", k=1)


@pytest.mark.parametrize("matrix, values", [(torch.zeros(5, 7), [0] * 5), (torch.ones(1, 9), [3]), (torch.ones(9, 1), [3]), (torch.ones(1, 1), [1]), (torch.ones(4, 4), [4, 0, 0, 0]), (torch.eye(6), [1] * 6),
                                            (torch.zeros(0, 3), []), (torch.full((3, 4), 2.**127), [12**.5 * 2.**127, 0, 0]), (torch.full((2, 8), 2.**-149), [2.**-147, 0]), (torch.full((2, 2), 2.**-14).half(), [2.**-13, 0]),
                                            (torch.full((4, 4), 2.**-1060, dtype=torch.float64), [2.**-1058, 0, 0, 0])])
def test_degenerate_matrices_have_the_values_that_they_have(matrix, values):
    s = singular_values({"a": matrix})["a"]
    np.testing.assert_allclose(s, values, rtol=1e-6, atol=1e-6 * max(values, default=0))
    assert s.dtype == np.float64 and (s >= 0).all()


def test_vectors_and_subspaces_that_are_not_defined_are_refused_or_nan():
    zero, one = torch.zeros(5, 4), torch.ones(5, 1) @ torch.ones(1, 4)
    for k in (0, -1, 5):
        with pytest.raises(ValueError, match="k is"): singular_vectors(zero, k)
        with pytest.raises(ValueError, match="k is"): subspace_overlap(one, one, k)
        with pytest.raises(ValueError, match="k is"): track({0: {"w": one}}, "w", k=k)
    for a, b, k in ((zero, one, 1), (one, zero, 1), (zero, zero, 2), (one, one, 2), (torch.eye(5, 4), one, 1)):
        overlap = subspace_overlap(a, b, k)
        assert np.isnan([overlap.left, overlap.right]).all() and np.isnan(overlap.left_cosines).all() and overlap.gap < 1e-6
    assert subspace_overlap(one, one, 1).left == pytest.approx(1)
    with pytest.raises(ValueError, match="one space"): subspace_overlap(one, one.T, 1)
    for wrong in (np.ones((5, 4)), torch.ones(5, 4).long(), torch.ones(5)):
        with pytest.raises((ValueError, TypeError)): subspace_overlap(wrong, wrong, 1)


def test_tracking_through_a_matrix_of_zeros_does_not_lose_the_directions():
    u, v = (torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i))).Q for i in range(2))
    at = [u * torch.tensor(s, dtype=torch.float64) @ v.mT for s in ((3, 2, 1), (0, 0, 0), (1, 2, 3))]
    paths = track({step: {"w": w} for step, w in enumerate(at)}, "w", k=2, leading_at="first")
    np.testing.assert_allclose(paths.values, [[3, 2], [0, 0], [1, 2]], atol=1e-9)
    np.testing.assert_allclose(paths.similarity[[0, 2]], 1)


@pytest.mark.parametrize("checkpoints, matrix, error", [({}, "w", ValueError), (None, "w", ValueError), ({0: {"w": torch.eye(3)}}, "v", KeyError), ({0: {"w": torch.ones(3)}}, "w", KeyError),
                                                        ({0: {"w": torch.eye(3)}, 1: {"v": torch.eye(3)}}, "w", KeyError), ({0: {"w": torch.eye(3).long()}}, "w", KeyError)])
def test_tracking_what_is_not_there_names_what_is(checkpoints, matrix, error):
    with pytest.raises(error) as raised: track(checkpoints, matrix, k=1)
    assert len(str(raised.value)) > 15


# nulls

@pytest.mark.parametrize("rows, columns, draws", [(0, 4, 5), (4, 0, 5), (-1, 4, 5), (4, 4, 0), (4, 4, -2), (4, 4, 2.5), (4, 4, None), (4, 4, "5")])
def test_a_null_of_no_shape_or_no_draws_is_refused(rows, columns, draws):
    with pytest.raises(ValueError): gaussian_null(rows, columns, draws)
    if draws != 5:
        with pytest.raises(ValueError, match="draws"): permutation_nulls({"a": torch.eye(3)}, draws)


def test_nulls_cannot_be_changed_by_who_asked_for_them():
    with pytest.raises(ValueError): gaussian_null(5, 4)[0, 0] = 9.


def test_one_row_and_one_column_have_nulls():
    np.testing.assert_allclose((gaussian_null(1, 50, 4000)**2).mean(), 50, rtol=.02)
    assert gaussian_null(1, 1, 3).shape == (3, 1) and permutation_nulls({"a": torch.ones(1, 4)}, 2)["a"].shape == (2, 1)
    assert permutation_nulls({}) == {} and permutation_nulls({"a": torch.zeros(0, 4)}, 2)["a"].shape == (2, 0)


def test_a_comparison_with_nothing_is_nan_without_a_verdict():
    null = gaussian_null(20, 20, 50)
    table = compare_with_null(np.full(20, np.nan), null)
    assert table.value.isna().all() and table.percentile.isna().all() and (table.verdict == "").all() and table.null_low.notna().any()
    nothing = compare_with_null(null[0], np.full((5, 20), np.nan))
    assert nothing.percentile.isna().all() and (nothing.verdict == "").all() and nothing.null_low.isna().all()
    few = compare_with_null(gaussian_null(3, 9, 2)[0], gaussian_null(3, 9, 50))
    assert np.isnan(few.value["tail_alpha"]) and few.verdict["tail_alpha"] == "" and few.verdict["stable_rank"] != ""
    zero = compare_with_null(np.zeros(20), null)
    assert zero.verdict["frobenius_norm"] == "below" and zero.verdict["stable_rank"] == "" and zero.percentile["spectral_norm"] == 0
    assert np.isnan(percentile_in(3., np.full(4, np.nan))) and np.isnan(percentile_in(np.nan, np.ones(4))) and np.isnan(percentile_in(3., np.zeros(0)))


@pytest.mark.parametrize("s, null", [(np.ones(3), np.ones((2, 4))), (np.ones((1, 3)), np.ones((2, 3))), (np.ones(3), np.ones(3)), ([1., 2.], np.ones((4, 2))), (["a"], np.ones((1, 1)))])
def test_a_comparison_of_what_does_not_match_is_refused(s, null):
    with pytest.raises(ValueError): compare_with_null(s, null)


def test_metrics_with_tail_of_no_spectra_are_empty_and_of_one_are_single_numbers():
    assert with_tail(np.zeros((0, 12)))["tail_alpha"].shape == (0,)
    assert np.isnan(with_tail(np.zeros(12))["tail_alpha"]) and with_tail(np.ones(12))["stable_rank"] == 12


# records and histories

@pytest.mark.parametrize("model", [{}, {"a": 1}, {"a": torch.ones(3)}, {"a": torch.zeros(0, 3)}, {"a": torch.eye(2).long()}, torch.nn.ReLU(), None, 3, [torch.eye(2)], "no/such/file.pt"])
def test_a_record_of_nothing_is_an_error(model):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)): record(model, 0)


def test_records_that_lie_are_refused():
    tensors, metadata = pack(record({"a": torch.randn(4, 3), "b": torch.randn(3, 8)}, 5))
    about = json.loads(metadata["matrices"])
    for change in ({"matrices": "{"}, {"matrices": "[1]"}, {"matrices": json.dumps(about * 2)}, {"matrices": json.dumps([about[0] | {"name": 3}])}, {"matrices": json.dumps([about[0] | {"shape": [4]}])},
                   {"matrices": json.dumps([about[0] | {"rank": -1}])}, {"matrices": json.dumps([about[0] | {"variance": None}])}, {"step": "five"}, {"format": "new"}, {"matrices": None}):
        with pytest.raises(ValueError, match="no recorded spectra"): unpack(tensors, metadata | change)
    for key in metadata:
        with pytest.raises(ValueError, match="no recorded spectra"): unpack(tensors, {name: value for name, value in metadata.items() if name != key})


def test_a_matrix_of_another_shape_is_refused_and_changes_nothing():
    history = SpectrumHistory([record({"a": torch.eye(3)}, 0)])
    with pytest.raises(ValueError, match="a is .* at step 1"): history.add(SpectrumRecord(1, record({"b": torch.eye(2)}, 1).spectra | record({"a": torch.ones(3, 4)}, 1).spectra))
    assert history.steps.tolist() == [0] and history.matrices == ["a"]
    with pytest.raises(KeyError, match="there are a"): history["b"]


def test_a_broken_step_is_nan_in_the_history_and_in_its_metrics_only():
    history = SpectrumHistory([record({"a": torch.eye(12) * (step if step != 2 else NAN)}, step) for step in (1, 2, 3)])
    table = history.metrics(tails=True).set_index(["metric", "step"])["value"]
    assert table["spectral_norm"].tolist()[::2] == [1, 3] and np.isnan(table["spectral_norm", 2]) and np.isnan(table["tail_alpha"]).all() and (table["tail_n_tail"] == 0).all()


# whole models

def hostile_model():
    generator = torch.Generator().manual_seed(0)
    return {"good.weight": torch.randn(30, 40, generator=generator), "nan.weight": torch.full((30, 40), NAN), "one_inf.weight": torch.randn(30, 40, generator=generator).index_fill(0, torch.tensor([2]), INF),
            "zero.weight": torch.zeros(30, 40), "row.weight": torch.ones(1, 40), "rank_one.weight": torch.ones(30, 1) @ torch.ones(1, 40), "flat.weight": torch.eye(30, 40),
            "also.weight": torch.randn(40, 30, generator=generator), "bias": torch.zeros(30), "count": torch.tensor(3), "table": torch.zeros(3, 3).long(), "empty.weight": torch.zeros(0, 4), "text": "no tensor"}


@pytest.mark.parametrize("null", ["gaussian", "permutation", None])
def test_good_matrices_beside_hopeless_ones_have_the_rows_that_they_have_alone(null):
    weights = hostile_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table = analyze(weights, null, 20, vectors=True, bootstrap=5, progress=False).set_index("matrix")
        alone = analyze({name: weights[name] for name in ("good.weight", "also.weight")}, null, 20, vectors=True, bootstrap=5, progress=False).set_index("matrix")
    assert set(table.index) == {name.removesuffix(".weight") for name in weights if name.endswith("weight") and name != "empty.weight"} and len(table.attrs["left_out"]) == 5
    numbers = alone.select_dtypes("number").columns
    np.testing.assert_allclose(table.loc[["good", "also"], numbers].astype(float), alone[numbers].astype(float), rtol=1e-9)
    assert (table.loc[["good", "also"], "skipped"] == "").all() and table.loc[["good", "also"], "alpha"].notna().all()
    for name in ("nan", "one_inf"):
        assert table.skipped[name] == "all: entries that are not finite" and table.loc[name, [*numbers.drop(["rows", "columns", "rank", "layer", "head", "n_tail", "n_spikes", "alpha_null_low", "alpha_null_high"], errors="ignore")]].isna().all()
    for name in ("zero", "row", "rank_one", "flat"): assert "tail: " in table.skipped[name] and np.isnan(table.alpha[name]) and (null is None or table.alpha_verdict[name] == "")
    assert table.numerical_rank[["zero", "row", "rank_one", "flat"]].tolist() == [0, 1, 1, 30]


@pytest.mark.parametrize("x, error", [({}, ValueError), ({"a": torch.zeros(3)}, ValueError), (None, TypeError), (3, TypeError), (torch.eye(3), TypeError), ([torch.eye(3)], TypeError), ("no/such/folder", FileNotFoundError),
                                      (torch.nn.ReLU(), ValueError), ({1: torch.eye(3)}, TypeError), (np.eye(3), TypeError)], ids=str)
def test_what_holds_no_weights_is_refused(x, error):
    with pytest.raises(error) as raised: analyze(x, progress=False)
    assert len(str(raised.value)) > 15


@pytest.mark.parametrize("options, words", [(dict(null="gauss"), "null"), (dict(draws=0), "draws"), (dict(bootstrap=-1), "bootstrap"), (dict(gradients=True), "nn.Module"), (dict(minus={"b": torch.eye(3)}), "no matrix"),
                                            (dict(include="nothing.*"), "nothing"), (dict(kinds="nonsense"), "nonsense"), (dict(min_size=99), "no matrix"), (dict(heads=-1), "heads")])
def test_questions_that_make_no_sense_are_refused_before_any_work(options, words, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    with pytest.raises((ValueError, TypeError), match=words): analyze({"a": torch.eye(3)}, progress=False, **options)


def test_a_difference_or_a_gradient_of_nothing_is_refused():
    some = weight_matrices({"a": torch.eye(3)})
    with pytest.raises(ValueError, match="common"): weight_difference(some, weight_matrices({"a": torch.ones(3, 4)}))
    assert (singular_values(weight_difference(some, some))["a"] == 0).all()
    with pytest.raises(TypeError, match="nn.Module"): gradient_matrices({"a": torch.eye(3)})
    with pytest.raises(ValueError, match="backward"): gradient_matrices(torch.nn.Linear(2, 2))
    table = analyze({"a": torch.eye(20)}, minus={"a": torch.eye(20)}, progress=False, draws=5)
    assert table.spectral_norm[0] == 0 and np.isnan(table.alpha[0]) and "no positive values" in table.skipped[0]


# the console script

class Malice:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"w.weight": torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), "nan.weight": torch.full((9, 9), NAN)}, tmp_path / "model.safetensors")
    return tmp_path


def contents(folder): return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys, folder, *arguments):
    before = contents(folder)
    try: code = main(list(arguments))
    except SystemExit as error: code = error.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.strip() and "Traceback" not in said.err and contents(folder) == before
    return said.err


def test_the_script_writes_a_table_and_never_over_one(folder, capsys):
    assert main(["model.safetensors", "--draws", "5"]) == 0
    first = (folder / "model-spectra.csv").read_bytes()
    assert first and sorted(contents(folder)) == ["model-spectra.csv", "model.safetensors"]
    capsys.readouterr()
    assert "exists already" in refused(capsys, folder, "model.safetensors", "--draws", "7", "--seed", "3")
    assert main(["model.safetensors", "--draws", "7", "--seed", "3", "--force"]) == 0 and (folder / "model-spectra.csv").read_bytes() != first
    assert main([".", "-o", "other.json", "--draws", "5", "--null", "none"]) == 0
    rows = json.loads((folder / "other.json").read_text())
    assert {row["matrix"] for row in rows} == {"w", "nan"} and [row["stable_rank"] is None for row in rows if row["matrix"] == "nan"] == [True]


@pytest.mark.parametrize("arguments, words", [(["missing.safetensors"], "missing"), (["model.safetensors", "-o", "x.xlsx"], "csv"), (["model.safetensors", "-o", "nowhere/x.csv"], "folder"), (["model.safetensors", "--include", "q*"], "q"),
                                              (["model.safetensors", "--draws", "0"], "draws"), (["model.safetensors", "--draws", "many"], "draws"), (["model.safetensors", "--null", "uniform"], "null"), (["model.safetensors", "--minus", "gone.pt"], "gone"),
                                              (["model.safetensors", "--kinds", "nonsense"], "nonsense"), (["model.safetensors", "--min-size", "500"], "no matrix"), (["model.safetensors", "--heads", "0"], "heads"), (["model.safetensors", "--bootstrap", "-1"], "bootstrap"), ([], "path")])
def test_the_script_says_what_is_wrong_and_leaves_nothing_behind(folder, capsys, arguments, words):
    assert words in refused(capsys, folder, *arguments)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl", "broken.safetensors"])
@pytest.mark.parametrize("write", ["pickle", "torch", "inside"])
def test_no_pickle_runs_code(folder, capsys, name, write):
    malice, path = Malice(folder / "owned"), folder / name
    if write == "pickle": path.write_bytes(pickle.dumps(malice, protocol=2))
    else: torch.save(malice if write == "torch" else {"a": torch.eye(3), "b": malice}, path)
    assert name in refused(capsys, folder, name)
    assert name in refused(capsys, folder, "model.safetensors", "--minus", name)
    for function in (analyze, lambda x: record(x, 0), lambda x: track({0: x}, "a", k=1)):
        with pytest.raises(ValueError, match=name): function(path)
    (folder / "run").mkdir()
    path.rename(folder / "run" / f"step-1{path.suffix}")
    with pytest.raises((ValueError, FileNotFoundError)): from_checkpoints(folder / "run", progress=False)
    assert not (folder / "owned").exists() and not list((folder / "run").glob("*/*.safetensors"))


def test_the_malice_of_these_tests_works(tmp_path):
    pickle.loads(pickle.dumps(Malice(tmp_path / "owned"), protocol=2))
    assert (tmp_path / "owned").exists()


# checkpoints that are none

@pytest.mark.parametrize("steps, error", [([1], ValueError), ([1, 1], ValueError), ({"a-9.pt": 3}, ValueError), ({"a-1.pt": 3, "a-2.pt": 3}, ValueError), (["x", "y"], ValueError), (3, TypeError)])
def test_steps_that_do_not_fit_the_checkpoints_are_refused(tmp_path, steps, error):
    for i in (1, 2): torch.save({"w": torch.eye(3)}, tmp_path / f"a-{i}.pt")
    with pytest.raises(error): find_checkpoints(tmp_path, steps)
    with pytest.raises(error): from_checkpoints(tmp_path, steps, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["a-1.pt", "a-2.pt"]


def test_folders_without_checkpoints_and_options_that_are_none_are_refused(tmp_path):
    for where in (tmp_path, tmp_path / "gone", tmp_path / "*.pt", None, ""):
        with pytest.raises(FileNotFoundError): from_checkpoints(where, progress=False)
    torch.save({"w": torch.eye(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no step"): from_checkpoints(tmp_path, progress=False)
    (tmp_path / "a.pt").rename(tmp_path / "a-1.pt")
    for options in (dict(minus="last"), dict(minus="first"), dict(minus="previous")):
        with pytest.raises(ValueError): from_checkpoints(tmp_path, progress=False, **options)
    with pytest.raises(TypeError, match="nonsense"): from_checkpoints(tmp_path, progress=False, nonsense=1)


def test_hill_of_no_samples_is_empty(): assert hill(np.zeros((0, 5))).shape == (0, 4)


@pytest.mark.parametrize("x", [np.ones((2, 20)), np.zeros((0, 5)), np.zeros((3, 0))])
def test_a_batch_is_refused_by_the_comparison_in_words(x):
    with pytest.raises(ValueError, match="one sample"): compare_tails(x)


@pytest.mark.parametrize("make", [lambda x: compare_tails(x, fit_power_law(x * 100)), lambda x: compare_tails(np.r_[np.nan, x], fit_power_law(x)), lambda x: compare_tails(10.**np.linspace(-300, 300, 100))],
                         ids=["fit of another sample", "NaN", "600 decades"])
def test_a_comparison_that_cannot_be_made_says_so(make):
    x = np.random.default_rng(0).pareto(1.5, 300) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try: table = make(x)
        except ValueError as error: assert "math domain" not in str(error)
        else: assert len(table) == 0 or table.favored.eq("undecided").all() and table.p_value.isna().all()


def test_a_bootstrap_whose_samples_overflow_gives_no_p_value():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test = goodness_of_fit(10.**np.linspace(-300, 300, 100), draws=20)
    assert np.isnan(test.p_value) and test.status != "ok"


@pytest.mark.parametrize("function", [fit_power_law, hill, lambda x: spectral_metrics(np.sort(x.real)[::-1] + 1j)])
def test_complex_numbers_are_refused(function):
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError), match="complex|real"):
        warnings.simplefilter("ignore")
        function(np.arange(1, 30) + 1j)


@pytest.mark.parametrize("function", [fit_power_law, hill, spectral_metrics])
def test_text_is_refused(function):
    with pytest.raises((ValueError, TypeError)): function([str(x) for x in range(30, 0, -1)])


def test_metrics_of_bfloat16_values_are_those_of_floats():
    s = torch.arange(20., 0, -1)
    np.testing.assert_allclose(list(spectral_metrics(s.bfloat16()).values()), list(spectral_metrics(s).values()), rtol=.05)


def test_the_whole_space_of_a_matrix_without_full_rank_is_not_defined():
    a, b = (torch.outer(torch.randn(5, generator=torch.Generator().manual_seed(i)), torch.ones(3)) for i in range(2))
    assert np.isnan(subspace_overlap(a, b, 3).left)
    p = Product(torch.ones(5, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    assert np.isnan(subspace_overlap(p, torch.randn(5, 3, dtype=torch.float64), 2).left)


@pytest.mark.parametrize("shape", [(5, 3), (4, 6)])
def test_a_matrix_that_changed_its_shape_cannot_be_tracked(shape):
    with pytest.raises(ValueError, match="shape|4"): track({0: {"W": torch.randn(4, 3)}, 1: {"W": torch.randn(shape)}}, "W", k=2)


@pytest.mark.parametrize("wrong", [np.eye(3), torch.ones(3), None])
def test_what_is_no_matrix_has_no_permutations(wrong):
    with pytest.raises((ValueError, TypeError), match="the weight"): permutation_nulls({"the weight": wrong})


@pytest.mark.parametrize("wrong", [torch.eye(3).to_sparse(), torch.empty(3, 3, device="meta")])
def test_sparse_and_meta_tensors_are_refused_by_name(wrong):
    with pytest.raises((ValueError, TypeError), match="the weight"): singular_values({"the weight": wrong})


def test_infinite_draws_lie_above_every_value():
    null = np.array([1., np.inf, np.inf, np.inf])
    np.testing.assert_allclose(percentile_in(np.array([5., np.inf]), null), [25, 62.5])


def test_the_script_says_when_it_cannot_write(tmp_path, capsys):
    torch.save({"w": torch.randn(4, 4)}, tmp_path / "m.pt")
    (tmp_path / "x.csv").mkdir()
    assert main([str(tmp_path / "m.pt"), "--null", "none", "--force", "-o", str(tmp_path / "x.csv")]) == 2


@pytest.mark.parametrize("scale", [1e-162, 1e-200, 1e155, 1e200])
def test_tails_do_not_depend_on_the_scale_of_a_matrix(scale):
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(40, 60)))
    with np.errstate(all="ignore"): table = analyze({"usual": x, "scaled": x * scale}, draws=20, progress=False)
    assert np.isnan(table.alpha[1]) and "zero" not in table.skipped[1] and "not finite" not in table.skipped[1] or abs(table.alpha[1] / table.alpha[0] - 1) < 1e-6


def test_a_huge_matrix_in_double_has_singular_values():
    np.testing.assert_allclose(singular_values({"a": torch.full((2, 2), 2.**1000, dtype=torch.float64)})["a"], [2.**1001, 0], rtol=1e-6, atol=2.**980)


# what a reader of the first version found

def test_a_null_is_not_compared_with_a_fit_from_another_threshold():
    null = gaussian_null(60, 90, 50)**2
    for given in (dict(xmin=2.), dict(xmax=3.)):
        with pytest.raises(ValueError, match="own threshold"): fit_power_law(SAMPLE, null=null, **given)


def test_too_few_draws_say_nothing():
    x = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))
    few, enough = (analyze({"x": x}, draws=draws, progress=False).iloc[0] for draws in (38, 39))
    assert few.alpha_verdict == "" and np.isnan(few.alpha_null_low) and not np.isnan(few.alpha_percentile)
    assert enough.alpha_verdict != "" and enough.alpha_null_low < enough.alpha_null_high


@pytest.mark.parametrize("dtype, rank", [(torch.float32, 3), (torch.bfloat16, 2)])
def test_rounding_noise_of_a_low_rank_matrix_is_no_bulk(dtype, rank):
    generator = torch.Generator().manual_seed(0)
    low = (torch.randn(60, rank, generator=generator, dtype=torch.float64) @ torch.randn(rank, 80, generator=generator, dtype=torch.float64)).to(dtype)
    row = analyze({"low": low}, None, progress=False).iloc[0]
    assert row.numerical_rank == rank and "bulk: rank deficient" in row.skipped and np.isnan([row.bulk_variance, row.bulk_ks]).all()


def test_what_was_not_learnt_has_no_spikes():
    before = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    after = before + 3 * torch.outer(torch.linspace(-1, 1, 60), torch.linspace(0, 1, 80))
    row = analyze({"w": after}, None, minus={"w": before}, progress=False).iloc[0]
    assert row.numerical_rank == 1 and "bulk: rank deficient" in row.skipped


def test_percentiles_do_not_depend_on_the_matrices_beside():
    a = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    one, other = (analyze(pair, draws=50, progress=False).set_index("matrix").loc["a"] for pair in ({"a": a, "b": a.bfloat16()}, {"b": a.bfloat16(), "a": a}))
    assert one.drop("skipped").equals(other.drop("skipped"))


def test_half_of_a_lora_pair_is_analyzed_as_the_matrix_that_it_is():
    table = analyze({"q.lora_A.default.weight": torch.randn(8, 32)}, draws=5, progress=False)
    assert len(table) == 1 and table["rank"][0] == 8


def test_a_broken_matrix_adds_no_column_to_the_table():
    good, broken = torch.randn(12, 9), torch.full((12, 9), torch.nan)
    alone, beside = (analyze(x, draws=5, progress=False) for x in ({"a": good}, {"a": good, "b": broken}))
    assert list(alone) == list(beside) and not {"status", "bulk_status"} & set(beside) and beside.skipped[1] == "all: entries that are not finite"
