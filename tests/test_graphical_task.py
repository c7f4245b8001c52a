"""Language models on sequences from a graph: losses against the exact likelihood, what the trainer does for them against torch by hand, probes against the filter."""
import math
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from test_papermill import outputs, papermill
from torch import nn
from torch.nn import functional as F

from tformer_lab.data.graphical import StoredSequences, draw_kernels, generate, generate_states, sequence_block
from tformer_lab.data.graphs import read_graph
from tformer_lab.models.language import KINDS
from tformer_lab.models.routed import ROUTED
from tformer_lab.runs.results import results
from tformer_lab.runs.store import Run
from tformer_lab.storage import FileError
from tformer_lab.tasks import graphical
from tformer_lab.tasks.forecast import Forecast
from tformer_lab.tasks.graphical import Graphical, Tokens
from tformer_lab.tasks.probes import fit_probe, probe_states, probe_table
from tformer_lab.tasks.recall import Recall
from tformer_lab.tasks.task import Task, task_class
from tformer_lab.tasks.teacher_student import TeacherStudent
from tformer_lab.theory.graph_bounds import particle_bounds
from tformer_lab.theory.graph_entropy import entropy_rate
from tformer_lab.theory.graphical import exact_work, filtered_states, log_likelihood, predict
from tformer_lab.training.fit import Session, fit, resumed, trained
from tformer_lab.training.optimizers import make_scheduler
from tformer_lab.training.parameters import ParameterError, Trainer, build, trainer_for

GRAPHS = Path(__file__).parents[1] / "nbs/papers/graphs"
TINY = "- {name: Z, states: 3, concentration: 0.3, mode: slow}\n- {name: X, states: 4, concentration: 0.3, parents: [Z], observed: true}\n"


@pytest.fixture
def tiny(tmp_path):
    """A file of two nodes."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return str(tmp_path / "tiny.yaml")


def small(graph, **other): return Graphical(**{"graph": graph, "length": 12, "test_size": 64, "d_model": 8, "n_layers": 1, **other})


class Exact(nn.Module):
    """Predicts by the likelihood, blurred if asked to."""
    def __init__(self, kernels, blur=0.):
        super().__init__()
        self.kernels, self.blur, self.unused = kernels, blur, nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        p = predict(self.kernels, tokens)
        return ((1 - self.blur) * p + self.blur / p.shape[-1]).log()


# The task

@pytest.mark.parametrize("name", ["chain", "five_nodes", "slow"])
def test_loss_of_the_exact_predictor_is_the_likelihood(name):
    task = Graphical(graph=str(GRAPHS / f"{name}.yaml"), concentration=.5, length=16, test_size=20, kernel_seed=2)
    batch = task.batch(30, np.random.default_rng(0))
    expected = -log_likelihood(draw_kernels(task.nodes, 2), batch.tokens)[:, -1].mean() / 15
    assert task.loss(Exact(task.kernels), batch).item() == pytest.approx(expected.item(), rel=1e-12)
    found, best = task.evaluate(Exact(task.kernels)), {o.metric: o for o in task.optimum()}
    assert found.keys() == best.keys() - {"train/loss", "population/loss"}
    for metric, value in found.items(): assert value == pytest.approx(best[metric].value, rel=1e-10, abs=1e-12)


def test_optima_are_mean_log_probabilities_with_their_errors_by_position(tiny):
    task = small(tiny, length=20, test_size=300)
    x, best = task.test, {o.metric: o for o in task.optimum()}
    surprise = -log_likelihood(task.kernels, x).diff(dim=1).numpy()
    assert task.positions == [1, 4, 16, 19]
    for t in task.positions:
        own = best[f"valid/loss_{t}"]
        assert (own.position, own.kind) == (t, "estimate")
        assert (own.value, own.error) == pytest.approx((surprise[:, t - 1].mean(), surprise[:, t - 1].std(ddof=1) / math.sqrt(300)), rel=1e-12)
    assert (best["valid/loss"].value, best["valid/loss"].error) == pytest.approx((surprise.mean(), surprise.mean(1).std(ddof=1) / math.sqrt(300)), rel=1e-12)
    assert (best["valid/excess"].value, best["valid/excess"].kind) == (0, "exact")
    fresh = entropy_rate(task.kernels, 4000, 20, seed=77)
    for metric in ("train/loss", "population/loss", "valid/loss"): assert abs(best[metric].value - fresh.value) < 4 * math.hypot(best[metric].error, fresh.error)


def test_excess_is_the_expected_loss_above_the_entropy(tiny):
    """Against the difference of loss and likelihood on many sequences, of which it is the mean over the next token."""
    task = small(tiny, test_size=4000)
    found = task.evaluate(Exact(task.kernels, .2))
    x = task.test
    with torch.no_grad(): plain = (F.cross_entropy(Exact(task.kernels, .2)(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(4000, -1) + log_likelihood(task.kernels, x).diff(dim=1)).mean(1)
    assert abs(found["valid/excess"] - plain.mean().item()) < 4 * plain.std().item() / 4000**.5
    found = task.by_position(Exact(task.kernels, .2))
    p, log_q = predict(task.kernels, x[:, :-1]), Exact(task.kernels, .2)(x[:, :-1]).detach().double().log_softmax(-1)
    apart = F.kl_div(log_q, p, reduction="none").sum(-1).numpy()
    np.testing.assert_allclose(found.excess_error, np.sqrt(((apart - apart.mean(0))**2).sum(0) / 3999 / 4000), rtol=1e-4, atol=1e-9)
    assert found.loss - found.entropy == pytest.approx(found.excess) and (found.excess > 0).all() and found.excess_error[0] < 1e-9 < found.excess_error[1:].min()  # before token 1 there is only token 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_beats_the_optimum(kind, tiny, tmp_path):
    """Beyond the error of sampling, after a training that comes near it."""
    task = small(tiny, model=kind, test_size=256, n_layers=2 if kind in ROUTED else 1)
    run = fit(task, runs_dir=tmp_path, steps=150, batch_size=32, lr=1e-2, checkpoints=1, evaluations=3, progress=False)
    best = {o["metric"]: o for o in run.optimum}
    assert run.metrics["valid/excess"].dropna().iloc[[0, -1]].tolist() == sorted(run.metrics["valid/excess"].dropna().iloc[[0, -1]], reverse=True)
    assert 0 < run.metrics["valid/excess"].iloc[-1] < .2 and (run.metrics["valid/excess"].dropna() > 0).all()
    if kind in ROUTED: assert "train/loss" not in best  # in training later tokens have a say in what is computed
    else: assert run.metrics["train/loss"].iloc[-50:].mean() > best["train/loss"]["value"] - 4 * math.hypot(best["train/loss"]["error"], run.metrics["train/loss"].iloc[-50:].std() / 50**.5)
    assert run.metrics["valid/loss"].iloc[-1] > best["valid/loss"]["value"] - 4 * best["valid/loss"]["error"]
    assert task.evaluate(trained(run)) == pytest.approx({name: run.metrics[name].iloc[-1] for name in run.metrics if name.startswith(("valid", "routing"))}, rel=1e-6)


def test_task_follows_the_protocol_and_the_population_is_fresh(tiny):
    task = small(tiny)
    assert isinstance(task, Task) and task_class("graphical") is Graphical and task.label == "transformer-tiny" and task.population_size == 0
    one, two = (task.batch(50, np.random.default_rng(i)).tokens for i in (0, 1))
    assert torch.equal(one, generate(draw_kernels(task.nodes), 50, 12, np.random.default_rng(0))) and not torch.equal(one, two) and (one[:, 0] == 0).all()
    assert not torch.equal(task.test, small(tiny, kernel_seed=1).test) and torch.equal(task.test, small(tiny, model="hawk").test)


def test_a_finite_set_can_be_learnt_by_heart_and_has_no_optimum(tiny, tmp_path):
    run = fit(small(tiny, d_model=32), runs_dir=tmp_path, samples=4, batch_size=4, steps=200, lr=1e-2, checkpoints=1, evaluations=1, progress=False)
    entropy = next(o for o in small(tiny).optimum() if o.metric == "train/loss")
    assert run.metrics["train/loss"].iloc[-1] < entropy.value / 2
    assert "train/loss" not in [o["metric"] for o in run.optimum] and "population/loss" not in run.metrics


def test_without_an_exact_likelihood_there_is_no_optimum(tmp_path):
    (tmp_path / "context.yaml").write_text("- {name: A, states: 3, concentration: 0.3}\n- {name: B, states: 3, concentration: 0.3}\n- {name: X, states: 4, concentration: 0.3, parents: [A, B], mode: context, observed: true}\n")
    task = small(str(tmp_path / "context.yaml"))
    assert task.optimum() == task.references() == [] and task.figure(task.model()) is None
    assert task.evaluate(task.model()).keys() == {"valid/loss", *(f"valid/loss_{t}" for t in (1, 4, 11))}
    with pytest.raises(ValueError, match="cannot be integrated over exactly"): task.by_position(task.model())


OWN_KERNEL = "- {name: Z, states: 2, concentration: 0.5}\n- {name: X, states: 4, concentration: 0.3, parents: [Z], mode: context, observed: true}\n"


@pytest.fixture
def own_kernel(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN_KERNEL)
    return str(tmp_path / "own.yaml")


def test_where_exactness_is_too_much_work_the_optimum_is_of_as_many_sequences_as_are_affordable(own_kernel, monkeypatch):
    task = small(own_kernel, test_size=40)
    monkeypatch.setattr("tformer_lab.tasks.graphical._WORK", 13.5 * exact_work(task.kernels, task.test).mean().item())
    best, surprise = {o.metric: o for o in task.optimum()}, -log_likelihood(task.kernels, task.test[:13]).diff(dim=1).numpy()
    for metric in ("train/loss", "population/loss", "valid/loss"):
        assert best[metric].kind == "estimate" and best[metric].value == pytest.approx(surprise.mean(), rel=1e-12)
        assert best[metric].error == pytest.approx(surprise.mean(1).std(ddof=1) / math.sqrt(13), rel=1e-12)
    assert best["valid/loss_4"].value == pytest.approx(surprise[:, 3].mean(), rel=1e-12)
    found = task.evaluate(Exact(task.kernels))
    assert abs(found["valid/excess"]) < 1e-12 and len(task.by_position(task.model()).entropy) == 11


def test_where_few_sequences_are_affordable_the_optimum_is_a_bound_below_the_entropy_and_near(own_kernel, monkeypatch):
    task = small(own_kernel, test_size=40)
    monkeypatch.setattr("tformer_lab.tasks.graphical._WORK", 7.5 * exact_work(task.kernels, task.test).mean().item())
    for name, value in {"particles": 6, "fewest": 6}.items(): monkeypatch.setitem(graphical._BRACKET, name, value)  # more cannot be told from the exact value
    best, x = task.optimum(), particle_bounds(task.kernels, 64, task.length, 6, task.kernel_seed).tokens
    exact = -log_likelihood(task.kernels, x)[:, -1].mean().item() / (task.length - 1)
    assert [o.metric for o in best] == ["train/loss", "population/loss", "valid/loss"] and {o.kind for o in best} == {"bound"}
    assert len({o.value for o in best}) == 1 and exact - .02 < best[0].value < exact and .01 < best[0].error < .1
    assert best == small(own_kernel, test_size=40).optimum()
    assert task.evaluate(task.model()).keys() == {"valid/loss", *(f"valid/loss_{t}" for t in (1, 4, 11))}
    with pytest.raises(ValueError, match="8 sequences with 12 tokens would take too long, since kernels of X"): task.by_position(task.model())
    monkeypatch.setitem(graphical._BRACKET, "width", -1.)
    assert task.optimum() == []  # lower and upper bound are too far apart


def test_no_pass_over_pasts_is_begun_that_would_not_end_soon(monkeypatch):
    def refuse(*args): raise AssertionError("the exact likelihood is computed")
    for name in ("log_likelihood", "predict"): monkeypatch.setattr(f"tformer_lab.tasks.graphical.{name}", refuse)
    monkeypatch.setitem(graphical._BRACKET, "n", 8)
    for length in (24, 64):
        task = Graphical(graph="nbs/papers/graphs/context.yaml", d_model=8, length=length)
        assert {o.kind for o in task.optimum()} == {"bound"}


def test_counting_is_a_reference_between_the_entropy_and_chance(tiny):
    task = small(tiny)
    values = {(r.metric, r.name): r.value for r in task.references()}
    for metric in ("train/loss", "valid/loss"): assert values[metric, "bigram entropy"] <= values[metric, "unigram entropy"] < math.log(4)


WRONG = [({"graph": "nbs/papers/graphs/chian.yaml"}, "did you mean 'chain.yaml'"), ({"graph": "nbs"}, "it is a folder"), ({"model": "mambo"}, "did you mean 'mamba'"), ({"model": "mamba", "n_heads": 2}, "has no such parameter"),
         ({"d_state": 4}, "has no such parameter"), ({"d_model": 30}, "multiple of n_heads"), ({"length": 1}, "length = 1"), ({"concentration": 0}, "concentration = 0"), ({"kernel_seed": -1}, "kernel_seed = -1"),
         ({"graph_fingerprint": "0" * 16}, "holds another graph"), ({"tied": 3}, "tied = 3"), ({"model": "hawk", "convolution": 1}, "convolution")]


@pytest.mark.parametrize("wrong, said", WRONG, ids=[str(w) for w, _ in WRONG])
def test_wrong_parameters_are_named(wrong, said):
    with pytest.raises(ParameterError, match=said): build(Graphical, wrong)


@pytest.mark.parametrize("text, said", [("- {name: X, states: 4, concentration: 1}\n", "no node is observed"), (TINY.replace("[Z]", "[Y]"), "no parent 'Y'"), ("[", "no YAML"), (TINY.replace("states: 4, ", ""), "states is missing")])
def test_a_wrong_graph_is_refused_before_anything_is_written(text, said, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ParameterError, match=said): build(Graphical, {"graph": str(tmp_path / "wrong.yaml")})


def test_a_path_is_relative_to_the_top_from_every_folder(monkeypatch):
    for folder in (GRAPHS, GRAPHS.parents[2]):
        monkeypatch.chdir(folder)
        assert Graphical(graph="nbs/papers/graphs/slow.yaml").nodes.vocab_size == 16


def test_a_run_is_not_gone_on_with_when_its_graph_has_changed(tiny, tmp_path):
    run = fit(small(tiny), runs_dir=tmp_path / "runs", steps=3, batch_size=2, checkpoints=1, progress=False)
    assert resumed(run)[0] == small(tiny)
    Path(tiny).write_text(TINY.replace("states: 3", "states: 2"))
    with pytest.raises(ParameterError, match="holds another graph"): resumed(run)


def test_papermill_trains_a_recurrent_model_and_shows_its_losses_by_position(tmp_path):
    given = {"task": "graphical", "graph": "nbs/papers/graphs/chain.yaml", "model": "minlstm", "steps": 50, "length": 16, "d_model": 8, "n_layers": 1, "test_size": 32, "batch_size": 8, "evaluations": 3, "checkpoints": 2,
             "accumulate": 2, "clip": 1, "warmup": 5, "schedule": "cosine", "runs_dir": tmp_path / "runs"}
    code, said = papermill(tmp_path, tmp_path / "out.ipynb", given)
    assert code == 0 and "unknown parameter" not in said.lower(), said
    [path] = (tmp_path / "runs").iterdir()
    run = Run(path)
    assert run.status == "done" and run.config["parameters"]["model"] == "minlstm" and run.name.startswith("graphical-minlstm-chain-")
    assert run.config["parameters"]["graph"] == "nbs/papers/graphs/chain.yaml" and run.config["trainer"]["schedule"] == "cosine"
    training, positions = outputs(nbformat.read(tmp_path / "out.ipynb", 4), "application/vnd.plotly.v1+json")[:2]
    assert {"train/loss", "valid/loss", "valid/excess", "valid/loss_1", "valid/loss_15"} <= {trace["name"] for trace in training["data"]}
    assert [trace["name"] for trace in positions["data"]] == ["minlstm", "entropy"]
    own = next(o for o in run.optimum if o["metric"] == "valid/loss_15")
    assert own["position"] == 15 and any(note["text"].startswith("valid/loss_15") and f"optimum {own['value']:.4g} (estimate)" in note["text"] for note in training["layout"]["annotations"])


def test_results_are_told_as_excesses_at_positions_too(tiny, tmp_path):
    run = fit(small(tiny), runs_dir=tmp_path, steps=2, batch_size=2, checkpoints=1, progress=False)
    row, last, best = results(tmp_path).iloc[0], run.metrics.iloc[-1], {o["metric"]: o["value"] for o in run.optimum}
    for metric in ("valid/loss", "valid/loss_4", "valid/loss_11"): assert row[f"{metric} excess"] == pytest.approx(last[metric] - best[metric])


# The trainer

class Linear:
    """A task of plain regression, all of whose steps can be written by hand."""
    name = "linear"
    def model(self, data=None): return nn.Linear(3, 2, bias=False)
    def batch(self, n, rng):
        x = torch.from_numpy(rng.standard_normal((n, 3)))
        return x, x[:, :2] + torch.from_numpy(rng.standard_normal((n, 2)))
    def loss(self, model, batch): return (model(batch[0]) - batch[1]).square().mean()
    def evaluate(self, model): return {}
    def optimum(self): return []


def weights_after(steps=7, **given):
    """Of the trainer, in float64."""
    session = Session(Linear(), Trainer(**{"steps": steps, "batch_size": 10, "optimizer": "sgd", "lr": .1, "precision": "float64", "device": "cpu", **given}))
    start = session.bare.weight.detach().clone()
    losses = []
    for step in range(steps):
        loss = session.loss(step)
        losses.append(loss.item())
        session.update(loss)
    return start, losses, session.bare.weight.detach()


def by_hand(start, steps=7, optimizer=torch.optim.SGD, lr=.1, clip=None, factors=None, batch_size=10):
    """The same with torch alone."""
    weight, rng = nn.Parameter(start.clone()), np.random.default_rng([0, 0])
    made = optimizer([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, factors.__getitem__) if factors else None
    for _ in range(steps):
        x, y = Linear().batch(batch_size, rng)
        made.zero_grad()
        (x @ weight.T - y).square().mean().backward()
        if clip: torch.nn.utils.clip_grad_norm_([weight], clip)
        made.step()
        if scheduler: scheduler.step()
    return weight.detach()


@pytest.mark.parametrize("given, hand", [
    (dict(), dict()),
    (dict(clip=.3), dict(clip=.3)),
    (dict(clip=1e9), dict()),
    (dict(warmup=3), dict(factors=[.25, .5, .75, 1, 1, 1, 1, 1])),
    (dict(schedule="cosine"), dict(factors=[.5 * (1 + math.cos(math.pi * t / 7)) for t in range(8)])),
    (dict(warmup=2, schedule="cosine", clip=.5, optimizer="adam"), dict(optimizer=torch.optim.Adam, clip=.5, factors=[1 / 3, 2 / 3, *(.5 * (1 + math.cos(math.pi * t / 5)) for t in range(6))])),
], ids=str)
def test_clipping_and_schedules_are_torchs(given, hand):
    start, _, found = weights_after(**given)
    assert torch.equal(found, by_hand(start, **hand)) if "factors" not in hand else torch.allclose(found, by_hand(start, **hand), rtol=1e-13, atol=0)
    assert torch.equal(found, by_hand(start)) == (not hand)  # it does something


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_schedule_is_transformers_one_update_ahead(schedule, warmup):
    """There the first update has the rate zero, and the last one not."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    more = () if schedule == "constant" else (31,)
    theirs = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, warmup + 1, *more)
    own = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    ours = make_scheduler(own, 30, warmup, schedule)
    assert (ours is None) == (schedule == "constant" and not warmup)
    for _ in range(30):
        optimizer.step()
        theirs.step()
        assert own.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        own.step()
        if ours: ours.step()


@pytest.mark.parametrize("accumulate", [2, 3, 10])
def test_accumulated_parts_make_the_step_of_the_whole_batch(accumulate):
    start, losses, found = weights_after()
    other_start, other_losses, other = weights_after(accumulate=accumulate)
    assert torch.equal(start, other_start) and other_losses == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(other, found, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, by_hand(start), rtol=1e-12, atol=0)


def test_parts_of_a_batch_need_the_memory_of_a_part():
    """The model never sees more than a part at once; the last batch of an epoch, which is smaller, has as many parts as it can."""
    seen = []
    class Watching(Linear):
        def loss(self, model, batch):
            seen.append(len(batch[0]))
            return super().loss(model, batch)
    session = Session(Watching(), Trainer(steps=4, batch_size=9, samples=11, accumulate=4, optimizer="sgd", precision="float64", device="cpu", population_size=9))
    for step in range(2): session.update(session.loss(step))
    assert seen == [2, 2, 2, 3, 1, 1]


@pytest.mark.parametrize("task", [Recall(length=16), Forecast(data="normal_short", input_length=20, horizon=5, d_model=8, n_heads=2, n_layers=1, dropout=0., validation_size=4)], ids=["recall", "forecast"])
def test_parts_add_up_for_the_other_tasks_too(task):
    losses = []
    for accumulate in (1, 3):
        session = Session(task, trainer_for(task, batch_size=8, accumulate=accumulate, precision="float64", device="cpu"))
        for step in range(3):
            loss = session.loss(step)
            session.update(loss)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def stop_at(task, runs, step, **given):
    """A run that was stopped before a step."""
    class Ending(type(task)):
        def finished(self, model):
            ended.append(0)
            if len(ended) == step: raise KeyboardInterrupt
            return False
    ended = []
    mine = Ending(**{("model" if name == "architecture" else name): value for name, value in vars(task).items() if name in type(task).__pydantic_fields__})
    with pytest.raises(KeyboardInterrupt): fit(mine, runs_dir=runs, save_minutes=1e-9, progress=False, **given)
    [path] = runs.iterdir()
    return Run(path)


@pytest.mark.parametrize("samples", [None, 20])
def test_a_run_with_parts_clipping_and_a_schedule_goes_on_bit_for_bit(tiny, tmp_path, samples):
    how = dict(steps=24, batch_size=8, accumulate=3, clip=.5, warmup=6, schedule="cosine", samples=samples, checkpoints=3, evaluations=4, lr=1e-2)
    task = small(tiny, model="mingru")
    whole = fit(task, runs_dir=tmp_path / "whole", progress=False, **how)
    for step in (4, 15):  # in the warm-up, and after it
        broken = stop_at(task, tmp_path / f"broken{step}", step, **how)
        assert len(broken.metrics) < 24
        kept, trainer = resumed(broken)
        assert (trainer.accumulate, trainer.clip, trainer.warmup, trainer.schedule) == (3, .5, 6, "cosine")
        again = fit(kept, trainer_for(kept, save_minutes=1e-9, **how), resume=broken, progress=False)
        assert again.metrics.equals(whole.metrics)
        for name, weight in whole.checkpoints[24].items(): assert torch.equal(again.checkpoints[24][name], weight)


def test_an_older_state_without_its_scheduler_goes_on_too(tiny, tmp_path):
    """Once the rate followed from the number of the update, and was set before each."""
    how = dict(steps=24, batch_size=8, warmup=6, schedule="cosine", checkpoints=3, evaluations=4, lr=1e-2)
    task = small(tiny, model="mingru")
    whole = fit(task, runs_dir=tmp_path / "whole", progress=False, **how)
    for step in (4, 15):
        broken = stop_at(task, tmp_path / f"broken{step}", step, **how)
        state = torch.load(broken.path / "state.pt", weights_only=True)
        assert state.pop("scheduler")["last_epoch"] == state["step"] > 0
        for group in state["optimizer"]["param_groups"]:
            group["lr"] = 1e-3
            del group["initial_lr"]
        torch.save(state, broken.path / "state.pt")
        assert fit(task, trainer_for(task, save_minutes=1e-9, **how), resume=broken, progress=False).metrics.equals(whole.metrics)


def test_speed_is_told_beside_the_records_and_not_in_them(tiny, tmp_path):
    run = fit(small(tiny), runs_dir=tmp_path, steps=9, batch_size=8, samples=12, checkpoints=1, progress=False)
    speed = run.status_details["speed"]
    assert speed["tokens_per_second"] == pytest.approx(11 * speed["examples_per_second"], rel=2e-3) and speed["examples_per_second"] / speed["updates_per_second"] == pytest.approx(6, rel=2e-3)  # after the first, batches of 4 and 8 in turn
    assert speed["process_memory"] > 1e7 and not [name for name in run.metrics if "second" in name]
    row = results(tmp_path).iloc[0]
    assert (row["tokens_per_second"], row["memory_gb"]) == (speed["tokens_per_second"], speed["process_memory"] / 1e9)
    assert "speed" not in fit(small(tiny), runs_dir=tmp_path, steps=1, batch_size=8, checkpoints=1, progress=False).status_details


def test_speed_is_told_while_the_run_goes_on_and_is_of_the_last_session(tiny, tmp_path):
    class Watching(Graphical):
        def finished(self, model):
            said.append([run.status_details.get("speed", {}).get("updates_per_second") for run in map(Run, (tmp_path / "watched").iterdir())])
            return False
    how, said = dict(steps=9, batch_size=8, checkpoints=1, save_minutes=1e-9, progress=False), []
    fit(Watching(graph=tiny, d_model=8, length=12, test_size=8), runs_dir=tmp_path / "watched", **how)
    assert said[:2] == [[None]] * 2 and None not in [speed for [speed] in said[2:]]
    task, how = small(tiny), dict(steps=9, batch_size=8, checkpoints=1)
    counts = lambda run: round(math.prod(run.status_details["speed"][name] for name in ("seconds", "updates_per_second")))  # without the first
    broken = stop_at(task, tmp_path / "broken", 6, **how)
    assert counts(broken) == 4
    assert counts(fit(task, trainer_for(task, save_minutes=1e-9, **how), resume=broken, progress=False)) == 3


REFUSED = [(dict(optimizer="es", accumulate=2), "accumulate is for optimizers that follow a gradient"), (dict(optimizer="ga", clip=1.), "clip is for"), (dict(optimizer="es", warmup=5), "warmup is for"),
           (dict(optimizer="ga", schedule="constant"), "schedule is for"), (dict(optimizer="normalized_gd", clip=1.), "clip is for"), (dict(warmup=100, steps=100), "less than steps"), (dict(accumulate=9, batch_size=8), "no more parts"),
           (dict(clip=0), "clip = 0"), (dict(schedule="cosin"), "did you mean 'cosine'"), (dict(accumulate=0), "accumulate = 0"), (dict(warmup=True), "warmup = True")]


@pytest.mark.parametrize("wrong, said", REFUSED, ids=[str(w) for w, _ in REFUSED])
def test_the_trainer_refuses_what_makes_no_sense(wrong, said):
    with pytest.raises(ParameterError, match=said): build(Trainer, wrong)


def test_students_take_no_parts(tmp_path):
    with pytest.raises(ParameterError, match="accumulate = 2"): fit(TeacherStudent(d_model=10, students=2), accumulate=2, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# A training set on disk

ON_DISK = dict(steps=24, batch_size=8, checkpoints=3, evaluations=4, lr=1e-2, population_size=16)


class InMemory(Graphical):
    """The sequences of the file in memory, made block by block."""
    def training_set(self, samples, rng, progress=False):
        blocks = [sequence_block(self.kernels, i, self.length, self.stored_seed)[self.nodes.observed.name] for i in range(-(-samples // 4096))]
        return Tokens(torch.cat(blocks)[:samples])


@pytest.mark.parametrize("samples", [20, 8, 5, 4100])
def test_a_training_from_a_file_has_the_curve_of_the_same_sequences_in_memory(tiny, tmp_path, samples):
    """With a smaller last batch, with one batch an epoch, and with more than a block."""
    given = dict(graph=tiny, length=12, test_size=64, d_model=8, n_layers=1, stored=str(tmp_path / "set.npy"), stored_seed=3)
    run, same = (fit(kind(**given), runs_dir=tmp_path / kind.__name__, samples=samples, progress=False, **ON_DISK) for kind in (Graphical, InMemory))
    other = fit(small(tiny), runs_dir=tmp_path / "other", samples=samples, progress=False, **ON_DISK)
    assert run.metrics.equals(same.metrics) and not run.metrics.equals(other.metrics) and "population/loss" in run.metrics
    for name, weight in same.checkpoints[24].items(): assert torch.equal(run.checkpoints[24][name], weight)


def test_no_more_of_a_file_is_read_than_a_batch(tiny, tmp_path, monkeypatch):
    read, plain = [], StoredSequences.__getitem__
    def watched(self, index):
        read.append(len(found := plain(self, index)))
        return found
    monkeypatch.setattr(StoredSequences, "__getitem__", watched)
    session = Session(small(tiny, stored=str(tmp_path / "set.npy")), Trainer(steps=4, batch_size=8, samples=20, device="cpu", population_size=8))
    assert isinstance(session.batches.data.tokens.tokens, np.memmap) and not read
    tokens = [session.batches.batch(step).tokens for step in range(3)]
    assert read == [8, 8, 4] and tokens[0].dtype == torch.int64
    assert sorted(map(tuple, torch.cat(tokens).tolist())) == sorted(map(tuple, session.batches.data.tokens.tokens.tolist()))
    other = Session(session.task, Trainer(steps=4, batch_size=8, samples=20, device="cpu", population_size=8, seed=1))
    assert not torch.equal(other.batches.batch(0).tokens, tokens[0])  # the same file in another order


def test_a_run_from_a_file_goes_on_bit_for_bit_also_where_the_file_is_made_anew(tiny, tmp_path):
    task, how = small(tiny, stored=str(tmp_path / "set.npy")), ON_DISK | {"samples": 20}
    whole = fit(task, runs_dir=tmp_path / "whole", progress=False, **how)
    broken = stop_at(task, tmp_path / "broken", 10, **how)
    for file in tmp_path.glob("set.npy*"): file.unlink()
    again = fit(*resumed(broken), resume=broken, progress=False)
    assert again.config["parameters"]["stored"] == str(tmp_path / "set.npy") and again.metrics.equals(whole.metrics)
    for name, weight in whole.checkpoints[24].items(): assert torch.equal(again.checkpoints[24][name], weight)


WRONG_FILE = [({"kernel_seed": 1}, {}, "the seed of its kernels is 0"), ({"stored_seed": 1}, {}, "its seed is 0"), ({"length": 13}, {}, "its length is 12"), ({}, {"samples": 21}, "its number of sequences is 20"), ({"concentration": .5}, {}, "the graph's fingerprint"),
              ({}, {"samples": None, "population_size": None}, "say how many sequences by samples"), ({"stored": "set.bin"}, {}, "ends on .npy"), ({"stored": None, "stored_seed": 0}, {}, "give stored, too")]


@pytest.mark.parametrize("task, how, said", WRONG_FILE, ids=[said for *_, said in WRONG_FILE])
def test_a_file_of_something_else_is_refused_before_the_runs_folder(tiny, tmp_path, task, how, said):
    given = {"graph": tiny, "length": 12, "test_size": 64, "d_model": 8, "n_layers": 1, "stored": str(tmp_path / "set.npy")}
    build(Graphical, given).training_set(20, None)
    with pytest.raises((FileError, ParameterError), match=said): fit(build(Graphical, given | task), runs_dir=tmp_path / "runs", progress=False, **(ON_DISK | {"samples": 20} | how))
    assert not (tmp_path / "runs").exists()


# Probes

def test_a_probe_is_the_multinomial_regression_of_a_peer():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 3)) * [1, 10, .1], rng.integers(4, size=400)
    x[:, 0] += y
    probe = fit_probe(x, y, 4, ridge=1e-2)
    theirs = linear_model.LogisticRegression(C=1 / (1e-2 * 400), tol=1e-10, max_iter=10_000).fit((x - x.mean(0)) / x.std(0), y)
    np.testing.assert_allclose(probe.log_probabilities(x), theirs.predict_log_proba((x - x.mean(0)) / x.std(0)), atol=1e-3)


class Reads(nn.Module):
    """A model whose one layer holds the filter's log-probabilities, some tokens late if asked to."""
    def __init__(self, kernels, name, late=0):
        super().__init__()
        self.kernels, self.name, self.late, self.vocab_size, self.unused = kernels, name, late, kernels.graph.vocab_size, nn.Parameter(torch.zeros(()))

    def residual_stream(self, tokens):
        known = filtered_states(self.kernels, tokens, [self.name])[self.name].clamp(min=1e-30).log()
        return [known.roll(self.late, 1)]


@pytest.mark.parametrize("name", ["slow", "dead", "Z"])
def test_probes_of_the_filters_log_probabilities_reach_its_accuracy(name):
    kernels = draw_kernels(read_graph(GRAPHS / "slow.yaml"))
    row, late = (probe_states(Reads(kernels, name, late), kernels, 16, 900, [name], [(4, 15)]).iloc[0] for late in (0, 1))
    assert abs(row["below_filter"]) < 3 * row["below_filter_error"] + 2e-3 and row["loss"] == pytest.approx(row["filter_loss"], abs=.01)
    assert late["filter"] == row["filter"] and late["loss"] > row["loss"] + .05  # what is known a token later is another thing


def test_the_filters_accuracy_is_what_counting_finds(tiny):
    """Against the most frequent state given the tokens, among many sequences with the same ones."""
    kernels = draw_kernels(read_graph(tiny))
    states = generate_states(kernels, 60_000, 3, np.random.default_rng(0))
    key = (states["X"] * torch.tensor([0, 4, 1])).sum(1)
    seen = torch.zeros(16, 3).index_put((key, states["Z"][:, 2]), torch.ones(60_000), accumulate=True)
    counted = (seen.max(1).values.sum() / 60_000).item()
    row = probe_states(Reads(kernels, "Z"), kernels, 3, 6000, groups=[(2, 2)]).iloc[0]
    assert abs(row["filter"] - counted) < 4 * (counted * (1 - counted) / 2000)**.5
    assert row["chance"] == 1 / 3 and row["majority"] < row["filter"]


def test_a_probe_of_nothing_says_the_majority_and_none_beats_the_filter(tiny):
    kernels = draw_kernels(read_graph(tiny))
    states = generate_states(kernels, 900, 12, np.random.default_rng(1))
    noise = np.random.default_rng(2).standard_normal((900, 12, 5))
    table = probe_table({"constant": np.ones((900, 12, 1)), "noise": noise, "tokens": np.eye(4)[states["X"]]}, {"Z": states["Z"]}, {"Z": 3}, filtered_states(kernels, states["X"]))
    assert table.groupby("layer").size().tolist() == [2, 2, 2] and list(zip(table["first"], table["last"]))[::3] == [(1, 3), (4, 11)]
    nothing = table[table["layer"] == "constant"]
    assert nothing["accuracy"].tolist() == nothing["majority"].tolist()
    assert (table["below_filter"] > -4 * table["below_filter_error"] - 1e-9).all() and (table["loss"] > table["filter_loss"] - .02).all()
    assert table["below_filter"].tolist() == pytest.approx((table["filter"] - table["accuracy"]).tolist())
    rows = {layer: table[table["layer"] == layer]["accuracy"].to_numpy() for layer in ("tokens", "constant")}
    assert (rows["tokens"] >= rows["constant"] - .02).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_every_model_is_probed(kind, tiny):
    task = small(tiny, model=kind, n_layers=2)
    model = task.model()
    table = probe_states(model, task.kernels, 8, 30)
    assert sorted(set(table["layer"])) == [0, 1, 2] and set(table["node"]) == {"Z"} and table.notna().all().all() and model.training
    assert table.equals(probe_states(model, task.kernels, 8, 30)) and not table.equals(probe_states(model, task.kernels, 8, 30, seed=1))


def test_where_there_is_no_filter_its_columns_are_empty(tmp_path):
    (tmp_path / "context.yaml").write_text("- {name: A, states: 3, concentration: 0.3}\n- {name: B, states: 3, concentration: 0.3}\n- {name: X, states: 4, concentration: 0.3, parents: [A, B], mode: context, observed: true}\n")
    task = small(str(tmp_path / "context.yaml"))
    table = probe_states(task.model(), task.kernels, 6, 30)
    assert table[["filter", "below_filter", "filter_loss"]].isna().all().all() and table[["accuracy", "majority"]].notna().all().all()


@pytest.mark.parametrize("how, said", [(dict(names=["Y"]), "no hidden node"), (dict(groups=[(3, 2)]), "positions 3 to 2"), (dict(n=2), "2 or more"), (dict(ridge=0), "ridge is 0"), (dict(length=0), "length is 0")], ids=str)
def test_wrong_probes_are_refused(how, said, tiny):
    task = small(tiny)
    with pytest.raises(ValueError, match=said): probe_states(task.model(), task.kernels, **{"length": 8, "n": 30, **how})
