"""The notebooks of papers: their tables hold what their sweeps ask for, and a small sweep makes them anew."""
import math
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.stats import betabinom

from tformer_lab.runs.grid import combinations
from tformer_lab.runs.sweep import read_sweep
from tformer_lab.tasks.recall import Recall
from tformer_lab.theory.teacher_student import bayes_optimal_smse
from tformer_lab.training.parameters import resolve

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


def remade(paper, folder):
    """A paper's tables and its notebook, from a small sweep that it trains."""
    command = [sys.executable, "-m", "papermill", PAPERS / f"{paper}.ipynb", folder / "out.ipynb", "-p", "reduced", "True", "-p", "tables_dir", folder / "tables", "--cwd", PAPERS]
    done = subprocess.run([str(part) for part in command], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "tables", nbformat.read(folder / "out.ipynb", 4)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory): return remade("recall", tmp_path_factory.mktemp("reduced"))


def test_a_reduced_sweep_has_every_model_noise_and_rate(reduced):
    wanted = {(model, noise, lr, bool(samples)) for model, noise, lr, samples in asked()[0]}
    for table in tables(reduced[0]): assert {(model, noise, lr, bool(samples)) for model, noise, lr, samples in settings(table)} == wanted


def test_reduced_figures_show_the_entropies(reduced):
    lines = {alpha: f"optimum {Recall(noise=alpha).optimum()[0].value:.4g} (exact)" for alpha in (0, .2, .5, .8)}
    first, every, finite, layers, spectra = optima(reduced[1])
    assert every == set(lines.values()) and finite == {lines[.5]} and layers == {lines[.2], lines[.5], lines[.8]} and not spectra
    assert first == {lines[0], lines[.5], "optimum 1 (exact)"}


# Forecasting

FORECASTING = ["d_model", "data", "optimizer", "loss"]
LOSSES = {"squared", "absolute", "Cauchy", "SGT 1.001", "SGT 5", "SGT 20", "SGT 75", "SGT 100"}
SMALL_DATA = ["normal short", "heavy tailed short"]
NOISE = ["normal", "heavy tailed", *SMALL_DATA]
WANTED = {(32, data, "adam", loss) for data in (*NOISE, "influenza") for loss in LOSSES} | {(16, data, optimizer, loss) for data in SMALL_DATA for optimizer in ("adam", "es", "ga") for loss in LOSSES}
REDUCED = {one for one in ((width // 2, *rest) for width, *rest in WANTED) if one[-1] == "squared" or one[-1] == "SGT 1.001" and one[-2] == "adam"}
PLACES = {(where, matrix) for where in ("encoder", "decoder", "cross") for matrix in "QKVO"} | {(where, f"feed-forward {way}") for where in ("encoder", "decoder") for way in ("up", "down")}


def forecasting_tables(folder): return {name: pd.read_csv(folder / f"forecasting_{name}.csv", comment="#") for name in ("errors", "one_step", "spectra", "curves", "effects")}


def of_settings(table, columns): return set(table[columns].itertuples(index=False, name=None))


@pytest.mark.parametrize("file, count, seeds", [("forecasting", 80, 3), ("forecasting_epidemic", 8, 3), ("forecasting_published", 112, 5)])
def test_the_sweeps_of_the_forecasting_paper_hold_what_can_be_run(file, count, seeds):
    given = read_sweep(PAPERS / f"{file}.yaml")
    every = combinations(given["parameters"])
    assert len(every) == count and given["seeds"] == seeds
    for one in every:
        task, trainer = resolve({**one, "seed": 0}, others=set())
        assert task.name == "forecast" and trainer.optimizer == one.get("optimizer", "adam")
    settings = {(one["data"], one.get("optimizer", "adam"), one.get("n_heads"), one["loss"], one.get("sgt_q"), one.get("sgt_sigma")) for one in every}
    assert len(settings) == count and {one[3:] for one in settings} == {("mse", None, None), ("mae", None, None), ("cauchy", None, None), ("sgt", 1.001, 15), *(("sgt", q, .707) for q in (5, 20, 75, 100))}


def complete(tables, wanted, seeds):
    """Every setting in every table, every place, and every seed."""
    assert of_settings(tables["errors"], FORECASTING) == wanted and set(tables["errors"]["n"]) == {seeds}
    assert of_settings(tables["spectra"], FORECASTING) == wanted and set(tables["spectra"]["n"]) <= {seeds} and of_settings(tables["spectra"], ["where", "matrix"]) == PLACES
    assert of_settings(tables["curves"], ["data", "loss"]) == {(data, loss) for width, data, _, loss in wanted if width == max(one[0] for one in wanted)}
    assert tables["spectra"].query("metric == 'spectral_entropy'")[["value", "change", "beyond"]].notna().all(axis=None)
    assert tables["errors"][["valid/free_mae | a constant", "valid/free_mae | the last value"]].notna().all(axis=None)


def test_saved_tables_of_the_forecasting_paper_are_complete(): complete(forecasting_tables(PAPERS / "results"), WANTED, 3)


def test_saved_effects_follow_from_the_tables():
    """Where losses differ, the table of effects says so."""
    tables = forecasting_tables(PAPERS / "results")
    keys = ["d_model", "data", "optimizer", "metric", "where", "matrix"]
    spread = tables["spectra"].groupby(keys)["value"].agg(lambda v: v.max() - v.min())
    found = tables["effects"].set_index(keys)["spread"]
    known = found[found.notna()].index
    assert len(known) > 300 and (found[known][spread[known] > 0] > 0).all()  # the tables are rounded
    assert tables["effects"].dropna(subset="p").eval("`p corrected` >= p * .999").all()


@pytest.fixture(scope="module")
def reduced_forecasting(tmp_path_factory): return remade("forecasting", tmp_path_factory.mktemp("reduced"))


def test_a_reduced_forecasting_sweep_has_every_setting(reduced_forecasting):
    tables = forecasting_tables(reduced_forecasting[0])
    complete(tables, REDUCED, 1)
    assert tables["effects"]["p"].isna().all()  # one seed shows no effect


def lines_of(notebook, name):
    """How often each figure of a notebook draws a line of that name."""
    figures = [output.data["application/vnd.plotly.v1+json"] for cell in notebook.cells for output in cell.get("outputs", []) if "application/vnd.plotly.v1+json" in output.get("data", {})]
    return [sum(trace.get("name") == name for trace in figure["data"]) for figure in figures]


def test_reduced_forecasting_figures_show_bounds_where_there_are_any(reduced_forecasting):
    errors = forecasting_tables(reduced_forecasting[0])["errors"].groupby(["d_model", "data"]).first()
    known = lambda width, metric: sum(int(errors.loc[width, f"{metric} | {kind}"].notna().sum()) for kind in ("bound", "exact") if f"{metric} | {kind}" in errors)
    drawn = lines_of(reduced_forecasting[1], "optimum (bound)")
    assert drawn[0] == known(16, "valid/free_mae") + known(16, "valid/free_mse") >= 4 and drawn[-2] == known(8, "valid/free_mae") >= 1
    assert sum(drawn) == drawn[0] + drawn[-2]


def test_tables_of_one_width_with_every_optimizer_are_drawn(tmp_path):
    """As those of the published size: Adam and both kinds of evolution, all of the same width."""
    for name, table in forecasting_tables(PAPERS / "results").items():
        chosen = table[table["data"].isin(SMALL_DATA)] if name == "curves" else table[table["data"] == "normal short"].assign(d_model=16) if name == "one_step" else table[table["d_model"] == 16]
        chosen.to_csv(tmp_path / f"forecasting_{name}.csv", index=False)
    command = [sys.executable, "-m", "papermill", PAPERS / "forecasting.ipynb", tmp_path / "out.ipynb", "-p", "tables_dir", tmp_path, "-y", "sweep_files: [forecasting_published.yaml]", "--cwd", PAPERS]
    done = subprocess.run([str(part) for part in command], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# Teacher and student

TEACHER = ["form", "teacher_width", "student_width", "ridge", "sample_ratio", "d_model", "length", "output", "label_noise"]


def teacher_tables(folder): return {name: pd.read_csv(folder / f"teacher_student_{name}.csv", comment="#") for name in ("points", "spectra", "theory", "gamp")}


def asked_of_students():
    """Every setting of the sweep, in numbers."""
    every = [resolve(one, others=set())[0] for one in combinations(read_sweep(PAPERS / "teacher_student.yaml")["parameters"])]
    return {(task.form, *(rows / task.d_model for rows in task.widths), task.ridge, task.sample_ratio, task.d_model, task.length, task.output, task.label_noise) for task in every}


def test_the_sweep_of_students_has_the_published_one_of_the_tied_form():
    tied = {one for one in asked_of_students() if one[0] == "tied" and one[5:] == (100, 2, "softmax", "symmetric")}
    assert len(tied) == 300 and len({one[4] for one in tied}) == 15 and {one[3] for one in tied} == {.1, .01, .001, 1e-4, 1e-5}
    assert {one[1:3] for one in tied} == {(a, b) for a in (.5, 1.) for b in (.75, 1.)}


def test_saved_points_hold_every_setting_with_eight_students():
    points = teacher_tables(PAPERS / "results")["points"]
    assert of_settings(points, TEACHER) == asked_of_students() and len(points) == 372 and set(points["n"]) == {8}


def test_saved_students_are_not_better_than_the_best_and_near_the_ridges_theory():
    tables = teacher_tables(PAPERS / "results")
    both = tables["points"].query("form == 'tied' and d_model == 100 and length == 2 and output == 'softmax' and label_noise == 'symmetric'").merge(tables["theory"], on=["teacher_width", "ridge", "sample_ratio"], suffixes=("", " predicted"))
    assert len(both) == 300 and (both["smse"] + both["smse ±"] > both["bayes"]).all() and (both["label_error"] + both["label_error ±"] > both["bayes_label_error"]).all()
    enough = both.query("sample_ratio >= .1 and ridge >= .01")
    assert (enough["smse"] / enough["smse predicted"] - 1).abs().max() < .07
    for row in tables["theory"].query("ridge == .01").to_dict("records"): assert math.isclose(row["bayes"], float(bayes_optimal_smse(row["sample_ratio"], row["teacher_width"], .5)), rel_tol=1e-3)


@pytest.fixture(scope="module")
def reduced_students(tmp_path_factory): return remade("teacher_student", tmp_path_factory.mktemp("reduced"))


def test_a_reduced_sweep_of_students_has_every_kind(reduced_students):
    tables = teacher_tables(reduced_students[0])
    kinds = {"form", "length", "output", "label_noise"}
    own = [TEACHER.index(name) for name in TEACHER if name in kinds]
    assert {tuple(one[i] for i in own) for one in of_settings(tables["points"], TEACHER)} == {tuple(one[i] for i in own) for one in asked_of_students()}
    assert set(tables["points"]["n"]) == {2} and set(tables["theory"]["status"]) == {"converged"} and tables["gamp"]["gamp"].between(0, 2).all()


def test_reduced_figures_of_students_show_the_best_error(reduced_students):
    figures = [output.data["application/vnd.plotly.v1+json"] for cell in reduced_students[1].cells for output in cell.get("outputs", []) if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert [any(trace.get("name") == "Bayes-optimal" for trace in figure["data"]) for figure in figures] == [True, True, False, True, True, False, False, False]


# Graph-structured sequences

GRAPHICAL = ["graph", "model", "d_model", "samples", "steps", "concentration", "observed_concentration"]
KINDS = {"transformer", "mingru", "minlstm", "hawk", "mamba"}


def graphical_tables(folder): return {name: pd.read_csv(folder / f"graphical_{name}.csv", comment="#") for name in ("runs", "curves", "positions", "spectra", "values", "entropies", "probes")}


def asked_of_graphs():
    """Every setting of the sweep, with its number of seeds."""
    found = Counter()
    for one in combinations(read_sweep(PAPERS / "graphical.yaml")["parameters"]):
        task, trainer = resolve(one, others=set())
        found[Path(task.graph).stem, task.architecture, task.d_model, trainer.samples or 0, trainer.steps, task.nodes.nodes[0].concentration, task.nodes.observed.concentration] += 1
    return found


def test_the_sweep_of_graphs_has_five_kinds_of_models_on_every_axis():
    wanted = asked_of_graphs()
    chain = [one for one in wanted if one[0] == "chain" and one[5:] == (.0168, .0168)]
    assert {(model, d_model) for _, model, d_model, samples, steps, *_ in chain if not samples and steps == 500} == {(model, d) for model in KINDS for d in (8, 16, 32, 64)}
    assert {(model, samples) for _, model, _, samples, *_ in chain if samples} == {(model, n) for model in KINDS for n in (32, 100, 316, 1000, 3162, 10000)}
    assert {one[:2] for one in wanted} == {(graph, model) for graph in ("chain", "five_nodes", "slow", "counts") for model in KINDS}
    assert {count for one, count in wanted.items() if one[4] == 500 and (one[0] != "chain" or one[5:] == (.0168, .0168))} == {3}


def test_the_published_sweep_of_graphs_can_be_run_and_has_every_axis():
    given = read_sweep(PAPERS / "graphical_published.yaml")
    every = [resolve({**one, "seed": 0}, others=set()) for one in combinations(given["parameters"])]
    settings = {(task.architecture, task.d_model, trainer.samples, task.concentration, task.observed_concentration) for task, trainer in every}
    sizes, sure = (30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000, None), (1e-4, 3e-4, .001, .003, .01)
    assert given["seeds"] == 3 and len(every) == len(settings)
    assert settings == {*product(KINDS, (8, 16, 32, 64, 128), sizes, [None], [None]), *product(KINDS, [64], (1000, 10_000, None), sure, sure)}
    files = {(task.stored, trainer.samples) for task, trainer in every if task.stored}
    assert {n for _, n in files} == {n for n in sizes if n and n > 10_000} and len({name for name, _ in files}) == len(files)  # a file is of one size


def test_saved_runs_of_graphs_hold_every_setting_and_never_pass_the_entropy():
    tables, wanted = graphical_tables(PAPERS / "results"), asked_of_graphs()
    assert {tuple(one): n for *one, n in tables["runs"][[*GRAPHICAL, "n"]].itertuples(index=False, name=None)} == wanted
    for name in ("runs", "curves", "positions"): assert (tables[name]["excess"] >= 0).all()
    assert (tables["runs"]["least_excess"] <= tables["runs"]["excess"]).all()
    assert of_settings(tables["positions"], ["graph", "model"]) == {(graph, model) for graph in ("chain", "five_nodes", "slow", "counts") for model in KINDS}


def test_saved_entropies_of_counts_are_those_of_a_polya_urn():
    """The closed form, of a token from 16 whose frequencies are Dirichlet, given how often each has come."""
    found = graphical_tables(PAPERS / "results")["positions"].query("graph == 'counts' and model == 'mingru'").set_index("position")["entropy"]
    a, k = .3, 16
    for position, value in found.items():
        n = np.arange(position)
        p = (n + a) / (position - 1 + k * a)
        urn = -k * (betabinom.pmf(n, position - 1, a, (k - 1) * a) * p * np.log(p)).sum()
        assert abs(value - urn) < .12  # of 256 test sequences for each of three kernels
    assert math.isclose(found[1], math.log(k), rel_tol=1e-3)


@pytest.fixture(scope="module")
def reduced_graphs(tmp_path_factory): return remade("graphical", tmp_path_factory.mktemp("reduced"))


def test_a_reduced_sweep_of_graphs_has_every_axis(reduced_graphs):
    tables = graphical_tables(reduced_graphs[0])
    assert of_settings(tables["runs"], ["graph", "model"]) == {one[:2] for one in asked_of_graphs()} and set(tables["runs"]["n"]) == {1}
    assert of_settings(tables["probes"], ["model", "node"]) == {(model, node) for model in KINDS for node in ("slow", "dead", "Z")} and (tables["positions"]["excess"] >= 0).all()
    assert of_settings(tables["values"], ["model", "matrix"]) == {(model, matrix) for model in KINDS for matrix in ("embedding", "unembedding")}
    assert tables["entropies"].set_index("graph").loc["chain", ["entropy", "bigram", "unigram"]].is_monotonic_increasing


ROUTED_KINDS, ROUTED_SETTING = ("mod", "sdt", "stt"), ["task", "model", "layers", "capacity", "optimizer", "steps"]
ROUTED_TASKS = {"language": "text", "graphical": "graph", "decoder_recall": "recall"}


def routing_tables(folder): return {name: pd.read_csv(folder / f"routing_{name}.csv", comment="#") for name in ("runs", "curves", "choices", "spectra", "values", "passage", "references")}


@cache
def asked_of_routers():
    """Every setting of the sweep, with its number of seeds."""
    found, seeds = Counter(), Counter(tuple((name, value) for name, value in one.items() if name != "seed") for one in combinations(read_sweep(PAPERS / "routing.yaml")["parameters"]))
    for one, count in seeds.items():
        task, trainer = resolve(dict(one), others=set())
        found[ROUTED_TASKS[task.name], task.architecture, task.n_layers, task.capacity or 1., trainer.optimizer, trainer.steps] += count
    return found


def operations(vocab, d, feedforward, length, tokens, model):
    """Of a forward pass for a token, where the blocks compute so many tokens of a sequence: products with weights, attention, and the routers."""
    blocks = sum(2 * n * (4 * d * d + 3 * d * feedforward) + 4 * n * n * d for n in tokens)
    causal = d * (d // 2) + d // 2
    routers = 2 * length * {"transformer": 0, "mod": causal + d}.get(model, causal + 2 * d * (d // 8) + (d // 8) * 2 * d)
    return (blocks + 2 * routers + 2 * length * vocab * d) / length


def test_the_sweep_of_routers_has_every_model_at_equal_weights_and_at_equal_operations():
    wanted = asked_of_routers()
    assert set(wanted.values()) == {3} and sum(wanted.values()) == 180
    for task, steps in (("text", 500), ("graph", 600), ("recall", 800)):
        own = {one[1:] for one in wanted if one[0] == task}
        assert {(model, layers, 1., optimizer, steps) for model, layers in (("transformer", 4), ("transformer", 3)) for optimizer in ("adam", "sgd")} <= own
        assert {(model, 4, capacity, "adam", steps) for model in ROUTED_KINDS for capacity in (.25, .5, .75)} <= own and {(model, 4, .5, "sgd", steps) for model in ROUTED_KINDS} <= own
        assert {one[:2] for one in own if one[-1] > steps} == {("transformer", 3), *((model, 4) for model in ROUTED_KINDS)}


def test_saved_runs_of_routers_hold_every_setting_and_their_operations_are_those_of_a_formula():
    runs, wanted = routing_tables(PAPERS / "results")["runs"], asked_of_routers()
    assert {tuple(one): n for *one, n in runs[[*ROUTED_SETTING, "n"]].itertuples(index=False, name=None)} == wanted
    assert (runs.query("task != 'text'")["score"] >= 0).all() and (runs["score"][runs["task"] == "text"] * math.log(2) - runs["loss"][runs["task"] == "text"]).abs().max() < 1e-3
    for row in runs.itertuples():
        vocab, d, feedforward, length = {"text": (256, 64, 176, 63), "graph": (16, 32, 88, 31), "recall": (60, 32, 88, 32)}[row.task]
        tokens = [length if row.capacity == 1 or i % 2 == 0 else int(row.capacity * length) for i in range(row.layers)]
        assert row.flops == pytest.approx(operations(vocab, d, feedforward, length, tokens, row.model), rel=2e-3)
    cost = runs.set_index(ROUTED_SETTING)["flops"]
    for (task, model, layers, capacity, optimizer, steps), value in cost.items():
        if steps not in (500, 600, 800): assert steps * value == pytest.approx({"text": 500, "graph": 600, "recall": 800}[task] * cost[task, "transformer", 4, 1., "adam", {"text": 500, "graph": 600, "recall": 800}[task]], rel=.01)


@pytest.fixture(scope="module")
def reduced_routers(tmp_path_factory): return remade("routing", tmp_path_factory.mktemp("reduced"))


def test_a_reduced_sweep_of_routers_has_every_axis(reduced_routers):
    tables = routing_tables(reduced_routers[0])
    assert of_settings(tables["runs"], ["task", "model", "optimizer"]) == {(one[0], one[1], one[4]) for one in asked_of_routers()} and set(tables["runs"]["n"]) == {1}
    assert (tables["curves"].query("task != 'text'")["score"] > 0).all() and tables["curves"].query("model != 'transformer'")[["gate", "chosen"]].stack().between(0, 1).all()
    shares = tables["choices"].query("task == 'recall'").pivot_table(index=["model", "block", "capacity"], columns="what", values="value")
    assert len(shares) and np.allclose(shares @ pd.Series({"background": 11, "trigger": 2, "after trigger": 2, "last": 1}) / 16, 1, atol=5e-4)  # of all tokens of a sentence
    assert of_settings(tables["spectra"], ["model", "block"]) == {(model, block) for model in ("transformer", *ROUTED_KINDS) for block in range(4)}
    assert set(tables["passage"]["model"]) == set(ROUTED_KINDS) and set(tables["passage"]["chosen"]) <= {0, 1}
