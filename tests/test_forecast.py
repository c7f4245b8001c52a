"""The forecasting task: its metrics, its optima and references, losses that learn, epidemics, ending early, and runs that go on bit for bit."""
import math

import numpy as np
import pandas as pd
import plotly.data
import pytest
import torch

from test_kill import recorded

from tformer_lab.data.epidemic import SOURCES, epidemic_windows
from tformer_lab.data.skewed_t import SkewedGeneralizedT
from tformer_lab.data.series import PRESETS, make_windows, smoothing_matrix
from tformer_lab.losses import MSE
from tformer_lab.runs.store import Run, RunError
from tformer_lab.tasks.forecast import LOSS_PARAMETERS, VALIDATION_STREAM, Forecast, error_quantiles, loss_from, percentage_errors
from tformer_lab.tasks.recall import Recall
from tformer_lab.tasks.task import Task, task_class
from tformer_lab.theory.forecasting import _condition, horizon_quantiles, linear_forecast
from tformer_lab.training.fit import Loop, fit, resumed, trained
from tformer_lab.training.launch import main
from tformer_lab.training.parameters import ParameterError, build, parameter_values, resolve

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
ROWS = ["jurisdiction,collection_date,average_inpatient_beds_occupied", *(f"AL,2021-01-{day:02},{day}" for day in range(1, 32))]
SIZES = {"data": "normal_short", "input_length": 20, "horizon": 12, "d_model": 8, "n_layers": 1, "validation_size": 64}


def small(**given):
    heads = {} if given.get("model") == "lstm" else {"n_heads": 2}
    return Forecast(**{**SIZES, **heads, **given})


def train(task, runs, **how):
    return fit(task, runs_dir=runs, progress=False, **{"steps": 30, "batch_size": 8, "checkpoints": 3, "evaluations": 6, **how})


class Killed(BaseException):
    """Ends a training where nothing of it can be saved any more."""


def killed_at(step, monkeypatch, function, *arguments, **how):
    """Train until a step's evaluation or batch, with a state at every step."""
    with monkeypatch.context() as patch:
        evaluate = Loop._is_late

        def mortal(loop, now):
            if now > step: raise Killed
            return True

        patch.setattr(Loop, "_is_late", mortal)
        with pytest.raises(Killed): function(*arguments, **how)
        assert Loop._is_late is not evaluate


# Parameters

def test_the_task_is_known_by_name_and_its_loss_and_model_are_parameters():
    task, trainer = resolve({"task": "forecast", "loss": "sgt", "sgt_q": 1.001, "model": "lstm", "optimizer": "adam", "data": None})
    assert isinstance(task, Task) and type(task) is task_class("forecast") and (trainer.optimizer, trainer.batch_size) == ("adam", 32)
    assert task.criterion().law.q == pytest.approx(1.001) and type(task.model()).__name__ == "LSTMForecaster"
    values = parameter_values(task)
    assert (values["loss"], values["model"]) == ("sgt", "lstm") and not {"loss_name", "architecture"} & values.keys()
    assert build(Forecast, values) == task


@pytest.mark.parametrize("wrong, said", [
    ({"sgt_q": 3.}, "the loss 'mse' has no such parameter; sgt and unnormalized_sgt would have"), ({"loss": "sgt", "cauchy_scale": 1.}, "cauchy would have"), ({"loss": "huber", "learn_loss": True}, "nothing to learn"),
    ({"loss": "unnormalized_sgt", "learn_loss": True}, "nothing to learn"), ({"loss": "sgt", "sgt_q": .5}, "loss 'sgt': .* with sgt_standardized=False"), ({"loss": "sgt", "learn_loss": ""}, "cannot learn ''; it can learn sigma"), ({"learn_loss": ""}, "learn_loss is '': the loss 'mse' has nothing to learn"), ({"loss": "cauhcy"}, "did you mean 'cauchy'"), ({"model": "lstm", "n_heads": 2}, "an lstm has no such parameter"),
    ({"model": "rnn"}, "'transformer' or 'lstm'"), ({"d_model": 30}, "multiple of n_heads, 4"), ({"input_length": 20}, "is smoothed over 99 steps"), ({"path": "a.csv"}, "it is for an epidemic"), ({"validation_share": .5}, "it is for an epidemic"),
    ({"data": "rvr_us", "validation_size": 5}, "validation_share"), ({"data": "rvr_us", "scaling": "none"}, "scaled by their input"), ({"dropout": 1.}, "less than 1"), ({"horizon": 0}, "greater than or equal to 1"), ({"loss": True}, "it should be"),
    ({"loss_name": "mse"}, "nexpected")])
def test_wrong_parameters_are_refused(wrong, said):
    with pytest.raises(ParameterError, match=said): build(Forecast, wrong)


def test_a_dropout_that_is_asked_for_is_refused_where_it_would_be_switched_off():
    for optimizer in ("es", "ga"):
        with pytest.raises(ParameterError, match=f"dropout = 0.3: it is for optimizers that follow a gradient; {optimizer} switches it off"): resolve({"task": "forecast", "optimizer": optimizer, "dropout": .3})
        assert [resolve({"task": "forecast", "optimizer": optimizer, **given})[0].dropout for given in ({}, {"dropout": 0}, {"dropout": None})] == [.1, 0, .1]
    assert resolve({"task": "forecast", "dropout": .3})[0].dropout == .3


@pytest.mark.parametrize("name", LOSS_PARAMETERS)
def test_every_parameter_of_a_loss_reaches_it_and_belongs_to_no_other(name):
    losses, own = LOSS_PARAMETERS[name]
    for loss in losses:
        r = torch.linspace(-2, 2, 9, dtype=torch.float64)
        others = {"sgt_q": 3.} if own == "standardized" else {}  # at p = q = 2 both are one law
        assert not torch.equal(loss_from(loss, **others, **{name: {"q": 7., "p": 1.5, "standardized": False}.get(own, .8)}).pointwise(r), loss_from(loss, **others).pointwise(r))
    for loss in {"mse", "mae", "huber", "quantile", "cauchy", "sgt", "unnormalized_cauchy", "unnormalized_sgt"} - set(losses):
        with pytest.raises(ValueError, match=name): loss_from(loss, **{name: .8})


# Metrics

def test_evaluation_is_what_the_definitions_say():
    task = small(loss="huber", huber_delta=.1, scaling="input")
    model, windows = task.model().eval(), task.validation
    with torch.no_grad():
        found = task.evaluate(model)
        forced, free = model(windows.inputs, windows.targets), model.forecast(windows.inputs, 12)
    loss = torch.nn.HuberLoss(delta=.1)
    forecast, target = ((v * windows.scale + windows.center).double() for v in (free, windows.targets))
    expected = {"valid/loss": loss(forced, windows.targets), "valid/free_loss": loss(free, windows.targets), "valid/free_mse": (free - windows.targets).square().mean(), "valid/free_mae": (free - windows.targets).abs().mean(),
                "valid/mape": 100 * ((forecast - target).abs() / target.abs()).mean(), "valid/smape": 200 * ((forecast - target).abs() / (forecast.abs() + target.abs())).mean()}
    assert found.keys() == expected.keys()
    for name, value in expected.items(): assert found[name] == pytest.approx(value.item(), rel=1e-4), name


def test_denominators_of_zero():
    zeros, ones = torch.zeros(4, 1, 1), torch.ones(4, 1, 1)
    assert percentage_errors(zeros, zeros) == {"smape": 0.} and percentage_errors(ones, zeros) == {"smape": 200.}
    mixed = torch.tensor([0., 2., 0., -4.]).reshape(4, 1, 1)
    assert percentage_errors(ones, mixed)["mape"] == pytest.approx(100 * (1 / 2 + 5 / 4) / 2)


def test_all_models_are_evaluated_on_the_same_windows_and_no_training_sees_them():
    one, other = small(), small(loss="mae", model="lstm")
    assert torch.equal(one.validation.targets, other.validation.targets) and len(one.validation.targets) == 64
    for seed in range(3): assert not torch.isin(one.batch(50, np.random.default_rng([seed, 0])).targets, one.validation.targets).any()


MEASURES = {"free_loss", "free_mse", "free_mae", "mape", "smape"}


def test_a_finite_training_set_is_evaluated_like_the_validation_windows(tmp_path):
    task = small(loss="mae", dropout=.3, validation_size=24)
    run = train(task, tmp_path, samples=40, batch_size=40, steps=6)
    chosen = torch.from_numpy(np.random.default_rng(VALIDATION_STREAM).permutation(40)[:24])
    model, windows, last = trained(run), task.batch(40, np.random.default_rng([0, 1])).take(chosen), run.metrics.iloc[-1]
    assert {f"{side}/{name}" for side in ("train", "valid") for name in MEASURES} | {"train/loss", "train/forced_loss", "valid/loss"} == set(run.metrics.columns) - {"step"}
    with torch.no_grad(): forced, free = model(*windows[:2]), model.forecast(windows.inputs, 12)
    expected = {"forced_loss": (forced - windows.targets).abs().mean(), "free_loss": (free - windows.targets).abs().mean(), "free_mae": (free - windows.targets).abs().mean(), "free_mse": (free - windows.targets).square().mean()}
    expected = {name: value.item() for name, value in expected.items()} | percentage_errors(free, windows.targets)
    for name, value in expected.items(): assert last[f"train/{name}"] == pytest.approx(value, rel=1e-5), name
    for name in MEASURES: assert last[f"train/{name}"] != pytest.approx(last[f"valid/{name}"], rel=1e-3)
    assert task.evaluate_training(model, None) == {} and not [name for name in train(task, tmp_path, steps=2).metrics if name.startswith("train/") and name != "train/loss"]


def test_what_is_learnt_by_heart_shows_between_training_and_validation(tmp_path):
    last = train(small(dropout=0., d_model=16), tmp_path, samples=4, batch_size=4, steps=300, lr=3e-3, evaluations=2, keep_weights=False).metrics.iloc[-1]
    assert last["train/forced_loss"] == pytest.approx(last["train/loss"], rel=1e-4)  # of all four
    for name in ("free_mse", "free_mae", "smape"): assert last[f"train/{name}"] < .7 * last[f"valid/{name}"]


# What no forecast can beat

class Linear(torch.nn.Module):
    """The best linear predictor, and given the horizon so far the best one step ahead: no forecast of nearly normal noise is much better on average."""
    def __init__(self, task):
        super().__init__()
        self.criterion, self.process, self.steps, self.nothing = task.criterion(), PRESETS[task.data], (task.input_length, task.horizon), torch.nn.Parameter(torch.zeros(()))
        self.S = smoothing_matrix(self.process.weights(), sum(self.steps))

    def forecast(self, inputs, horizon):
        windows = make_windows(torch.cat([inputs, torch.zeros(len(inputs), horizon, 1)], 1), *self.steps)
        return torch.from_numpy(linear_forecast(self.process, windows)).float()

    def forward(self, inputs, targets):
        past, found = torch.cat([inputs, targets], 1)[..., 0].double().numpy(), []
        for end in range(inputs.shape[1], past.shape[1]):
            weights, _ = _condition(self.S[:end], self.S[end:end + 1], 1e-7)  # float32 rounds what is seen
            found.append(torch.from_numpy(past[:, :end] @ weights[0]))
        return torch.stack(found, 1)[..., None].float()


class Constant(torch.nn.Module):
    """Forecasts 0."""
    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forecast(self, inputs, horizon): return inputs.new_zeros(len(inputs), horizon, 1)


@pytest.mark.parametrize("loss", [{"loss": "mse"}, {"loss": "sgt", "sgt_sigma": .3, "sgt_q": 20.}, {"loss": "cauchy", "cauchy_scale": .1}], ids=lambda loss: loss["loss"])
def test_the_best_forecaster_reaches_the_optima_and_does_not_beat_them(loss):
    """On many windows: nearly normal noise, so that the best linear predictor is nearly the best, and the bounds are nearly tight."""
    task = small(**loss, validation_size=8000)
    bounds = {o.metric: o for o in task.optimum()}
    assert bounds.keys() == {"train/loss", "valid/loss", "valid/free_loss", "valid/free_mse", "valid/free_mae"} and {o.kind for o in bounds.values()} == {"bound"}
    found = task.evaluate(Linear(task))
    assert bounds["train/loss"].value == bounds["valid/loss"].value < bounds["valid/free_loss"].value
    for name in bounds.keys() - {"train/loss"}:
        scale = max(abs(bounds[name].value), .1)
        assert bounds[name].value - .02 * scale < found[name] < bounds[name].value + .04 * scale, name


def test_a_trained_model_stays_above_its_optimum_and_a_reference_too(tmp_path):
    """A metric of the other kind would be refuted: the teacher-forced loss ends below what bounds the free-running one."""
    task = small(validation_size=2000, dropout=0., d_model=16)
    run = train(task, tmp_path, steps=250, batch_size=64, lr=5e-3, evaluations=2, keep_weights=False)
    bounds, last = {o["metric"]: o["value"] for o in run.optimum}, run.metrics.iloc[-1]
    assert bounds == {o.metric: o.value for o in task.optimum()}
    for name in ("valid/loss", "valid/free_loss", "valid/free_mae"): assert last[name] > .98 * bounds[name]
    assert last["valid/loss"] < bounds["valid/free_loss"]
    references = {(r["metric"], r["name"]): r["value"] for r in run.references}
    for (metric, name), value in references.items(): assert value > .95 * bounds[metric], (metric, name)
    assert references["valid/free_loss", "best linear predictor"] < references["valid/free_loss", "the last value"] < 1
    assert last["valid/loss"] < references["valid/loss", "the last value"]


def test_references_are_losses_of_what_they_name():
    task = small(loss="mae", scaling="input")
    windows = task.validation
    found = {(r.metric, r.name): r.value for r in task.references()}
    before = torch.cat([windows.inputs, windows.targets], 1)[:, -13:-1]
    assert found["valid/loss", "the last value"] == pytest.approx((before - windows.targets).abs().mean().item(), rel=1e-5)
    assert found["valid/free_mse", "the last value"] == pytest.approx((windows.inputs[:, -1:] - windows.targets).square().mean().item(), rel=1e-5)
    assert found["valid/free_loss", "best linear predictor"] < found["valid/free_loss", "the last value"]
    for metric in ("valid/loss", "valid/free_loss", "valid/free_mae"): assert found[metric, "a constant"] == pytest.approx(windows.targets.abs().mean().item(), rel=1e-5)
    assert found["valid/free_mse", "a constant"] == pytest.approx(windows.targets.square().mean().item(), rel=1e-5)
    assert {r.metric for r in small(loss="sgt", learn_loss=True).references()} == {"valid/free_mse", "valid/free_mae"}


def test_where_nothing_is_known_there_is_no_optimum():
    assert small(scaling="input").optimum() == []
    assert small(data="heavy_tailed_short").optimum() == []  # a moment that no sample shows
    assert {o.metric for o in small(data="heavy_tailed_short", loss="cauchy").optimum()} == {"train/loss", "valid/loss", "valid/free_loss"}
    assert {o.metric for o in small(loss="sgt", learn_loss=True).optimum()} == {"valid/free_mse", "valid/free_mae"}


def test_a_finite_training_set_has_no_bound_of_its_loss(tmp_path):
    run = train(small(), tmp_path, samples=16, steps=4)
    assert "train/loss" not in {o["metric"] for o in run.optimum} and "population/loss" not in run.metrics
    assert "population/loss" in train(small(), tmp_path, samples=16, steps=4, population_size=8).metrics


# Learnt losses

@pytest.mark.parametrize("loss, learnt", [("cauchy", {"scale"}), ("sgt", {"sigma", "skew", "p", "q"})])
def test_parameters_of_a_loss_are_trained_with_the_model(loss, learnt, tmp_path):
    task = small(loss=loss, learn_loss=True)
    run = train(task, tmp_path, steps=60, lr=1e-2)
    before, after = task.criterion().state_dict(), trained(run).criterion.state_dict()
    assert {name.rpartition(".")[2] for name in after} == learnt
    assert all(not torch.equal(before[name], after[name]) for name in after)
    kept = run.checkpoints[60]
    assert all(torch.equal(kept[f"criterion.{name}"], value) for name, value in after.items())
    model = trained(run)
    with torch.no_grad(): forced, targets = model(*task.validation[:2]), task.validation.targets
    assert run.metrics["valid/loss"].iloc[-1] == pytest.approx(model.criterion(forced, targets).item(), rel=1e-5) != pytest.approx(task.criterion()(forced, targets).item(), rel=1e-5)
    fixed = small(loss=loss).model()
    assert not any(name.startswith("criterion") for name, _ in fixed.named_parameters())


def test_some_of_a_loss_s_parameters_are_learnt_by_name():
    for given, learnt in ((True, {"sigma", "skew", "p", "q"}), ("sigma, q", {"sigma", "q"}), ("skew", {"skew"})):
        task = build(Forecast, {"loss": "sgt", "learn_loss": given})
        assert set(task.criterion().free) == learnt and not [o for o in task.optimum() if o.metric == "valid/loss"]
    assert build(Forecast, {"loss": "sgt", "learn_loss": "sigma,q"}).label == "transformer-normal-sgt-learnt_sigma_q"
    with pytest.raises(ParameterError, match="cannot learn 'scale'; it can learn sigma, skew, p, q"): build(Forecast, {"loss": "sgt", "learn_loss": "scale"})
    with pytest.raises(ParameterError, match="mse.* has nothing to learn"): build(Forecast, {"loss": "mse", "learn_loss": "scale"})


def test_an_sgt_loss_without_a_variance_can_be_asked_for():
    task = build(Forecast, {"loss": "sgt", "sgt_q": .6, "sgt_standardized": False})
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    density = SkewedGeneralizedT(0., 1., 0., 2., .6, False).pdf(x.numpy())
    np.testing.assert_allclose(task.criterion().pointwise(x).numpy(), -np.log(density), rtol=1e-6)
    with pytest.raises(ParameterError, match="q"): build(Forecast, {"loss": "sgt", "sgt_q": .6})
    with pytest.raises(ParameterError, match="no such parameter"): build(Forecast, {"loss": "mse", "sgt_standardized": False})


# Runs

@pytest.mark.parametrize("given", [{}, {"model": "lstm", "loss": "sgt", "learn_loss": True}, {"scaling": "input", "loss": "cauchy"}], ids=["transformer", "lstm", "scaled"])
def test_a_killed_run_goes_on_bit_for_bit(given, tmp_path, monkeypatch):
    """Killed twice; dropout is on, so the random state has to be right as well."""
    task, how = small(**given, dropout=.3), {} if given else {"samples": 20}
    unbroken = train(task, tmp_path / "unbroken", **how)
    killed_at(7, monkeypatch, train, task, tmp_path / "killed", **how)
    [path] = (tmp_path / "killed").iterdir()
    killed_at(19, monkeypatch, lambda: fit(*resumed(Run(path)), resume=Run(path), progress=False))
    run = fit(*resumed(Run(path)), resume=Run(path), progress=False)
    assert run.status == "done" and recorded(run) == recorded(unbroken)


def test_patience_ends_a_training_after_evaluations_without_a_better_one(tmp_path):
    task, how = small(dropout=.3), {"steps": 200, "lr": .1, "evaluations": 40, "checkpoints": 2}
    run, whole = train(task, tmp_path, patience=3, **how), train(task, tmp_path, **how)
    losses = run.metrics[["step", "valid/free_loss"]].dropna()
    best = losses["valid/free_loss"].argmin()
    assert run.status == "done" and len(losses) - 1 - best == 3 and losses["step"].iloc[-1] < 200
    assert losses["valid/free_loss"].iloc[-3:].min() >= losses["valid/free_loss"].iloc[best]
    for i in range(len(losses) - 1): assert losses["valid/free_loss"].iloc[:i + 1].argmin() > i - 3  # and no earlier
    pd.testing.assert_frame_equal(run.metrics, whole.metrics.iloc[:len(run.metrics)])
    last = int(losses["step"].iloc[-1])
    assert run.spectra.steps[-1] == last and trained(run).state_dict().keys() == run.checkpoints[last].keys()
    assert all(torch.equal(run.checkpoints[last][name], weights) for name, weights in trained(run).state_dict().items())
    with torch.no_grad(): found = {best: task.evaluate(trained(run, best=best))["valid/free_loss"] for best in (False, True)}
    assert found == pytest.approx({False: losses["valid/free_loss"].iloc[-1], True: losses["valid/free_loss"].min()}, rel=1e-6)
    with pytest.raises(RunError, match="only a training with patience keeps its best weights"): trained(whole, best=True)


@pytest.mark.parametrize("step", [4, 39])
def test_a_killed_run_with_patience_ends_where_the_unbroken_one_does(step, tmp_path, monkeypatch):
    task, how = small(dropout=.3), {"steps": 200, "lr": .1, "evaluations": 40, "checkpoints": 2, "patience": 3}
    unbroken = train(task, tmp_path / "unbroken", **how)
    step = min(step, int(unbroken.metrics["step"].iloc[-1]) - 1)
    killed_at(step, monkeypatch, train, task, tmp_path / "killed", **how)
    [path] = (tmp_path / "killed").iterdir()
    run = fit(*resumed(Run(path)), resume=Run(path), progress=False)
    assert run.status == "done" and recorded(run) == recorded(unbroken)
    assert all(torch.equal(weights, unbroken.best_weights[name]) for name, weights in run.best_weights.items())
    again = fit(*resumed(run), resume=run, progress=False)  # what has ended ends again at once
    assert recorded(again) == recorded(unbroken)


def test_patience_needs_a_metric(tmp_path):
    with pytest.raises(ParameterError, match="recall has no metric"): fit(Recall(length=16), runs_dir=tmp_path, patience=3, progress=False)
    assert not list(tmp_path.iterdir())


# Epidemics

@pytest.fixture
def table(tmp_path):
    """Beds of ten places; a place's level is its number, so that a window tells where it is from."""
    dates, rng = pd.date_range("2021-01-01", periods=90).strftime("%Y-%m-%d"), np.random.default_rng(0)
    parts = [pd.DataFrame({"jurisdiction": f"P{i}", "collection_date": dates, "average_inpatient_beds_occupied": 1000. * (i + 1) + 100 * np.sin(np.arange(90) / 5 + i) + rng.normal(size=90)}) for i in range(10)]
    path = tmp_path / "beds.csv"
    pd.concat(parts).to_csv(path, index=False)
    return path


def test_an_epidemic_is_split_by_place_and_trained_on(table, tmp_path):
    task = Forecast(data="rvr_us", path=str(table), input_length=20, horizon=5, d_model=8, n_layers=1, n_heads=2)
    batch = task.batch(200, np.random.default_rng(0))
    places = lambda windows: set((windows.center[:, 0, 0] / 1000).round().int().tolist())
    assert len(places(task.validation)) == 2 and len(places(batch)) == 8 and not places(batch) & places(task.validation)
    assert len(task.batch(8, np.random.default_rng(0)).group) == 8
    whole = task.batch(len(task._sides[0].group), np.random.default_rng(1))
    assert len(whole.targets.flatten(1).unique(dim=0)) == len(task._sides[0].group)  # each once
    run = train(task, tmp_path / "runs", samples=16)
    assert run.status == "done" and run.optimum == [] and {r["name"] for r in run.references} == {"a constant", "the last value"}
    assert math.isfinite(run.metrics["valid/smape"].dropna().iloc[-1]) and "population/loss" not in run.metrics
    with pytest.raises(ParameterError, match="no population"): train(task, tmp_path / "others", samples=16, population_size=8)
    assert run.config["parameters"]["path"] == str(table)
    found, own = (task.evaluate_training(task.model().eval(), data) for data in (None, task._sides[0]))
    assert found.keys() == {f"train/{name}" for name in MEASURES | {"forced_loss"}} == own.keys() and "train/smape" in train(task, tmp_path / "drawn", steps=2).metrics


@pytest.fixture
def prices():
    """Weekly prices of six shares in 2018 and 2019, as they come with plotly: measured, and not generated."""
    return plotly.data.stocks(datetimes=True).set_index("date")


@pytest.fixture
def shares(prices, tmp_path):
    """The same in a table with the columns of the hospitals."""
    long = prices.rename_axis("collection_date").reset_index().melt("collection_date", var_name="jurisdiction", value_name="average_inpatient_beds_occupied")
    long.sample(frac=1, random_state=0).to_csv(tmp_path / "shares.csv.gz", index=False)
    return tmp_path / "shares.csv.gz"


def test_measured_series_are_read_smoothed_and_cut_as_pandas_does_it(prices, shares):
    windows, series = epidemic_windows(shares, "rvr_us", 36, 9)
    smooth = prices.rolling(SOURCES["rvr_us"].smoothing, min_periods=1).mean()
    assert series.names == tuple(sorted(prices)) and set(series.start) == {"2018-01-01"} and [len(values) for values in series.values] == [105] * 6
    for name, values in zip(series.names, series.values): np.testing.assert_allclose(values, smooth[name])
    assert windows.inputs.shape[1:] == (36, 1) and windows.targets.shape[1:] == (9, 1)
    inputs, targets = (windows.unscale(part)[..., 0].numpy() for part in (windows.inputs, windows.targets))
    for place, window, horizon in zip(windows.group, inputs, targets):
        cuts = np.lib.stride_tricks.sliding_window_view(smooth[series.names[place]], 45)
        whole = cuts[np.abs(cuts - np.r_[window, horizon]).max(1) < 1e-5]
        assert len(whole) == 1  # one place in the series, and what came right after the window
        scaled = (whole[0] - whole[0, :36].mean()) / whole[0, :36].std()
        i = int(np.flatnonzero((inputs == window).all(1))[0])
        np.testing.assert_allclose(np.r_[windows.inputs[i, :, 0], windows.targets[i, :, 0]], scaled, atol=1e-4)


def test_a_forecaster_is_trained_on_measured_series_and_no_share_is_on_both_sides(prices, shares, tmp_path):
    task = Forecast(data="rvr_us", path=str(shares), validation_share=.34, input_length=36, horizon=9, d_model=8, n_layers=1, n_heads=2, dropout=0)
    training, validation = task._sides
    assert len(validation.group.unique()) == 2 and len(training.group.unique()) == 4 and not set(training.group.tolist()) & set(validation.group.tolist())
    run = train(task, tmp_path / "runs", steps=60)
    loss = run.metrics["train/free_loss"].dropna()
    assert run.status == "done" and loss.iloc[-1] < .8 * loss.iloc[0] and np.isfinite(run.metrics["valid/mape"].dropna()).all()
    last = validation.unscale(validation.inputs[:, -1:].expand_as(validation.targets))
    stays = percentage_errors(last, validation.unscale(validation.targets))["mape"]
    assert 1 < stays < 15  # two months of a share: the prices have kept their unit
    [free] = [r["value"] for r in run.references if (r["metric"], r["name"]) == ("valid/free_mse", "the last value")]
    assert free == pytest.approx((validation.targets - validation.inputs[:, -1:]).square().mean().item(), rel=1e-5)


def test_a_bad_table_stops_before_a_run_is_made(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for path in ("bad.csv", "none.csv"):
        with pytest.raises(ValueError, match="has no column|there is no file"): train(Forecast(data="rvr_us", path=str(tmp_path / path), input_length=20, horizon=5), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, content, says", [
    ("a.csv.xz", "place,collection_date", "cannot be read as a table"), ("a.csv", "\n".join(ROWS[:25]), "a window and its horizon are 25 steps, and there are AL (24)"),
    ("a.csv", "\n".join(ROWS[:30]), "all windows are cut from one series"), ("a.csv", ROWS[0] + "\nAL,2021-01-01\n", "line 2: it has 2 fields, and the head has 3"),
    ("a.csv", f"{ROWS[0]}\nAL,2021-01-01T00:00+01:00,3\nAL,2021-01-02T00:00+02:00,4\n", "more than one time zone")])
def test_the_command_says_what_is_wrong_with_a_file_and_writes_nothing(name, content, says, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    given = {"task": "forecast", "data": "rvr_us", "path": tmp_path / name, "input_length": 20, "horizon": 5, "runs_dir": tmp_path / "runs"}
    assert main(["--quiet", *(part for pair in given.items() for part in ("-p", *map(str, pair)))]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tformer-train: {tmp_path / name}") and says in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()


def traces_of(figure, name): return [trace for trace in figure.data if trace.name == name]


def test_the_figure_shows_forecasts_beside_what_came_and_how_far_off_others_are():
    task = small(scaling="input")
    model = task.model().eval()
    figure, windows, others = task.figure(model, 2), task.validation.take(torch.arange(2)), task.validation.take(torch.arange(2, 64))
    assert {trace.name for trace in figure.data} == {"80% by its errors", "window", "what came", "forecast", "80% given the window"}
    with torch.no_grad(): free, left = model.forecast(windows.inputs, 12).numpy(), (others.targets - model.forecast(others.inputs, 12)).numpy()
    errors = np.sort(left[..., 0], axis=0)  # 62: the quantiles of 10 and 90 percent are between the 6th and the 7th, and so from above
    low, high = .7 * errors[5] + .3 * errors[6], .3 * errors[-7] + .7 * errors[-6]
    known = horizon_quantiles(PRESETS["normal_short"], windows)
    for i in range(2):
        def unscaled(values): return values * windows.scale[i].item() + windows.center[i].item()
        np.testing.assert_allclose(traces_of(figure, "forecast")[i].y, unscaled(free[i, :, 0]), atol=2e-5)
        np.testing.assert_allclose(traces_of(figure, "what came")[i].y, unscaled(windows.targets[i, :, 0]), atol=2e-5)
        np.testing.assert_allclose(traces_of(figure, "80% by its errors")[i].y, unscaled(np.r_[free[i, :, 0] + low, (free[i, :, 0] + high)[::-1]]), atol=5e-5)
        for line, end in zip(traces_of(figure, "80% given the window")[2 * i:2 * i + 2], known): np.testing.assert_allclose(line.y, unscaled(end[i, :, 0]), atol=2e-5)


def test_only_bands_that_are_known_are_drawn():
    heavy, few = (task.figure(task.model().eval()) for task in (small(data="heavy_tailed_short"), small(validation_size=11)))
    assert traces_of(heavy, "80% by its errors") and not traces_of(heavy, "80% given the window")
    assert traces_of(few, "80% given the window") and not traces_of(few, "80% by its errors")  # of 8 errors
    assert len(traces_of((task := small(validation_size=12)).figure(task.model().eval()), "80% by its errors")) == 3


@pytest.mark.parametrize("scaling", ["none", "input"])
@pytest.mark.parametrize("data", ["normal_short", "normal"])
def test_eight_of_ten_futures_lie_within_what_is_known_of_them_at_every_step(data, scaling):
    windows = small(data=data, scaling=scaling, input_length=100, validation_size=3000).validation
    low, high = horizon_quantiles(PRESETS[data], windows)
    target = windows.targets.numpy()
    inside = ((low < target) & (target < high)).mean((0, 2))
    assert abs(inside.mean() - .8) < .015 and np.abs(inside - .8).max() < .03
    wide = np.subtract(*horizon_quantiles(PRESETS[data], windows, (.975, .025)))
    np.testing.assert_allclose(wide / (high - low), 1.959964 / 1.281552, rtol=1e-5)


@pytest.mark.parametrize("data, forecaster", [("normal_short", "linear"), ("heavy_tailed_short", "linear"), ("normal_short", "untrained")])
def test_eight_of_ten_errors_lie_within_the_quantiles_of_others(data, forecaster):
    task = small(data=data, validation_size=4000)
    model, windows = (Linear(task) if forecaster == "linear" else task.model()).eval(), task.validation
    low, high = error_quantiles(model, windows.take(torch.arange(2000)))
    rest = windows.take(torch.arange(2000, 4000))
    with torch.no_grad(): left = (rest.targets - model.forecast(rest.inputs, 12)).numpy()
    assert np.abs(((low < left) & (left < high)).mean((0, 2)) - .8).max() < .045
    with pytest.raises(ValueError, match="8 windows: a quantile of 0.1 or 0.9 needs 9"): error_quantiles(model, windows.take(torch.arange(8)))


def test_nine_errors_hold_a_tenth_in_eight_of_ten_draws():
    """Of few errors the rank matters: quantiles of another kind would lie inside."""
    windows = small(validation_size=10 * 400).validation
    model, inside = Constant(), []
    for part in torch.arange(4000).split(10):
        low, high = error_quantiles(model, windows.take(part[:9]))
        inside.append((low < windows.targets[part[9]].numpy()) & (windows.targets[part[9]].numpy() < high))
    assert abs(np.mean(inside) - .8) < .03


def test_float64_and_bfloat16_train(tmp_path):
    for precision in ("float64", "bfloat16"):
        run = train(small(loss="sgt", learn_loss=True), tmp_path, precision=precision, steps=4)
        assert run.status == "done" and run.metrics["valid/free_loss"].notna().sum() > 1
    assert next(trained(train(small(), tmp_path, precision="float64", steps=2)).parameters()).dtype == torch.float64


def test_the_squared_loss_is_the_default():
    assert isinstance(small().criterion(), MSE) and small().label == "transformer-normal_short-mse"
