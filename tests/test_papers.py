"""The notebooks of papers: their tables hold what their sweeps ask for, and a small sweep makes them anew."""
import math
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tformer_lab.runs.grid import combinations
from tformer_lab.runs.sweep import read_sweep
from tformer_lab.tasks.recall import Recall

pytestmark = pytest.mark.timeout(400)
TOP = Path(__file__).parent.parent
PAPERS = TOP / "nbs/papers"
SETTING = ["model", "noise", "lr", "samples"]


def name(parametrization, attention, kappa, **others):
    """The paper's name of a model."""
    words = {"linear": "Linear", "softmax": "Softmax", "relu": "ReLU", "origin": ["Origin"], "reparam": ["Reparam"], "reparam_w": ["Reparam"]}
    return "-".join([*words[parametrization], words[attention], *(["W"] if parametrization == "reparam_w" else []), "FA" if kappa else "F"])


def asked():
    """Every setting of the sweep, and its seeds."""
    given = read_sweep(PAPERS / "recall.yaml")
    return {(name(**one), float(one["noise"]), one["lr"], one.get("samples", 0)) for one in combinations(given["parameters"])}, given["seeds"]


def tables(folder):
    return [pd.read_csv(folder / f"recall_{table}.csv", comment="#") for table in ("curves", "spectra", "final")]


def settings(table): return set(table[SETTING].itertuples(index=False, name=None))


def optima(notebook):
    """The values of all lines that are named an optimum, in every figure."""
    figures = [output.data["application/vnd.plotly.v1+json"] for cell in notebook.cells for output in cell.get("outputs", []) if "application/vnd.plotly.v1+json" in output.get("data", {})]
    return [{trace["name"] for trace in figure["data"] if trace.get("name", "").startswith("optimum ") and "(exact)" in trace["name"] and any(c.isdigit() for c in trace["name"])} for figure in figures]


def test_the_sweep_of_the_recall_paper_has_13_models_at_4_noises_and_2_rates():
    wanted, seeds = asked()
    population = {one for one in wanted if not one[3]}
    assert len(population) == 104 and len({model for model, *_ in population}) == 13 and seeds == 3
    assert {noise for _, noise, _, _ in population} == {0, .2, .5, .8} and {lr for _, _, lr, _ in population} == {.1, .5}


def test_saved_tables_hold_every_setting_with_every_seed():
    wanted, seeds = asked()
    for table in tables(PAPERS / "results"): assert settings(table) == wanted and set(table["n"]) == {seeds}


def first_loss(row):
    """The loss before the first step: all tokens alike where everything is trained, and with a fixed feed-forward layer the noise token ahead by the logarithm of its odds."""
    alpha = row["noise"]
    ahead = math.log(alpha / (1 - alpha)) if alpha and not row["model"].startswith("Origin") else 0.
    return math.log(59 + math.exp(ahead)) - alpha * ahead


@pytest.mark.parametrize("where", ["saved", "reduced"])
def test_curves_begin_where_nothing_is_learnt(where, request):
    curves = tables(PAPERS / "results" if where == "saved" else request.getfixturevalue("reduced")[0])[0]
    start = curves[curves["step"] == 0]
    assert len(start) == len(settings(curves)) and (curves[["seen excess", "unseen excess"]] >= 0).all(axis=None)
    known = start[~start["model"].str.contains("Reparam-Softmax") & ((start["samples"] == 0) | start["model"].str.startswith("Origin"))]  # softmax attends before it has learnt; a finite set has its own odds
    assert len(known) > len(start) / 2
    expected = known.apply(first_loss, axis=1) - known["noise"].map(lambda noise: Recall(noise=noise).optimum()[0].value)
    for outputs in ("seen", "unseen"): assert (known[f"{outputs} excess"] - expected).abs().max() < 1e-3


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """The notebook's tables and output, from a small sweep that it trains."""
    folder = tmp_path_factory.mktemp("reduced")
    command = [sys.executable, "-m", "papermill", PAPERS / "recall.ipynb", folder / "out.ipynb", "-p", "reduced", "True", "-p", "tables_dir", folder / "tables", "--cwd", PAPERS]
    done = subprocess.run([str(part) for part in command], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "tables", nbformat.read(folder / "out.ipynb", 4)


def test_a_reduced_sweep_has_every_model_noise_and_rate(reduced):
    wanted = {(model, noise, lr, bool(samples)) for model, noise, lr, samples in asked()[0]}
    for table in tables(reduced[0]): assert {(model, noise, lr, bool(samples)) for model, noise, lr, samples in settings(table)} == wanted


def test_reduced_figures_show_the_entropies(reduced):
    lines = {alpha: f"optimum {Recall(noise=alpha).optimum()[0].value:.4g} (exact)" for alpha in (0, .2, .5, .8)}
    first, every, finite, layers, spectra = optima(reduced[1])
    assert every == set(lines.values()) and finite == {lines[.5]} and layers == {lines[.2], lines[.5], lines[.8]} and not spectra
    assert first == {lines[0], lines[.5], "optimum 1 (exact)"}
