"""Recall by language models: an oracle reaches the optimum, roles by hand, every kind of model through a run and a file."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tformer_lab.models.language import KINDS
from tformer_lab.models.routed import ROUTED
from tformer_lab.runs.hub import SavedModel, evaluate_saved
from tformer_lab.tasks.decoder_recall import ROLES, DecoderRecall, token_roles
from tformer_lab.tasks.task import Task, task_class
from tformer_lab.training.fit import fit, resumed, trained
from tformer_lab.training.parameters import ParameterError, build, resolve


def small(**other): return DecoderRecall(**{"length": 16, "d_model": 16, "n_layers": 2, "test_size": 64, **other})


class Oracle(nn.Module):
    """Looks for the last token in the sentence, and says what followed it, with the probability that is right."""
    def __init__(self, task):
        super().__init__()
        self.task, self.unused = task, nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        logits = torch.full((*tokens.shape, self.task.vocab_size), -80.)
        for row, sentence in enumerate(tokens.tolist()):
            followers = [b for a, b in zip(sentence, sentence[1:]) if a == sentence[-1]]
            [output] = [token for token in followers if token != self.task.vocab_size - 1]
            logits[row, -1, output] = math.log(1 - self.task.noise)
            if self.task.noise: logits[row, -1, -1] = math.log(self.task.noise)
        return logits


@pytest.mark.parametrize("noise", [0., .3])
def test_an_oracle_reaches_the_optimum_and_nothing_else_is_as_good(noise):
    task = small(noise=noise)
    best, found = {o.metric: o.value for o in task.optimum()}, task.evaluate(Oracle(task))
    entropy = -.3 * math.log(.3) - .7 * math.log(.7) if noise else 0.
    assert {o.kind for o in task.optimum()} == {"exact"} and best == pytest.approx({"train/loss": entropy, "population/loss": entropy, "valid/loss": entropy, "unseen/loss": entropy, "valid/excess": 0.})
    assert found == pytest.approx({name: best[name] for name in found}, abs=1e-6) and found.keys() == {"valid/loss", "valid/excess", "unseen/loss"}
    batch = task.batch(2000, np.random.default_rng(0))
    assert task.loss(Oracle(task), batch).item() == pytest.approx(entropy, abs=.05)
    torch.manual_seed(0)
    assert task.evaluate(task.model())["valid/excess"] > 1


def test_loss_is_that_of_the_label_after_the_last_token_alone():
    task = small(noise=.5)
    batch, table = task.batch(7, np.random.default_rng(3)), torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    by_hand = F.cross_entropy(table[batch.tokens[:, -1]], batch.labels).item()
    model = nn.Embedding.from_pretrained(table)
    assert task.loss(model, batch).item() == pytest.approx(by_hand, rel=1e-5) and task.tokens_per_example == 16


def test_sentences_are_those_of_the_recall_task_and_the_tests_are_fixed():
    task = small(noise=.5, n_outputs=6)
    batch, tests = task.batch(500, np.random.default_rng(0)), task.tests
    assert set(batch.outputs.tolist()) == set(range(5, 11)) == set(tests["valid"].outputs.tolist()) and set(tests["unseen"].outputs.tolist()) <= set(range(11, 59))
    assert (batch.tokens[:, -1] == 0).all() and .4 < (batch.labels == 59).double().mean() < .6
    assert torch.equal(tests["valid"].tokens, small(noise=.5, n_outputs=6, model="hawk").tests["valid"].tokens) and (tests["valid"].tokens == tests["unseen"].tokens).double().mean() < .3


@pytest.mark.parametrize("noise", [0., .5])
def test_roles_by_hand(noise):
    task = small(noise=noise)
    tokens = task.batch(300, np.random.default_rng(0)).tokens
    for sentence, roles in zip(tokens.tolist(), token_roles(tokens, task.n_triggers).tolist()):
        triggers = [i for i, token in enumerate(sentence[:-1]) if token < 5]
        expected = ["trigger" if i in triggers else "after trigger" if i - 1 in triggers else "background" for i in range(15)]
        assert [ROLES[r] for r in roles] == [*expected, "last"] and len(triggers) == (2 if noise else 1)


@pytest.mark.parametrize("kind", ROUTED)
def test_auxiliary_losses_are_in_the_gradient_and_not_in_the_value(kind):
    task = small(model=kind, capacity=.5)
    torch.manual_seed(0)
    model, batch = task.model().train(), task.batch(8, np.random.default_rng(0))
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(F.cross_entropy(model(batch.tokens)[:, -1], batch.labels).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.routers["1"].causal.out.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_and_is_the_same_from_its_file(kind, tmp_path):
    task = small(model=kind, noise=.2, d_model=32, length=12)
    run = fit(task, runs_dir=tmp_path / "runs", steps=60, lr=1e-2, warmup=10, checkpoints=1, evaluations=3, progress=False)
    excess = run.metrics["valid/excess"].dropna()
    assert resumed(run)[0] == task and 0 < excess.iloc[-1] < .75 * excess.iloc[0]
    found = task.evaluate(trained(run))
    assert found == {name: run.metrics[name].iloc[-1] for name in found}
    SavedModel.from_run(run).save_pretrained(tmp_path / "saved")
    assert evaluate_saved(tmp_path / "saved") == found == evaluate_saved(run)
    assert evaluate_saved(tmp_path / "saved", test_size=8) != found
    assert ("routing/chosen_1" in found) == (kind in ROUTED)


def test_task_follows_the_protocol_and_refuses_what_cannot_be():
    task = small(model="mod", noise=.5)
    assert isinstance(task, Task) and task_class("decoder_recall") is DecoderRecall and task.label == "mod-recall-noise0.5" and small().label == "transformer-recall"
    for wrong, said in (({"length": 4, "noise": .5}, "length is 4"), ({"vocab_size": 8}, "vocab_size is 8"), ({"model": "hawk", "capacity": .5}, "capacity is 0.5"), ({"noise": 1.}, "noise")):
        with pytest.raises(ParameterError, match=said): build(DecoderRecall, wrong)


def test_a_parameter_of_other_tasks_is_said_to_be_theirs():
    with pytest.raises(ParameterError, match="the task recall has no parameter 'model': it is one of decoder_recall, "): resolve({"task": "recall", "model": "mod"})
    with pytest.raises(ParameterError, match="there is no parameter 'd_modle'; did you mean 'd_model'"): resolve({"task": "recall", "d_modle": 3})
