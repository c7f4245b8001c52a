"""Evolution trains like any other method: it improves what can be improved, the same each time, and a run that was killed equals the unbroken one."""
import os
import signal
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from test_kill import assert_same
from torch import nn

from tformer_lab.runs.store import Run, read_state
from tformer_lab.tasks.forecast import Forecast
from tformer_lab.tasks.recall import Recall
from tformer_lab.tasks.task import Optimum
from tformer_lab.training import evolution
from tformer_lab.training.evolution import Candidates, Evolution, EvolutionStrategy, GeneticAlgorithm, fastest
from tformer_lab.training.fit import fit, resumed, trained
from tformer_lab.training.parameters import ParameterError, Trainer, build, trainer_for

pytest.importorskip("evotorch")
pytestmark = pytest.mark.timeout(300)
KINDS = {"es": {"optimizer": "es", "candidates": 16}, "ga": {"optimizer": "ga", "candidates": 16}}


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Halves:
    """Regression on half the identity with noise of variance 0.04; where asked for the model has dropout, or the loss leaves a share of the inputs out at random."""
    dropout: float = 0.
    left_out: float = 0.
    name: ClassVar[str] = "halves"
    defaults: ClassVar[dict] = {"steps": 60, "batch_size": 32, "optimizer": "adam", "lr": .05, "checkpoints": 6}

    def model(self, data=None): return nn.Sequential(nn.Dropout(self.dropout), nn.Linear(5, 4), nn.Linear(4, 5))
    def batch(self, n, rng):
        x, noise = rng.standard_normal((2, n, 5), dtype=np.float32)
        return torch.from_numpy(x), torch.from_numpy(x * np.float32([.5, .5, .5, .5, 0]) + np.float32(.2) * noise)
    def loss(self, model, batch): return nn.functional.mse_loss(model(nn.functional.dropout(batch[0], self.left_out)), batch[1])
    def evaluate(self, model): return {"bias": model[2].bias.norm()}
    def optimum(self): return [Optimum("train/loss", .04)]


class Translate:
    """A transformer from one sequence of vectors to another, with or without dropout."""
    def __init__(self, dropout=0.): self.dropout = dropout
    def model(self): return nn.Transformer(8, 2, 1, 1, 16, dropout=self.dropout, batch_first=True)
    def batch(self, n, rng): return tuple(torch.from_numpy(rng.standard_normal((n, length, 8), dtype=np.float32)) for length in (6, 4, 4))
    def loss(self, model, batch): return nn.functional.mse_loss(model(*batch[:2]), batch[2])


def train(runs, kind="es", task=None, **trainer):
    return fit(task or Halves(left_out=.1), runs_dir=runs, progress=False, **{**KINDS[kind], "candidates_at_once": 16, **trainer})


def test_step_of_the_strategy_equals_its_closed_form():
    torch.manual_seed(3)
    weights, seen = torch.randn(5, dtype=torch.float64), []
    trainer = Trainer(optimizer="es", candidates=8, es_sigma=.3, lr=.07)
    def losses(values):
        seen.append(values)
        return (values**2).sum(1).exp()  # spread over orders of magnitude, which ranks do not see
    strategy = EvolutionStrategy(weights, trainer)
    centers = [weights, strategy.step(losses), strategy.step(losses)]
    m = v = 0
    for t, (values, center, after) in enumerate(zip(seen, centers, centers[1:]), start=1):
        noise = values - center
        torch.testing.assert_close(noise[0::2], -noise[1::2])
        order = sorted(range(8), key=lambda i: -float((values[i]**2).sum()))  # the worst first
        utility = torch.zeros(8, dtype=torch.float64)
        for place, i in enumerate(order): utility[i] = place / 7 - .5
        g = sum((utility[2 * i] - utility[2 * i + 1]) / 2 * noise[2 * i] for i in range(4)) / 4
        m, v = .9 * m + .1 * g, .999 * v + .001 * g**2
        torch.testing.assert_close(after, center + .07 * (m / (1 - .9**t)) / ((v / (1 - .999**t)).sqrt() + 1e-8))
    assert .1 < torch.stack(seen).sub(torch.stack(centers[:2])[:, None]).std() < .6


def test_candidates_lie_sigma_around_their_centre():
    torch.manual_seed(0)
    strategy, seen = EvolutionStrategy(torch.full((4000,), 2.), Trainer(optimizer="es", candidates=8)), []
    strategy.step(lambda values: seen.append(values) or values[:, 0])
    assert abs(float((seen[0] - 2).std()) - .15) < .002


def test_genetic_algorithm_keeps_the_best_of_parents_and_children():
    torch.manual_seed(0)
    algorithm, judged = GeneticAlgorithm(torch.ones(6), Trainer(optimizer="ga", candidates=10)), []
    def losses(values):
        judged.append(values)
        return (values**2).sum(1)
    assert torch.equal(algorithm.population[0], torch.ones(6))
    best = algorithm.step(losses)
    everyone = torch.cat(judged)
    order = (everyone**2).sum(1).argsort()
    assert len(everyone) == 20 and torch.equal(algorithm.population, everyone[order[:10]]) and torch.equal(best, everyone[order[0]])


def test_children_have_their_parents_mean_without_mutation():
    torch.manual_seed(0)
    algorithm, judged = GeneticAlgorithm(torch.zeros(3), Trainer(optimizer="ga", candidates=50, ga_tournament=1, ga_mutation=.1)), []
    algorithm.trainer = Trainer(optimizer="ga", candidates=50, ga_tournament=1, ga_mutation=0., ga_eta=5)
    algorithm.step(lambda values: judged.append(values) or values[:, 0])
    parents, children = judged
    means = (children[:25] + children[25:]) / 2
    pairs = (parents[:, None] + parents[None]).flatten(0, 1) / 2
    def nearest(x, others): return (x[:, None] - others).norm(dim=-1).amin(1)
    assert nearest(means, pairs).max() < 1e-6 and nearest(children, parents).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_known_optimum_is_reached(kind, tmp_path):
    run = train(tmp_path, kind, Halves(), steps=200 if kind == "ga" else 120, candidates=40, candidates_at_once=40, evaluations=1)
    assert run.metrics["train/loss"].head(3).mean() > .2
    assert .03 < run.metrics["train/loss"].tail(30).mean() < .08


@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_learnt(kind, tmp_path):
    task = Recall(vocab_size=12, d_model=24, length=10, test_size=16)
    run = train(tmp_path, kind, task, steps=30, batch_size=32, candidates=32, candidates_at_once=1, evaluations=1, checkpoints=1, lr=.1 if kind == "es" else None)
    losses = run.metrics["train/loss"]
    assert losses[0] == pytest.approx(np.log(12)) and losses.tail(5).mean() < (1.7 if kind == "es" else 2.1)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_weights_are_those_whose_loss_is_recorded(kind, tmp_path):
    task = Halves(dropout=.3)  # which is off: of no seed would the loss be the same again
    run = train(tmp_path, kind, task, samples=32, steps=8, population_size=8, checkpoints=8)  # every batch holds all of the data
    model, data = task.model().eval(), task.batch(32, np.random.default_rng([0, 1]))
    for step in run.checkpoints:
        model.load_state_dict(run.checkpoints[step])
        assert run.metrics["train/loss"][step] == pytest.approx(task.loss(model, data).item(), rel=1e-5)
        assert run.spectra["1"][run.spectra.steps.tolist().index(step)] == pytest.approx(np.linalg.svd(model[1].weight.detach().numpy(), compute_uv=False), rel=1e-4)
    if kind == "ga": assert (np.diff(run.metrics["train/loss"]) <= 1e-7).all()  # the best is never lost


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_numbers_and_another_does_not(kind, tmp_path):
    first, again, other = (train(tmp_path, kind, steps=8, seed=seed, name=name) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert_same(first, again)
    assert not np.array_equal(first.metrics["train/loss"], other.metrics["train/loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_run_goes_on_bit_for_bit(kind, tmp_path, monkeypatch):
    unbroken = train(tmp_path / "unbroken", kind, steps=20)
    run = train(tmp_path / "stopped", kind, steps=20, time_limit=1e-9)
    assert run.status == "stopped"
    stops, loss = iter(range(1, 100)), Halves.loss
    def slow_at_times(self, model, batch):
        if next(stops) % 15 == 0: os.kill(os.getpid(), signal.SIGUSR1)
        return loss(self, model, batch)
    monkeypatch.setattr(Halves, "loss", slow_at_times)
    times = 0
    while run.status == "stopped":
        stops, times = iter(range(1, 1000)), times + 1
        torch.manual_seed(times)  # what else the process has drawn does not matter
        run = fit(*resumed(run, Halves, time_limit=None), resume=run, progress=False)
    assert times > 1
    assert_same(run, unbroken)


def mortal_training(runs, deaths, **trainer):
    """Train in a process that is killed when it is about to put its `deaths`-th file in place."""
    replace, left = os.replace, iter(range(deaths))
    def mortal(*paths):
        if next(left) == deaths - 1: os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = mortal
    train(runs, **trainer)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_resumes_bit_for_bit(kind, processes, tmp_path):
    trainer = {"kind": kind, "steps": 12, "save_minutes": 1e-9}  # a state at every step
    unbroken = train(tmp_path / "unbroken", **trainer)
    process = processes.Process(target=mortal_training, args=(tmp_path / "killed", 21), kwargs=trainer)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [path] = (tmp_path / "killed").iterdir()
    run = Run(path)
    assert run.status == "interrupted" and 2 <= read_state(path)["step"] < 12
    assert_same(fit(*resumed(run, Halves), resume=run, progress=False), unbroken)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss, at_once", [({"loss": "sgt", "learn_loss": True}, 1), ({"loss": "sgt", "learn_loss": "sigma,q", "model": "lstm"}, 1), ({"loss": "cauchy", "learn_loss": True}, 6)], ids=["sgt", "lstm", "cauchy"])
def test_parameters_of_a_loss_evolve_with_the_model_and_go_on_bit_for_bit(kind, loss, at_once, tmp_path):
    """They are weights without a dimension."""
    task = build(Forecast, {"data": "normal_short", "input_length": 20, "horizon": 6, "d_model": 8, "n_layers": 1, "validation_size": 8, **loss})
    how = {"steps": 6, "batch_size": 4, "candidates": 6, "candidates_at_once": at_once, "checkpoints": 2, "evaluations": 2}
    unbroken, run = train(tmp_path / "unbroken", kind, task, **how), train(tmp_path / "stopped", kind, task, **how, time_limit=1e-9)
    assert run.status == "stopped"
    run = fit(*resumed(run, time_limit=None), resume=run, progress=False)
    assert_same(run, unbroken)
    before, after = task.criterion().state_dict(), trained(run).criterion.state_dict()
    assert before and all(after[name].shape == () and after[name] != value for name, value in before.items())


def test_vectorized_losses_with_learnt_parameters_equal_those_of_the_loop():
    task = build(Forecast, {"data": "normal_short", "input_length": 20, "horizon": 6, "d_model": 8, "n_layers": 1, "dropout": 0., "loss": "sgt", "learn_loss": True})
    candidates, batch = Candidates(task, task.model()), task.batch(4, np.random.default_rng(0))
    values = candidates.read() + .1 * torch.randn(4, len(candidates.read()), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(candidates.losses(values, batch, 4), candidates.losses(values, batch), rtol=1e-5, atol=1e-6)


def test_state_holds_tensors_and_plain_values_only(tmp_path):
    states = {kind: read_state(train(tmp_path, kind, steps=3).path)["optimizer"] for kind in KINDS}  # read_state unpickles nothing else
    assert sorted(states["es"]) == ["center", "m", "t", "v"] and states["es"]["t"] == 3
    assert states["ga"]["population"].shape == (16, 49)


def test_state_of_another_population_is_refused():
    small, large = (GeneticAlgorithm(torch.zeros(3), Trainer(optimizer="ga", candidates=n)) for n in (10, 12))
    with pytest.raises(ValueError, match="population"): small.load_state_dict(large.state_dict())


@pytest.mark.parametrize("task", [Halves(), Halves(dropout=.5), Halves(left_out=.5), Translate()], ids=["linear", "dropout", "random loss", "transformer"])
def test_vectorized_losses_equal_those_of_the_loop(task):
    torch.manual_seed(0)
    model, batch = task.model(), task.batch(6, np.random.default_rng(0))
    candidates = Candidates(task, model)
    values = candidates.read() + .3 * torch.randn(7, len(candidates.read()))
    loop, together = (candidates.losses(values, batch, at_once, seed=5) for at_once in (1, 3))
    torch.testing.assert_close(together, loop, rtol=1e-5, atol=1e-6)
    for row, loss in zip(values, loop):
        nn.utils.vector_to_parameters(row, model.parameters())
        torch.manual_seed(5)
        torch.testing.assert_close(task.loss(model, batch).detach(), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 3])
def test_candidates_of_a_generation_have_the_same_dropout(at_once):
    torch.manual_seed(0)
    task = Translate(.3)
    model, batch = task.model(), task.batch(6, np.random.default_rng(0))
    candidates = Candidates(task, model)
    losses = [candidates.losses(candidates.read().repeat(6, 1), batch, at_once, seed) for seed in (1, 2)]
    assert all(torch.allclose(found, found[0], rtol=1e-5) for found in losses) and not torch.isclose(losses[0][0], losses[1][0], rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=.3, batch_first=True), lambda: nn.LSTM(8, 8, 2, dropout=.3), lambda: nn.Sequential(nn.Dropout1d(.3), nn.AlphaDropout(.3), nn.Linear(8, 8))],
                         ids=["transformer", "lstm", "other layers"])
def test_dropout_is_switched_off(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(6, 4, 8)
    def values(): return {nn.Transformer: lambda: model(x, x), nn.LSTM: lambda: model(x)[0], nn.Sequential: lambda: model(x)}[type(model)]()
    assert not torch.equal(values(), values())
    Evolution(Translate(), model, Trainer(optimizer="es"))
    found = values()
    assert torch.equal(found, values())
    model.eval()
    torch.testing.assert_close(found, values())


def test_judging_leaves_model_buffers_and_random_state_as_they_were():
    class Normed(Halves):
        def model(self, data=None): return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout())
    task = Normed()
    model, batch = task.model(), task.batch(8, np.random.default_rng(0))
    candidates = Candidates(task, model)
    values = torch.randn(4, len(candidates.read()))
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    candidates.losses(values, batch)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and torch.equal(torch.get_rng_state(), state)
    assert fastest(candidates, batch, 8) == 1  # vmap refuses to write running means
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and torch.equal(torch.get_rng_state(), state)


def test_frozen_weights_stay(tmp_path):
    class Frozen(Halves):
        def model(self, data=None):
            model = Halves.model(self)
            model[1].requires_grad_(False)
            return model
    run = train(tmp_path, "es", Frozen(), steps=3)
    first, last = run.checkpoints[0], run.checkpoints[3]
    assert torch.equal(first["1.weight"], last["1.weight"]) and not torch.equal(first["2.weight"], last["2.weight"])


def test_candidate_whose_loss_is_no_number_counts_as_the_worst():
    class Log(Halves):
        def loss(self, model, batch): return model[2].bias.sum().log()
    task = Log()
    candidates = Candidates(task, task.model())
    values = torch.stack([candidates.read(), -candidates.read()])
    assert torch.isinf(candidates.losses(values, ())).sum() == 1
    torch.manual_seed(0)
    algorithm = GeneticAlgorithm(torch.ones(2), Trainer(optimizer="ga", candidates=8, ga_mutation=1.))
    assert torch.isfinite(algorithm.step(lambda values: values[:, 0].log().nan_to_num(nan=torch.inf))).all()


def test_choice_is_measured_once_recorded_and_kept_by_the_resumed_run(tmp_path, monkeypatch):
    measured = []
    def slow_loop(candidates, values, batch, at_once):
        measured.append(at_once)
        return {1: 1., 8: .1, 64: .09}[at_once]
    monkeypatch.setattr(evolution, "_seconds", slow_loop)
    monkeypatch.setattr(evolution, "_FASTEST", {})
    runs = [train(tmp_path, "es", Halves(), steps=20, candidates=64, candidates_at_once=None, time_limit=1e-9, name=name) for name in "ab"]
    assert measured == [1, 8, 64] and [run.config["candidates_at_once"] for run in runs] == [8, 8]
    monkeypatch.setattr(evolution, "_FASTEST", {})
    monkeypatch.setattr(evolution, "_seconds", lambda *_: pytest.fail("a resumed run has nothing to measure"))
    used, losses = set(), Candidates.losses
    monkeypatch.setattr(Candidates, "losses", lambda self, values, batch, at_once=1, seed=0: used.add(at_once) or losses(self, values, batch, at_once, seed))
    fit(*resumed(runs[0], Halves, time_limit=None), resume=runs[0], progress=False)
    assert used == {8}


WRONG = {"es_sigma is for optimizer = 'es', not for adam": {"es_sigma": .1}, "ga_eta is for optimizer = 'ga', not for es": {"optimizer": "es", "ga_eta": 3.},
         "candidates is for optimizer = 'es' and optimizer = 'ga', not for sgd": {"optimizer": "sgd", "candidates": 8},
         "lr is for optimizers that follow a gradient and optimizer = 'es', not for ga": {"optimizer": "ga", "lr": .1},
         "candidates = 7: it should be a multiple of 2": {"optimizer": "es", "candidates": 7}, "candidates = 2: it should be greater than or equal to 4": {"optimizer": "ga", "candidates": 2},
         "es_sigma = 0: it should be greater than 0": {"optimizer": "es", "es_sigma": 0},
         "did you mean 'es'": {"optimizer": "ess"}, "there is no parameter 'es_sigm'; did you mean 'es_sigma'": {"es_sigm": 1}}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_parameter_is_refused_before_anything_is_written(said, tmp_path):
    with pytest.raises(ParameterError, match=said): fit(Halves(), runs_dir=tmp_path, progress=False, **WRONG[said])
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_vectorized_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ParameterError, match="candidates_at_once = 16: vmap cannot evaluate this model, and 1 can"):
        train(tmp_path, task=Recall(vocab_size=12, d_model=24, length=10))
    assert list(tmp_path.iterdir()) == []


def test_missing_evotorch_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(evolution, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'optimizer = \'es\' needs the package evotorch: pip install "tformer_lab\[evolution\]"'): train(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_those_of_the_optimizer_and_not_of_a_task_that_is_made_for_another():
    es, ga, usual = (trainer_for(Recall(), **given) for given in ({"optimizer": "es"}, {"optimizer": "ga"}, {}))
    assert (es.lr, es.candidates, es.es_sigma, es.steps) == (.05, 256, .15, 2000)
    assert (ga.lr, ga.candidates, ga.ga_tournament, ga.es_sigma) == (None, 300, 3, None)
    assert (usual.lr, usual.candidates, Trainer().lr, trainer_for(Recall(), optimizer="adam").lr) == (.5, None, .001, .5)


def test_evotorch_is_imported_only_when_it_is_used():
    code = "import sys, tempfile, tformer_lab.training.fit as f; from tformer_lab.tasks.recall import Recall; " \
           "f.fit(Recall(length=8), runs_dir=tempfile.mkdtemp(), steps=1, batch_size=2, progress=False); print('evotorch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
