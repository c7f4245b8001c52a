"""The dashboard without a browser: what its panels show is what was stored, and what it is told it says."""
import base64
import gzip
import json
import re
import shutil
from html import escape

import numpy as np
import pytest
import traitlets
from conftest import add_checkpoint, growing, layered_run, write_run
from scipy import integrate

from tformer_lab.dashboards import dashboard as dashboard_module
from tformer_lab.dashboards.dashboard import STATE, Dashboard
from tformer_lab.dashboards.export import PANELS
from tformer_lab.dashboards.panels import ALIGNMENTS, GHOSTS, LAWS, LINES, SCALES, VIEWS
from tformer_lab.runs.store import Run
from tformer_lab.spectra.checkpoints import SpectraFolder
from tformer_lab.spectra.history import SpectrumHistory
from tformer_lab.spectra.metrics import stable_rank
from tformer_lab.spectra.nulls import gaussian_null, permutation_nulls, product_null
from tformer_lab.spectra.tails import fit_power_law

EPSILON = np.finfo(np.float32).eps
STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 100, 128, 200, 256])
SHAPES = {"encoder.0.q": (16, 24), "encoder.1.q": (16, 24), "encoder.0.o": (40, 30), "head": (12, 12)}
LOSSES = np.array([4., 3.9, 3.95, 3., 2.5, np.nan, 2.6, 2., 1.5, 1.6, 1.3, 1.25])
SPECTRA = {name: growing(shape, len(STEPS), seed, empty=16 if name == "encoder.0.o" else 0) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs: four matrices with weights at two steps; and a shorter one, of other steps, that lacks two of the matrices."""
    folder = tmp_path_factory.mktemp("dashboard") / "runs"
    other = {name: growing(SHAPES[name], 7, seed + 10) for seed, name in enumerate(["encoder.0.q", "encoder.1.q"])}
    write_run(folder / "other", other, SHAPES, [0, 3, 6, 50, 100, 140, 180], [5., 3.5, 2.55, 2.4, 1.8, 1.5, 1.4])
    write_run(folder / "mine", SPECTRA, SHAPES, STEPS, LOSSES, weights=(8, 256))
    return folder


def seen(values, log):
    """Values as they are drawn: in float32, and on a logarithmic axis without what is zero to float32's precision."""
    s = np.asarray(values, dtype=np.float32)
    return np.where(s > s.shape[-1] * EPSILON * s[..., :1], s, np.nan) if log else s


def bins_of(matrix, scale):
    found = seen(SPECTRA[matrix], scale == "log")
    found = found[np.isfinite(found)]
    if scale == "linear": return np.linspace(0, 1.05 * float(found.max()), 41)
    return np.logspace(float(np.log10(found.min()) - .15), float(np.log10(found.max()) + .15), 41)


def histogram(s, edges, scale):
    """The share of the values in each bin, by its width: in decades on a logarithmic axis."""
    return np.histogram(s, edges)[0] / len(s) / np.diff(np.log10(edges) if scale == "log" else edges)


def around(edges, heights):
    """A histogram as an outline."""
    return np.repeat(edges, 2), np.r_[0, np.repeat(heights, 2), 0]


def expected_values(matrix, index, view, scale, s=None):
    s = SPECTRA[matrix][index] if s is None else s
    if view == "density": return around(edges := bins_of(matrix, scale), histogram(s, edges, scale))
    rank = np.arange(1, len(s) + 1)
    return (rank, seen(s, scale == "log")) if view == "rank" else (seen(s, scale == "log"), rank / len(s))


def expected_band(draws, matrix, view, scale):
    """From the smallest to the largest draw, and back."""
    if view == "density":
        outlines = [around(edges := bins_of(matrix, scale), histogram(draw, edges, scale)) for draw in draws]
        x, y = outlines[0][0], np.array([y for _, y in outlines])
        return np.r_[x, x[::-1]], np.maximum(np.r_[y.min(0), y.max(0)[::-1]], 1e-9)
    rank, values = np.arange(1, draws.shape[1] + 1), np.r_[draws.min(0), draws.max(0)[::-1]]
    there = np.r_[rank, rank[::-1]]
    return (there, values) if view == "rank" else (values, there / draws.shape[1])


def marchenko_pastur(matrix, index):
    """Edges and density of the singular values of noise of a matrix's shape and variance, from the formula in the textbooks."""
    short, long = sorted(SHAPES[matrix])
    ratio, unit = short / long, long * np.sum(SPECTRA[matrix][index]**2) / np.prod(SHAPES[matrix])
    low, high = (1 - np.sqrt(ratio))**2, (1 + np.sqrt(ratio))**2
    def density(s):
        y = np.maximum(np.asarray(s)**2 / unit, 1e-300)
        return 2 * s / unit * np.sqrt(np.maximum((high - y) * (y - low), 0)) / (2 * np.pi * ratio * y)
    return np.sqrt(unit * low), np.sqrt(unit * high), density


def opened(folder, **state):
    dashboard = Dashboard(folder, run="mine", **state)
    assert not dashboard.message
    return dashboard


def line(figure, name):
    """x and y of the one visible trace with a name in the legend."""
    trace, = [trace for trace in figure.data if trace.name == LINES.get(name, (name,))[0]]
    assert trace.visible is not False
    return np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)


def same(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True): np.testing.assert_allclose(a, b, **{"rtol": 2e-6, "atol": 1e-12, **tolerance})


# The spectrum panel: what is drawn is what was stored, or what theory says of it

EVERY = [(view, scale, other) for view in VIEWS for scale in SCALES for other in SCALES]


@pytest.mark.parametrize("view, scale, other", EVERY)
@pytest.mark.parametrize("matrix", ["encoder.0.q", "encoder.0.o"])
def test_spectrum_and_its_ghosts_are_the_stored_values(folder, matrix, view, scale, other):
    dashboard = opened(folder, matrix=matrix, view=view, scale=scale, other_scale=other, lines=["first", "previous", "final"])
    for index in (0, 5, 11):
        dashboard.step = int(STEPS[index])
        figure = dashboard.figure("spectrum")
        for name, at in {"now": index, "previous": max(index - 1, 0), "first": 0, "final": len(STEPS) - 1}.items():
            same(line(figure, name), expected_values(matrix, at, view, scale))
        assert {trace.name for trace in figure.data if trace.visible is not False} == {LINES[name][0] for name in ("now", "first", "previous", "final")}
        across, along = (figure.layout.yaxis, figure.layout.xaxis) if view == "rank" else (figure.layout.xaxis, figure.layout.yaxis)
        assert across.type == scale and along.type == other


@pytest.mark.parametrize("view, scale, other", EVERY)
def test_noise_is_the_spread_of_39_gaussian_matrices_of_its_variance(folder, view, scale, other):
    dashboard = opened(folder, matrix="encoder.0.o", step=64, view=view, scale=scale, other_scale=other, lines=["noise"])
    draws = gaussian_null(40, 30, 39) * np.sqrt(np.mean(np.sum(SPECTRA["encoder.0.o"][7]**2)) / 1200)
    same(line(dashboard.figure("spectrum"), "noise"), expected_band(draws, "encoder.0.o", view, scale))


@pytest.mark.parametrize("view, scale, other", EVERY)
def test_shuffled_is_the_spread_of_39_reorderings_of_the_stored_weights(folder, view, scale, other):
    dashboard = opened(folder, matrix="encoder.1.q", step=8, view=view, scale=scale, other_scale=other, lines=["shuffled"])
    weights = Run(folder / "mine").checkpoints[8]["encoder.1.q"]
    np.testing.assert_allclose(np.linalg.svd(weights.numpy(), compute_uv=False), SPECTRA["encoder.1.q"][4])
    draws = permutation_nulls({"w": weights}, 39)["w"].astype(np.float32)
    same(line(dashboard.figure("spectrum"), "shuffled"), expected_band(draws, "encoder.1.q", view, scale))
    np.testing.assert_allclose((draws[0]**2).sum(), (weights**2).sum(), rtol=1e-5)
    dashboard.step = 16  # no weights were kept
    assert LINES["shuffled"][0] not in [trace.name for trace in dashboard.figure("spectrum").data if trace.visible is not False]


@pytest.mark.parametrize("view, scale, other", EVERY)
@pytest.mark.parametrize("matrix", ["encoder.0.q", "head"])
def test_law_is_marchenko_pastur_of_the_matrix_and_its_variance(folder, matrix, view, scale, other):
    x, y = line(opened(folder, matrix=matrix, step=32, view=view, scale=scale, other_scale=other, lines=["law"]).figure("spectrum"), "law")
    low, high, density = marchenko_pastur(matrix, 6)
    if view == "density":
        np.testing.assert_allclose([x[0], x[-1]], [low, high], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(y[1:-1], density(x[1:-1]) * (x[1:-1] * np.log(10) if scale == "log" else 1), rtol=1e-6)
        return
    n = min(SHAPES[matrix])
    above = [integrate.quad(density, s, high, limit=200)[0] for s in (y if view == "rank" else x)]
    np.testing.assert_allclose(above, (np.arange(n) + .5) / n, atol=2e-6)
    np.testing.assert_allclose(x if view == "rank" else y, np.arange(1, n + 1) / (1 if view == "rank" else n))


@pytest.mark.parametrize("view, scale, other", EVERY)
def test_power_law_is_the_fit_of_the_eigenvalues_at_the_step(folder, view, scale, other):
    dashboard, n, fitted = opened(folder, matrix="encoder.0.q", view=view, scale=scale, other_scale=other, lines=["fit"]), 16, set()
    for index in (0, 7, 11):
        dashboard.step = int(STEPS[index])
        x, y = line(dashboard.figure("spectrum"), "fit")
        fit = fit_power_law(SPECTRA["encoder.0.q"][index]**2, precision=2.**-23)
        fitted.add(fit.alpha)
        s = y if view == "rank" else x
        survival, pdf = (s**2 / fit.xmin)**(1 - fit.alpha), (fit.alpha - 1) / fit.xmin * (s**2 / fit.xmin)**-fit.alpha
        share = fit.n_tail / n
        np.testing.assert_allclose(s.min(), np.sqrt(fit.xmin))
        if view == "rank": np.testing.assert_allclose(x, fit.n_tail * survival)
        if view == "cumulative": np.testing.assert_allclose(y, share * survival)
        if view == "density": np.testing.assert_allclose(y, share * 2 * s * pdf * (s * np.log(10) if scale == "log" else 1))
    assert len(fitted) == 3


@pytest.mark.parametrize("view, scale, other", EVERY)
def test_axes_of_the_spectrum_are_the_same_at_every_step_and_hold_it(folder, view, scale, other):
    dashboard, ranges = opened(folder, matrix="encoder.0.o", view=view, scale=scale, other_scale=other, lines=["first", "previous", "final"]), set()
    for step in STEPS:
        dashboard.step = int(step)
        figure = dashboard.figure("spectrum")
        for axis, values in (("xaxis", line(figure, "now")[0]), ("yaxis", line(figure, "now")[1])):
            axis = figure.layout[axis]
            at = np.log10(values[values > 0]) if axis.type == "log" else values[np.isfinite(values)]
            assert axis.range[0] <= at.min() and at.max() <= axis.range[1]
        ranges.add((*figure.layout.xaxis.range, *figure.layout.yaxis.range))
    assert len(ranges) == 1


def test_values_that_stay_zero_are_left_out_and_said(tmp_path):
    s = growing((40, 40), 3, 1)
    s[:, 20:] *= 1e-12
    write_run(tmp_path / "runs" / "low", {"W": s}, {"W": (40, 40)}, [0, 1, 2])
    figure = Dashboard(tmp_path / "runs").figure("spectrum")
    assert len(line(figure, "now")[0]) == 20
    assert figure.layout.xaxis.title.text == "rank (the other 20 of 40 stay zero)"


@pytest.mark.parametrize("view, scale, other", EVERY)
def test_edge_is_where_the_law_ends(folder, view, scale, other):
    x, y = line(opened(folder, matrix="encoder.0.q", step=32, view=view, scale=scale, other_scale=other, lines=["law"]).figure("spectrum"), "edge")
    np.testing.assert_allclose(y if view == "rank" else x, marchenko_pastur("encoder.0.q", 6)[1])


def test_law_of_a_product_is_left_out_and_its_noise_is_of_products(tmp_path):
    from tformer_lab.spectra.decomposition import MatrixSpectrum
    from tformer_lab.spectra.history import SpectrumRecord
    s = np.sort(np.random.default_rng(0).uniform(1, 5, 6))[::-1]
    history = SpectrumHistory([SpectrumRecord(0, {"W": MatrixSpectrum(s, (20, 30), 4., 2.**-23, inner=6)})], "product")
    figure = Dashboard(history).figure("spectrum")
    draws = product_null(20, 6, 30, 39) / np.sqrt(6) * 2
    same(line(figure, "noise"), (np.r_[1:7, 6:0:-1], np.r_[draws.min(0), draws.max(0)[::-1]]))
    assert LINES["law"][0] not in [trace.name for trace in figure.data if trace.visible is not False]


# The other panels

@pytest.mark.parametrize("step_scale", ["auto", "log", "linear"])
@pytest.mark.parametrize("scale", SCALES)
def test_panels_over_training_show_the_stored_values_at_their_steps(folder, scale, step_scale):
    dashboard = opened(folder, matrix="encoder.0.o", scale=scale, step_scale=step_scale, metric="stable_rank")
    s, log = SPECTRA["encoder.0.o"], scale == "log"
    x = STEPS if step_scale == "linear" else np.log10(1 + STEPS)
    heat = dashboard.figure("heat").data[0]
    same((heat.x, heat.y), (x, np.arange(1, 31)))
    np.testing.assert_allclose(np.asarray(heat.z).T, np.log10(seen(s, True)) if log else s, rtol=1e-6, atol=1e-6)
    assert np.nanmin(heat.z) >= heat.zmin and np.nanmax(heat.z) <= heat.zmax
    trajectories = dashboard.figure("trajectories")
    assert len(trajectories.data) == 8
    for trace in trajectories.data:
        k = int(trace.name.removeprefix("rank "))
        same((trace.x, trace.y, trace.customdata), (x, seen(s, log)[:, k - 1], STEPS))
    loss, optimum = dashboard.figure("loss").data
    known = np.isfinite(LOSSES)
    same((loss.x, loss.y, loss.customdata), (x[known], LOSSES[known], STEPS[known]))
    assert list(optimum.y) == [1.2, 1.2] and optimum.name == "optimum 1.2 (exact)" and optimum.x[0] == 0 and optimum.x[1] >= x[-1]
    band, now = dashboard.figure("metric").data
    same((now.x, now.y, now.customdata), (x, (s**2).sum(1) / s[:, 0]**2, STEPS))
    noise = stable_rank(gaussian_null(40, 30, 39))
    same((band.x, band.y), (np.r_[x, x[::-1]], np.r_[[noise.min()] * 12, [noise.max()] * 12]))
    ranges = {dashboard.figure(panel).layout.xaxis.range for panel in ("heat", "trajectories", "loss", "metric")}
    assert len(ranges) == 1


@pytest.mark.parametrize("metric, of", [("spectral_norm", lambda s: s[..., 0]), ("frobenius_norm", lambda s: np.sqrt((s**2).sum(-1)))])
def test_band_of_a_norm_grows_with_the_entries(folder, metric, of):
    dashboard = opened(folder, matrix="encoder.0.q", metric=metric)
    band, now = dashboard.figure("metric").data
    s = SPECTRA["encoder.0.q"]
    noise, spread = of(gaussian_null(16, 24, 39)), np.sqrt((s**2).sum(1) / (16 * 24))
    same((now.y, band.y), (of(s), np.r_[noise.min() * spread, (noise.max() * spread)[::-1]]))


def test_exponent_over_training_is_that_of_the_drawn_law(folder):
    dashboard = opened(folder, matrix="encoder.0.q", metric="tail_alpha")
    now = dashboard.figure("metric").data[1]
    np.testing.assert_allclose(now.y, [fit_power_law(s**2, precision=2.**-23).alpha for s in SPECTRA["encoder.0.q"]], rtol=1e-6)
    assert all(name in dashboard.shown["main"]["metrics"] for name in ("stable_rank", "effective_rank", "tail_alpha"))


@pytest.mark.parametrize("step", [0, 32, 256])
def test_small_multiples_show_every_matrix_at_the_step_in_its_metrics_colour(folder, step):
    from plotly.colors import get_colorscale, sample_colorscale
    dashboard = opened(folder, matrix="head", step=step, color="stable_rank")
    figure, index = dashboard.figure("grid"), list(STEPS).index(step)
    ranks = {name: (s**2).sum(1) / s[:, 0]**2 for name, s in SPECTRA.items()}
    low, high = np.quantile(list(ranks.values()), [.01, .99])
    positive = {name: np.log10(seen(s, True)[:, np.linspace(0, s.shape[1] - 1, 24).round().astype(int)]) for name, s in SPECTRA.items()}
    every = np.concatenate([s.ravel() for s in positive.values()])
    bottom, top = np.quantile(every[np.isfinite(every)], [.002, .998])
    cells = {"encoder.0.q": (0, 0), "encoder.1.q": (0, 1), "encoder.0.o": (1, 0), "head": (2, 0)}
    for trace in figure.data[:4]:
        row, column = cells[trace.name]
        height = np.clip(np.nan_to_num((positive[trace.name][index] - bottom) / (top - bottom)), 0, 1)
        same((trace.x[:24], trace.y[:24]), (column + np.linspace(.07, .93, 24), row + .9 - .78 * height), atol=1e-5)
        color = sample_colorscale(get_colorscale("Cividis"), [np.clip((ranks[trace.name][index] - low) / (high - low), 0, 1)])[0]
        assert trace.fillcolor == color
    chosen, = figure.layout.shapes
    assert (np.floor(chosen.y0), np.floor(chosen.x0)) == cells["head"]
    bar = figure.data[-1].marker
    np.testing.assert_allclose([bar.cmin, bar.cmax], [low, high])


def test_tables_hold_what_is_drawn(folder, tmp_path):
    import pandas as pd
    dashboard = opened(folder, matrix="head", step=64, lines=["first"])
    found = pd.read_csv(dashboard.to_csv(tmp_path / "spectrum.csv"))
    for name, index in (("now", 7), ("first", 0)):
        rows = found.query("line == @name")
        same((rows["x"], rows["y"]), (np.arange(1, 13), SPECTRA["head"][index]))
    assert set(found["line"]) == {"now", "first"}
    heat = dashboard.data("heat").pivot(index="x", columns="y", values="value").to_numpy()
    np.testing.assert_allclose(10**heat, SPECTRA["head"], rtol=1e-5)
    loss = dashboard.data("loss").query("line == 'train/loss'")
    assert loss["x"].tolist() == STEPS[np.isfinite(LOSSES)].tolist()
    assert set(dashboard.data("grid")["line"]) == set(SHAPES)


# What the page is sent

def test_page_is_sent_the_stored_values(folder):
    dashboard = opened(folder)
    for name, s in SPECTRA.items():
        dashboard.matrix = name
        main = dashboard.shown["main"]
        np.testing.assert_array_equal(np.frombuffer(main["values"], "<f4").reshape(s.shape), s.astype(np.float32))
        assert np.frombuffer(main["places"], "<i4").tolist() == list(range(s.shape[1])) and main["rank"] == s.shape[1] and (main["rows"], main["columns"]) == SHAPES[name]
        for scale in SCALES:
            heights = np.frombuffer(main["histograms"][scale]["heights"], "<f4").reshape(len(STEPS), -1)
            np.testing.assert_allclose(heights, [histogram(row, bins_of(name, scale), scale) for row in s], rtol=1e-6)
    about = dashboard.about
    assert np.frombuffer(about["steps"], "<i4").tolist() == STEPS.tolist() and about["matrices"] == list(SHAPES) and about["status"] == "done"
    assert [(record["name"], record["levels"]) for record in about["records"]] == [("train/loss", [1.2])]
    assert np.frombuffer(about["kept"], "<i4").tolist() == [8, 256]
    assert [row["run"] for row in dashboard.table["rows"]] in (["mine", "other"], ["other", "mine"])


def test_references_are_drawn_beside_the_optimum(tmp_path):
    write_run(tmp_path / "mine", SPECTRA, SHAPES, STEPS, LOSSES, references=[{"metric": "train/loss", "value": 1.7, "name": "linear"}, {"metric": "valid/loss", "value": 9., "name": "other"}])
    dashboard = opened(tmp_path)
    record, = dashboard.about["records"]
    assert record["levels"] == [1.7, 1.2] and [trace["name"] for trace in record["figure"]["data"][1:]] == ["linear 1.7", "optimum 1.2 (exact)"]
    assert [list(trace.y) for trace in dashboard.figure("loss").data[1:]] == [[1.7] * 2, [1.2] * 2]
    write_run(tmp_path / "more/mine", SPECTRA, SHAPES, STEPS, LOSSES, references=[{"metric": "train/loss", "value": value, "name": f"reference {value}"} for value in (1.7, 2.)])
    layouts = [record["figure"]["layout"], opened(tmp_path / "more").about["records"][0]["figure"]["layout"]]
    assert [layout["margin"]["t"] for layout in layouts] == [34, 54] and layouts[1]["height"] == layouts[0]["height"] + 20  # a second row of the legend


def test_number_of_checkpoints_and_matrices_that_are_drawn_is_said(tmp_path):
    names = [f"layers.{i}.{role}" for i in range(125) for role in "qkvo"]
    spectra = {name: growing((6, 9), 400, seed) for seed, name in enumerate(names)}
    wide = SpectrumHistory.from_arrays(np.arange(400), {name: _history_of(s, (6, 9)) for name, s in spectra.items()}, "wide")
    dashboard = Dashboard(wide)
    kept = np.frombuffer(dashboard.grid["kept"], "<i4")
    assert len(dashboard.grid["names"]) == 500 and dashboard.grid["of"] == 400 and 2 < len(kept) < 400 and kept[0] == 0 and kept[-1] == 399
    assert len(dashboard.grid["heights"]) == len(kept) * 500 * 24 * 4
    assert len(dashboard.figure("grid").data) == 501 and not dashboard.message
    long = SpectrumHistory.from_arrays(np.arange(5000) * 3, {"W": _history_of(growing((8, 8), 5000, 0), (8, 8))}, "long")
    dashboard = Dashboard(long, step=9)
    kept, main = np.frombuffer(dashboard.shown["main"]["kept"], "<i4"), dashboard.shown["main"]
    assert main["of"] == 5000 and len(kept) == 1000 and kept[0] == 0 and kept[-1] == 4999
    np.testing.assert_array_equal(np.frombuffer(main["values"], "<f4").reshape(5000, 8), long["W"].astype(np.float32))  # stored values are not thinned
    assert not dashboard.message and len(dashboard.figure("metric").data[1].x) == 1000


def test_records_that_are_drawn_are_counted(tmp_path):
    writer = write_run(tmp_path / "runs" / "chatty", {"W": growing((5, 5), 2, 0)}, {"W": (5, 5)}, [0, 4999], ends=None)
    writer.log([{"step": step, "train/loss": float(step)} for step in range(5000)])
    writer.close()
    record, = Dashboard(tmp_path / "runs").about["records"]
    steps, values = np.frombuffer(record["steps"], "<i4"), np.frombuffer(record["values"], "<f4")
    assert record["of"] == 5000 and record["drawn"] == len(steps) < 5000 and (steps[0], steps[-1]) == (0, 4999) and (values == steps).all()


def _history_of(values, shape):
    from tformer_lab.spectra.history import MatrixHistory
    return MatrixHistory(values, (values**2).sum(1) / np.prod(shape), np.ones(len(values), bool), shape, 2.**-23)


# State in, state out

CHOSEN = {"run": "mine", "matrix": "encoder.1.q", "step": 16, "view": "cumulative", "scale": "linear", "other_scale": "log", "step_scale": "linear", "lines": ["fit", "final"], "record": "train/loss",
          "metric": "spectral_norm", "color": "effective_rank", "fixed": False, "compare": ["other", "head"], "align": "fraction", "speed": 30., "live": True}


def test_all_of_the_state_is_given_read_set_and_written_as_code(folder):
    assert set(CHOSEN) == set(STATE)
    given = Dashboard(folder, **CHOSEN)
    assert given.state == CHOSEN and not given.message
    assert eval(given.to_code()).state == CHOSEN
    set_later = opened(folder)
    for name, value in CHOSEN.items(): setattr(set_later, name, value)
    assert set_later.state == CHOSEN and eval(set_later.to_code()).state == CHOSEN
    for panel in PANELS: assert set_later.figure(panel).to_json() == given.figure(panel).to_json()
    for name in STATE:
        if name in ("run", "matrix", "step"): continue
        one = Dashboard(folder, run="mine", **{name: CHOSEN[name]})
        assert getattr(one, name) == CHOSEN[name] and eval(one.to_code()).state == one.state


def test_state_as_it_opens_is_the_newest_run_its_first_matrix_and_its_last_step(folder):
    dashboard = Dashboard(folder)
    newest = dashboard.table["rows"][0]["run"]
    assert (dashboard.run, dashboard.matrix, dashboard.step, dashboard.record) == (newest, "encoder.0.q", Run(folder / newest).spectra.steps[-1], "train/loss")
    assert eval(dashboard.to_code()).state == dashboard.state


@pytest.mark.parametrize("source", ["folder", "path", "Run", "history"])
def test_code_opens_what_it_was_opened_on(folder, source):
    history = Run(folder / "mine").spectra
    given = {"folder": folder, "path": str(folder / "mine"), "Run": Run(folder / "mine"), "history": history}[source]
    dashboard = Dashboard(given, matrix="head", step=64)
    again = eval(dashboard.to_code())
    assert again.state == dashboard.state == dashboard.state | {"matrix": "head", "step": 64}
    assert again.figure().to_json() == dashboard.figure().to_json()


def test_default_folder_is_that_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("TFORMER_RUNS", str(folder))
    assert eval(Dashboard().to_code()).run in ("mine", "other")


@pytest.mark.parametrize("wrong, right", [({"run": "yours"}, "mine"), ({"matrix": "encoder.2.q"}, "encoder.1.q"), ({"step": 5}, "128"), ({"view": "ranks"}, "cumulative"), ({"scale": "logarithmic"}, "linear"),
                                          ({"other_scale": "ln"}, "log"), ({"step_scale": "ln"}, "auto"), ({"lines": ["noises"]}, "noise"), ({"record": "loss"}, "train/loss"), ({"metric": "rank"}, "stable_rank"),
                                          ({"color": "blue"}, "stable_rank"), ({"compare": ["yours"]}, "other"), ({"align": "time"}, "fraction"), ({"speed": 0.}, "less than 0.1"), ({"fixed": "yes"}, "boolean"), ({"colour": "rank"}, "color")])
def test_wrong_value_is_refused_with_the_right_ones(folder, wrong, right):
    with pytest.raises((traitlets.TraitError, TypeError), match=re.escape(right)): Dashboard(folder, **{"run": "mine", **wrong})
    if wrong.keys() <= set(STATE):
        dashboard = opened(folder, step=16)
        before, figure = dashboard.state, dashboard.figure().to_json()
        (name, value), = wrong.items()
        with pytest.raises(traitlets.TraitError, match=re.escape(right)): setattr(dashboard, name, value)
        assert dashboard.state == before and dashboard.figure().to_json() == figure


def test_what_python_sends_is_not_set_from_outside(folder):
    with pytest.raises(traitlets.TraitError): opened(folder).message = "mine"


def test_too_many_others_and_no_source_are_refused(folder, tmp_path):
    with pytest.raises(traitlets.TraitError): opened(folder).compare = list(SHAPES)
    with pytest.raises(FileNotFoundError, match="takes a folder of runs"): Dashboard(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="spectrum, heat, trajectories"): opened(folder).figure("spectra")


def test_another_run_keeps_what_it_has_too(folder):
    dashboard = opened(folder, matrix="encoder.1.q", step=100, view="density")
    dashboard.run = "other"
    assert dashboard.state == dashboard.state | {"run": "other", "matrix": "encoder.1.q", "step": 100, "view": "density"}
    dashboard.run = "mine"
    dashboard.matrix, dashboard.step = "head", 256
    dashboard.run = "other"
    assert (dashboard.matrix, dashboard.step, dashboard.message) == ("encoder.0.q", 180, "")


# Runs of all kinds

def drawn(dashboard, panels=PANELS):
    """All panels can be drawn and sent."""
    json.dumps({"about": dashboard.about, "shown": dashboard.shown, "grid": dashboard.grid, "table": dashboard.table}, default=len, allow_nan=False)
    for panel in panels: json.loads(dashboard.figure(panel).to_json())
    return dashboard


def test_run_with_one_checkpoint_is_shown(tmp_path):
    write_run(tmp_path / "runs" / "one", {"W": growing((6, 8), 1, 0), "V": growing((6, 8), 1, 1)}, {"W": (6, 8), "V": (6, 8)}, [7], [3.])
    dashboard = drawn(Dashboard(tmp_path / "runs", lines=[*GHOSTS, *LAWS]))
    assert dashboard.step == 7 and not dashboard.message
    same(line(dashboard.figure(), "now"), (np.arange(1, 7), growing((6, 8), 1, 0)[0]))


def test_run_without_checkpoints_says_so(tmp_path):
    for name, ends in (("empty", "done"), ("broken", "failed")): write_run(tmp_path / "runs" / name, {}, {}, [], ends=ends)
    assert Dashboard(tmp_path / "runs").message == "None of the runs has recorded spectra yet."
    dashboard = Dashboard(tmp_path / "runs", run="empty")
    assert "empty has recorded no spectra yet" in dashboard.message
    dashboard.run = "broken"
    assert "the loss is NaN" in dashboard.message and dashboard.about["status"] == "failed"
    with pytest.raises(ValueError, match="recorded no spectra"): dashboard.figure()
    with pytest.raises(ValueError, match="recorded no spectra"): dashboard.to_html(tmp_path / "page.html")


def test_folder_without_runs_says_so(tmp_path):
    assert "no runs" in Dashboard(tmp_path).message


def test_spectra_that_could_not_be_read_are_gaps(tmp_path):
    s = growing((9, 12), 6, 0)
    s[3] = np.nan
    hopeless = np.full((6, 5), np.nan)
    write_run(tmp_path / "runs" / "gaps", {"W": s, "N": hopeless}, {"W": (9, 12), "N": (5, 5)}, range(6), [3., np.nan, np.inf, 2., 1., 1.])
    dashboard = drawn(Dashboard(tmp_path / "runs", step=4, lines=["noise", "law", "fit", "previous"]))
    same(line(dashboard.figure(), "now"), (np.arange(1, 10), s[4]))
    assert np.isnan(line(dashboard.figure(), "previous")[1]).all()
    dashboard.step = 3
    drawn(dashboard)
    assert np.isnan(line(dashboard.figure(), "now")[1]).all()
    np.testing.assert_array_equal(np.isnan(dashboard.figure("metric").data[1].x), False)
    dashboard.matrix = "N"
    drawn(dashboard)
    for view in VIEWS:
        for scale in SCALES:
            dashboard.view, dashboard.scale = view, scale
            drawn(dashboard, ["spectrum", "heat", "trajectories"])
    assert not dashboard.message


def test_matrix_of_zeros_is_shown(tmp_path):
    write_run(tmp_path / "runs" / "zero", {"W": np.zeros((3, 4)), "V": growing((4, 4), 3, 0)}, {"W": (4, 4), "V": (4, 4)}, range(3))
    dashboard = drawn(Dashboard(tmp_path / "runs", scale="linear", lines=["noise", "law", "fit"]), [panel for panel in PANELS if panel != "loss"])
    assert dashboard.matrix == "W" and (line(dashboard.figure(), "now")[1] == 0).all()
    for view in VIEWS:
        for scale in SCALES:
            dashboard.view, dashboard.scale = view, scale
            drawn(dashboard, ["spectrum", "heat", "trajectories"])


def test_run_without_metrics_has_no_loss(tmp_path):
    write_run(tmp_path / "runs" / "quiet", {"W": growing((6, 8), 3, 0)}, {"W": (6, 8)}, range(3))
    dashboard = drawn(Dashboard(tmp_path / "runs"), ["spectrum", "heat", "trajectories", "metric", "grid"])
    assert dashboard.record == "" and dashboard.about["records"] == [] and dashboard.grid == {}
    with pytest.raises(ValueError, match="has recorded no metrics"): dashboard.figure("loss")
    with pytest.raises(traitlets.TraitError): dashboard.record = "train/loss"


def test_failed_run_says_why(tmp_path):
    write_run(tmp_path / "runs" / "failed", {"W": growing((6, 8), 3, 0)}, {"W": (6, 8)}, range(3), [3., 2., np.nan], ends="failed")
    dashboard = drawn(Dashboard(tmp_path / "runs"))
    assert (dashboard.about["status"], dashboard.about["error"]) == ("failed", "RuntimeError: the loss is NaN")
    row, = dashboard.table["rows"]
    assert row["status"] == "failed" and row["error"] == "RuntimeError: the loss is NaN"


def test_unreadable_run_is_in_the_table_and_says_what_is_wrong(folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs)
    (runs / "bad").mkdir()
    (runs / "bad" / "config.yaml").write_text("a: [")
    (runs / "torn").mkdir()
    (runs / "torn" / "config.yaml").write_text("task: none")
    (runs / "torn" / "spectra").mkdir()
    (runs / "torn" / "spectra" / "00000000.safetensors").write_bytes(b"torn")
    dashboard = Dashboard(runs, run="mine")
    rows = {row["run"]: row for row in dashboard.table["rows"]}
    assert rows["bad"]["status"] == "unreadable" and "no YAML" in rows["bad"]["error"]
    with pytest.warns(UserWarning, match="left out"): dashboard.run = "torn"
    assert "torn has recorded no spectra" in dashboard.message and not dashboard.shown
    dashboard.run = "bad"
    assert dashboard.message and not dashboard.shown
    dashboard.run = "mine"
    assert not drawn(dashboard).message


def test_metrics_that_cannot_be_read_are_said_and_nothing_is_raised(folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs)
    (runs / "other" / "metrics.jsonl").write_text("no record\n")
    dashboard = Dashboard(runs, run="mine")
    dashboard.run = "other"
    assert "is no record" in dashboard.message


def test_small_multiples_of_recurrent_and_routed_matrices_have_a_cell_each(tmp_path):
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_ih_l1", "lstm.weight_hh_l1", "experts.0.up", "experts.1.up", "blocks.0.experts.0.up", "blocks.0.experts.1.up", "blocks.1.experts.0.up", "head", "W"]
    write_run(tmp_path / "runs" / "mixed", {name: growing((4, 6), 2, i) for i, name in enumerate(names)}, dict.fromkeys(names, (4, 6)), [0, 1])
    dashboard = drawn(Dashboard(tmp_path / "runs"), ["spectrum", "grid"])
    assert len({tuple(cell) for cell in dashboard.grid["cells"]}) == len(names)
    assert [trace.name for trace in dashboard.figure("grid").data[:-1]] == names


def test_names_are_text_and_never_html(tmp_path):
    evil, run = "<img src=x onerror=alert(1)>.0.W&</script>", "<b>run&"
    write_run(tmp_path / "runs" / "plain", {evil: growing((5, 5), 3, 0), "V": growing((5, 5), 3, 1)}, {evil: (5, 5), "V": (5, 5)}, range(3), [3., 2., 1.])
    (tmp_path / "runs" / "plain").rename(tmp_path / "runs" / run)
    dashboard = drawn(Dashboard(tmp_path / "runs", matrix="V", compare=[evil]))
    text = {panel: dashboard.figure(panel).to_json() for panel in PANELS}
    assert escape(evil) in json.loads(text["spectrum"])["data"][-1]["name"] and escape(run) in json.loads(text["heat"])["layout"]["title"]["text"]
    for found in text.values(): assert "<img" not in found.replace("\\u003c", "<") and "<b>" not in found.replace("\\u003c", "<")
    page = dashboard.to_html(tmp_path / "page.html").read_text()
    assert f"<title>{escape(run)}" in page and f"<h1>{escape(run)}" in page and "<img" not in page and "<b>" not in page
    assert set(dashboard.data("grid")["line"]) == {evil, "V"} and evil in set(dashboard.data("spectrum")["line"])
    assert eval(dashboard.to_code()).state == dashboard.state


# Side by side

def counterpart(by, index):
    """The checkpoint of the other run that belongs to one of this run."""
    steps, losses = [0, 3, 6, 50, 100, 140, 180], [5., 3.5, 2.55, 2.4, 1.8, 1.5, 1.4]
    if by == "step": return max(i for i, step in enumerate(steps) if step <= STEPS[index])
    if by == "fraction": return min(i for i, step in enumerate(steps) if step / 180 >= STEPS[index] / 256)
    best = np.nanmin(LOSSES[:index + 1])
    return next((i for i in range(7) if losses[i] <= best), 6)


@pytest.mark.parametrize("by", ALIGNMENTS)
def test_other_run_is_shown_at_the_checkpoint_that_corresponds(folder, by):
    dashboard, theirs = opened(folder, matrix="encoder.1.q", compare=["other"], align=by), growing((16, 24), 7, 11)
    at = np.frombuffer(dashboard.shown["others"][0]["at"][by], "<i4")
    assert at.tolist() == [counterpart(by, i) for i in range(len(STEPS))]
    for view, scale in [(view, scale) for view in VIEWS for scale in SCALES]:
        dashboard.view, dashboard.scale = view, scale
        for index in (0, 5, 9, 11):
            dashboard.step = int(STEPS[index])
            same(line(dashboard.figure(), "other"), expected_values("encoder.1.q", None, view, scale, theirs[counterpart(by, index)]))
    metric = dashboard.figure("metric").data[2]
    np.testing.assert_allclose(metric.y, (theirs**2).sum(1) / theirs[:, 0]**2, rtol=1e-6)
    steps = np.array([0, 3, 6, 50, 100, 140, 180])
    np.testing.assert_allclose(10**np.asarray(metric.x) - 1, np.round(steps * 256 / 180) if by == "fraction" else steps, atol=1e-3)


def test_other_matrices_are_shown_at_the_same_step(folder):
    dashboard = opened(folder, matrix="head", step=64, compare=["encoder.0.q", "encoder.0.o"])
    figure = dashboard.figure()
    for name in dashboard.compare: same(line(figure, name), (np.arange(1, min(SHAPES[name]) + 1), seen(SPECTRA[name][7], True)))
    assert [other["label"] for other in dashboard.shown["others"]] == dashboard.compare


def test_other_run_without_the_matrix_is_taken_out_with_a_message(folder):
    dashboard = opened(folder, matrix="encoder.0.q", compare=["other"])
    dashboard.matrix = "head"
    assert dashboard.message == "other has no matrix head to compare with; it has encoder.0.q, encoder.1.q" and dashboard.compare == []
    assert dashboard.shown["others"] == [] and dashboard.shown["main"]["matrix"] == "head"
    dashboard.compare = ["encoder.0.q"]
    assert not dashboard.message
    dashboard.compare = ["encoder.0.q", "other"]
    assert dashboard.compare == ["encoder.0.q"] and "no matrix head" in dashboard.message
    given = Dashboard(folder, run="mine", matrix="head", compare=["other"])
    assert given.compare == [] and "no matrix head" in given.message


def test_other_run_that_cannot_be_read_is_taken_out_with_a_message(folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs)
    dashboard = Dashboard(runs, run="mine")
    (runs / "other" / "metrics.jsonl").write_text("no record\n")
    dashboard.compare = ["other"]
    assert dashboard.compare == [] and "is no record" in dashboard.message


def test_run_without_losses_cannot_be_aligned_by_them_and_is_said_so(folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs)
    write_run(runs / "quiet", {"encoder.0.q": growing((16, 24), 3, 0)}, SHAPES, range(3))
    dashboard = Dashboard(runs, run="mine", compare=["quiet", "other"])
    assert [other["losses"] for other in dashboard.shown["others"]] == [False, True]
    drawn(dashboard)


# Live

@pytest.fixture
def growing_run(tmp_path):
    """The writer of a run with three checkpoints, and what the next would be."""
    spectra = {"W": growing((6, 8), 10, 0), "V": growing((5, 5), 10, 1)}
    shapes = {"W": (6, 8), "V": (5, 5)}
    writer = write_run(tmp_path / "runs" / "live", {name: s[:3] for name, s in spectra.items()}, shapes, [0, 10, 20], [3., 2.5, 2.2], ends=None)
    yield writer, lambda i: add_checkpoint(writer, 10 * i, {name: s[i] for name, s in spectra.items()}, shapes, 2. - .1 * i)
    writer.close()


def poll(dashboard):
    """What was sent when the page asked for news."""
    sent = []
    watch = lambda change: sent.append(change["name"])
    dashboard.observe(watch, names=["about", "shown", "grid", "table"])
    before = dashboard.polled
    dashboard._told(None, {"do": "poll"}, [])
    dashboard.unobserve(watch, names=["about", "shown", "grid", "table"])
    assert dashboard.polled == before + 1
    return set(sent)


def test_growing_run_is_followed_and_only_what_is_new_is_read_and_sent(growing_run, monkeypatch):
    writer, add = growing_run
    dashboard, read = Dashboard(writer.run.path.parent), []
    assert dashboard.live and dashboard.about["status"] == "running"
    read_one = SpectraFolder.__getitem__
    monkeypatch.setattr(SpectraFolder, "__getitem__", lambda self, step: read.append(step) or read_one(self, step))
    made, make = [], dashboard_module.matrix_data
    monkeypatch.setattr(dashboard_module, "matrix_data", lambda *given: made.append(1) or make(*given))
    assert poll(dashboard) == set() and poll(dashboard) == set() and read == made == []
    add(3)
    add(4)
    assert poll(dashboard) == {"about", "shown", "grid", "table"} and sorted(read) == [30, 40]
    assert np.frombuffer(dashboard.about["steps"], "<i4").tolist() == [0, 10, 20, 30, 40] and dashboard.step == 20
    np.testing.assert_array_equal(np.frombuffer(dashboard.shown["main"]["values"], "<f4").reshape(5, 6), growing((6, 8), 10, 0)[:5].astype(np.float32))
    dashboard.step = 40
    same(line(dashboard.figure(), "now"), (np.arange(1, 7), growing((6, 8), 10, 0)[4]))
    assert poll(dashboard) == set() and sorted(read) == [30, 40]
    writer.log([{"step": 45, "train/loss": 1.4}])
    assert "about" in poll(dashboard) and sorted(read) == [30, 40] and dashboard.about["last"] == 45
    add(5)
    assert poll(dashboard) and sorted(read) == [30, 40, 50]
    writer.close()
    assert "about" in poll(dashboard) and dashboard.about["status"] == "done" and poll(dashboard) == set() and len(read) == 3


def test_run_that_fails_is_said_to(growing_run):
    writer, _ = growing_run
    dashboard = Dashboard(writer.run.path.parent)
    writer.close("failed", "ValueError: no more data")
    poll(dashboard)
    assert (dashboard.about["status"], dashboard.about["error"]) == ("failed", "ValueError: no more data")


def test_run_that_has_no_spectra_yet_is_opened_when_it_has(tmp_path):
    writer = write_run(tmp_path / "runs" / "young", {}, {}, [], ends=None)
    dashboard = Dashboard(tmp_path / "runs", run="young")
    assert "yet" in dashboard.message and dashboard.about["status"] == "running"
    poll(dashboard)
    assert "yet" in dashboard.message
    add_checkpoint(writer, 0, {"W": growing((5, 6), 1, 0)[0]}, {"W": (5, 6)}, 3.)
    poll(dashboard)
    assert (dashboard.message, dashboard.matrix, dashboard.step) == ("", "W", 0)
    drawn(dashboard)
    writer.close()


def test_done_run_is_not_followed_and_code_says_what_is(growing_run, folder):
    writer, _ = growing_run
    assert not opened(folder).live
    for live in (True, False):
        dashboard = Dashboard(writer.run.path.parent, live=live)
        assert dashboard.live is live and eval(dashboard.to_code()).state == dashboard.state
    dashboard = Dashboard(writer.run.path.parent)
    assert dashboard.live and eval(dashboard.to_code()).state == dashboard.state
    dashboard.live = False
    assert eval(dashboard.to_code()).state == dashboard.state


def test_error_of_a_callback_is_shown_and_not_raised(folder, monkeypatch):
    def broken(*_): raise ZeroDivisionError("nothing to divide by")
    dashboard = opened(folder, step=256)
    monkeypatch.setattr(dashboard_module, "permutation_nulls", broken)
    dashboard._told(None, {"do": "shuffle", "step": 256}, [])
    assert dashboard.message == "ZeroDivisionError: nothing to divide by"
    monkeypatch.setattr(dashboard_module, "grid_data", broken)
    dashboard.matrix = "head"
    assert not dashboard.message
    dashboard.color = "effective_rank"
    assert dashboard.message == "ZeroDivisionError: nothing to divide by"
    monkeypatch.setattr(dashboard_module, "matrix_data", broken)
    dashboard.matrix = "encoder.0.q"
    assert dashboard.message == "ZeroDivisionError: nothing to divide by"
    monkeypatch.undo()
    dashboard.matrix = "head"
    assert not dashboard.message


def test_run_that_was_removed_is_said_and_polled_on(growing_run):
    writer, _ = growing_run
    dashboard = Dashboard(writer.run.path.parent)
    writer.close()
    writer.run.path.rename(writer.run.path.with_name("away"))
    dashboard._told(None, {"do": "poll"}, [])
    assert dashboard.message and dashboard.polled == 1


def test_what_the_page_asks_in_vain_is_ignored(folder):
    dashboard = opened(folder)
    for content in ({}, {"do": "nothing"}, {"do": "shuffle", "step": 7}): dashboard._told(None, content, [])
    assert not dashboard.message and not dashboard.shuffled


# Taking away

def unpacked(page):
    """The data of an exported page."""
    data = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(data)))


def numbers(sent, kind="<f4"):
    return np.frombuffer(base64.b64decode(sent["$bytes"]), kind)


def test_page_of_a_large_run_is_small_and_loads_nothing(tmp_path):
    run = layered_run(tmp_path / "runs" / "large", 6, 64, 200)
    dashboard = Dashboard(run)
    path = dashboard.to_html(tmp_path / "page.html")
    assert path.stat().st_size < 7e6
    page = path.read_text()
    outside = re.sub(r'<script type="text/plain"[^>]*>[^<]*</script>', "", page)
    assert "http:" not in outside and "https:" not in outside and not re.search(r"""\b(src|href)\s*=|@import|url\(""", outside)
    data = unpacked(page)
    assert len(data["shown"]) == 24 and data["state"]["step"] == dashboard.step
    history = run.spectra
    for name in history.matrices: np.testing.assert_array_equal(numbers(data["shown"][name]["main"]["values"]).reshape(200, 64), history[name].astype(np.float32))
    np.testing.assert_array_equal(numbers(data["state"]["about"]["steps"], "<i4"), history.steps)
    code = gzip.decompress(base64.b64decode(re.search(r'id="code">([^<]*)</script>', page)[1])).decode()
    own = code[code.index("// Draws a run's panels"):]
    assert "http" not in own and "fetch(" not in own


def test_page_of_some_matrices_and_checkpoints_holds_these(folder, tmp_path):
    dashboard = opened(folder, matrix="head", step=100, compare=["encoder.0.q"])
    data = unpacked(dashboard.to_html(tmp_path / "page.html", matrices=["encoder.1.q", "encoder.0.o"], checkpoints=4).read_text())
    steps = numbers(data["state"]["about"]["steps"], "<i4").tolist()
    assert list(data["shown"]) == data["state"]["about"]["matrices"] == ["encoder.1.q", "encoder.0.o"] and data["state"]["matrix"] == "encoder.1.q"
    assert len(steps) == 4 and (steps[0], steps[-1]) == (0, 256) and data["state"]["step"] == max(step for step in steps if step <= 100)
    places = [list(STEPS).index(step) for step in steps]
    np.testing.assert_array_equal(numbers(data["shown"]["encoder.1.q"]["main"]["values"]).reshape(4, 16), SPECTRA["encoder.1.q"][places].astype(np.float32))
    other, = data["shown"]["encoder.1.q"]["others"]
    assert other["label"] == "encoder.0.q" and [STEPS[i] for i in numbers(other["at"]["step"], "<i4")] == steps
    assert dashboard.state["matrix"] == "head" and dashboard.step == 100  # nothing has changed here
    with pytest.raises(ValueError, match="encoder.0.q, encoder.1.q"): dashboard.to_html(tmp_path / "page.html", matrices=["W"])
    with pytest.raises(ValueError, match="2 or more"): dashboard.to_html(tmp_path / "page.html", checkpoints=1)


@pytest.mark.usefixtures("chromium")  # kaleido drives it: skipped where there is none, and in CI failed
def test_pictures_are_pictures(folder, tmp_path):
    from xml.etree import ElementTree
    dashboard = opened(folder, lines=[*GHOSTS, *LAWS])
    png = dashboard.to_png(tmp_path / "spectrum", width=500)
    data = png.read_bytes()
    assert png.name == "spectrum.png" and data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 1000
    svg = dashboard.to_svg(str(tmp_path / "grid.svg"), "grid")
    text = svg.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg") and all(name in text for name in ("encoder.q", "stable rank", "mine"))


def test_wrong_paths_are_refused(folder, tmp_path):
    dashboard = opened(folder)
    for save, right, wrong in ((dashboard.to_html, ".html", "page.htm"), (dashboard.to_png, ".png", "page.jpg"), (dashboard.to_svg, ".svg", "page.pdf"), (dashboard.to_png, ".png", "page.svg"),
                               (dashboard.to_svg, ".svg", "page.png"), (dashboard.to_csv, ".csv", "page.xlsx")):
        with pytest.raises(ValueError, match=re.escape(right)): save(tmp_path / wrong)
        with pytest.raises(FileNotFoundError, match="there is no folder"): save(tmp_path / "nowhere" / f"page{right}")
    assert list(tmp_path.iterdir()) == []


def test_new_runs_are_listed_when_the_page_asks(tmp_path):
    (tmp_path / "runs").mkdir()
    dashboard = Dashboard(tmp_path / "runs")
    assert "no runs" in dashboard.message and dashboard.table["rows"] == []
    writer = write_run(tmp_path / "runs" / "late", {}, {}, [], ends=None)
    add_checkpoint(writer, 0, {"W": growing((5, 6), 1, 0)[0]}, {"W": (5, 6)}, 3.)
    writer.close()
    dashboard._told(None, {"do": "list"}, [])
    assert [row["run"] for row in dashboard.table["rows"]] == ["late"] and (dashboard.run, dashboard.matrix, dashboard.message) == ("late", "W", "")
