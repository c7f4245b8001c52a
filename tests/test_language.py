"""Language models on text: losses against counting by hand, what is held out, what a run keeps, what is refused."""
import math
from dataclasses import fields

import nbformat
import numpy as np
import pytest
import torch
from test_papermill import outputs, papermill
from torch import nn
from torch.nn import functional as F

from tformer_lab.data.text import NGrams, even_starts, read_text, xz_bits
from tformer_lab.models.language import KINDS, own_options
from tformer_lab.models.routed import ROUTED
from tformer_lab.runs.store import Run
from tformer_lab.runs.sweep import sweep
from tformer_lab.tasks.language import Language, context_figure, position_groups, text_metrics
from tformer_lab.tasks.task import Task, task_class
from tformer_lab.training.fit import fit, resumed, trained
from tformer_lab.training.parameters import ParameterError, build, field_names, trainer_for


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFORMER_DATA", str(tmp_path / "data"))


@pytest.fixture
def corpus(tmp_path):
    """60 texts in which words follow one another with regularity, some of them Greek."""
    rng, words = np.random.default_rng(0), np.array(["one ", "two ", "three ", "λόγος "])
    (tmp_path / "corpus").mkdir()
    for i in range(60): (tmp_path / f"corpus/{i}.txt").write_text("".join(words[(np.arange(30) + i + (rng.random(30) < .1).cumsum()) % 4]), encoding="utf-8")
    return str(tmp_path / "corpus")


def small(corpus, **other): return Language(**{"corpus": corpus, "length": 24, "test_size": 16, "d_model": 16, "n_layers": 1, **other})


class Bigrams(nn.Module):
    """Predicts by a table of logits."""
    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens): return self.table[tokens]


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_metrics_are_sums_over_the_windows_in_nats_and_bits(corpus, unit):
    task = small(corpus, unit=unit)
    table = torch.randn(2 * [task.text.vocabulary.size], generator=torch.Generator().manual_seed(0))
    starts = even_starts(len(task.text.valid), 16, 24)
    nats, size = 0., 0
    for start in starts:
        window = task.text.valid[start:start + 24].tolist()
        nats -= sum(table[a].log_softmax(0)[b].item() for a, b in zip(window, window[1:]))
        size += len(task.text.vocabulary.decode(window[1:]).encode()) if unit == "characters" else 23
    found = task.evaluate(Bigrams(table))
    assert found == pytest.approx({"valid/loss": nats / 16 / 23, "valid/perplexity": math.exp(nats / 16 / 23), "valid/bits_per_byte": nats / math.log(2) / size}, rel=1e-5)
    assert task.loss(Bigrams(table), (batch := task.batch(5, np.random.default_rng(0)))).item() == pytest.approx(F.cross_entropy(table[batch.tokens[:, :-1]].flatten(0, 1), batch.tokens[:, 1:].flatten()).item(), rel=1e-5)


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_loss_by_position_adds_up_to_bits_per_byte(corpus, unit):
    task = small(corpus, unit=unit)
    model, sizes = task.model(), task.text.vocabulary.token_bytes[task.test[:, 1:].numpy()].sum(0)
    assert (task.by_position(model) * sizes).sum() / sizes.sum() == pytest.approx(task.evaluate(model)["valid/bits_per_byte"])
    groups = position_groups(23)
    figure = context_figure({"model": task.by_position(model)}, {"xz": 2.})
    assert np.concatenate(groups).tolist() == list(range(1, 24)) and len(figure.data[0].x) == len(groups) and list(figure.data[1].y) == [2., 2.]


def test_batches_are_windows_of_training_documents_fresh_and_by_seed(corpus):
    task = small(corpus)
    one, same, two = (task.batch(200, np.random.default_rng(seed)).tokens for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, two) and len(one.unique(dim=0)) > 60
    text, held_out = task.text.train.tobytes(), task.text.valid.tobytes()
    assert all(bytes(row.tolist()) in text for row in one) and all(bytes(row.tolist()) in held_out for row in task.test)
    assert torch.equal(task.test, small(corpus, model="hawk").test) and (bytes(task.test[0].tolist()), bytes(task.test[-1].tolist())) == (held_out[:24], held_out[-24:])


def test_the_first_and_the_last_window_can_be_drawn(tmp_path):
    (tmp_path / "one.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    task = small(str(tmp_path / "one.txt"), valid_fraction=.5, length=13)
    assert len(task.text.train) == 14 and task.batch(50, np.random.default_rng(0)).tokens[:, 0].unique().tolist() == [ord("a"), ord("b")]


def test_references_are_of_the_same_windows_and_the_held_out_text(corpus):
    task = small(corpus)
    values, text = {(r.metric, r.name): r.value for r in task.references()}, read_text(corpus)
    grams = NGrams(text.train, 256)
    for name, entropy, losses in zip(("unigram", "bigram", "trigram"), grams.entropies(), grams.losses(task.test)):
        assert values["train/loss", f"{name} entropy"] == entropy
        assert values["valid/loss", f"{name} entropy"] == pytest.approx(losses.mean()) and values["valid/bits_per_byte", f"{name} entropy"] == pytest.approx(losses.mean() / math.log(2))
    assert values["valid/bits_per_byte", "xz"] == xz_bits(text) and task.optimum() == []


def test_references_in_characters_count_bytes(corpus):
    values = {(r.metric, r.name): r.value for r in small(corpus, unit="characters").references()}
    text = read_text(corpus, "characters")
    per_token = len(text.vocabulary.decode(text.valid).encode()) / len(text.valid)
    assert per_token > 1.1 and values["valid/loss", "xz"] == pytest.approx(values["valid/bits_per_byte", "xz"] * math.log(2) * per_token)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_to_beat_counting_words_and_is_read_back(kind, corpus, tmp_path):
    task = small(corpus, model=kind, n_layers=2 if kind in ROUTED else 1)
    run = fit(task, runs_dir=tmp_path / "runs", steps=120, batch_size=16, lr=1e-2, warmup=10, checkpoints=1, evaluations=2, progress=False)
    values = {(r["metric"], r["name"]): r["value"] for r in run.references}
    assert run.optimum == [] and run.metrics["valid/bits_per_byte"].iloc[-1] < values["valid/bits_per_byte", "bigram entropy"]
    found = task.evaluate(trained(run))
    assert found == {name: run.metrics[name].iloc[-1] for name in found} and found.keys() >= {"valid/loss", "valid/perplexity", "valid/bits_per_byte"}
    assert "tokens_per_second" in run.status_details["speed"]


def test_task_follows_the_protocol(corpus):
    task = small(corpus, unit="characters")
    assert isinstance(task, Task) and task_class("language") is Language and task.label == "transformer-corpus-characters" and task.tokens_per_example == 23
    assert trainer_for(task).schedule == "cosine" and trainer_for(task, optimizer="es").clip is None


def test_every_option_of_every_kind_is_a_parameter():
    assert {name for kind in KINDS for name in own_options(kind)} <= field_names(Language)
    assert {f.name for f in fields(Language)} - field_names(Language) == {"architecture"}


def test_a_routed_model_learns_from_its_routers_losses_and_reports_its_own_alone(corpus):
    """And without gradients it would learn nothing of them."""
    task = small(corpus, model="mod", n_layers=2, capacity=.5)
    torch.manual_seed(0)
    model, batch = task.model(), task.batch(4, np.random.default_rng(0))
    loss = task.loss(model.train(), batch)
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(model(batch.tokens[:, :-1]).flatten(0, 1), batch.tokens[:, 1:].flatten()).item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ParameterError, match="losses of their own"): fit(task, optimizer="es", steps=2, progress=False)


def test_default_model_has_a_million_weights():
    with torch.device("meta"): count = sum(p.numel() for p in Language(corpus_bytes=300_000, valid_fraction=.5).model().parameters())
    assert 1.0e6 < count < 1.1e6


def test_a_run_is_not_gone_on_with_on_another_text(corpus, tmp_path):
    run = fit(small(corpus), runs_dir=tmp_path / "runs", steps=3, warmup=0, batch_size=2, checkpoints=1, progress=False)
    assert resumed(run)[0] == small(corpus)
    (tmp_path / "corpus/0.txt").write_text("something else")
    with pytest.raises(ParameterError, match="another text than it was"): resumed(run)


def test_a_path_is_from_the_top_of_the_project(corpus, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert small("corpus").text.fingerprint == small(corpus).text.fingerprint


WRONG = [({"corpus": "nowhere"}, "no file or folder"), ({"corpus": "hf://one"}, "is no data set"), ({"corpus": ""}, "corpus = ''"), ({"model": "mambo"}, "did you mean 'mamba'"), ({"n_heads": 2, "model": "mingru"}, "n_heads is 2: the model 'mingru' has no such parameter"), ({"d_state": 4}, "d_state is 4: the model 'transformer' has no such parameter"),
         ({"d_model": 30}, "multiple of n_heads"), ({"length": 1}, "length = 1"), ({"length": 5000}, "documents for validation have"), ({"unit": "byte"}, "did you mean 'bytes'"), ({"valid_fraction": 1}, "valid_fraction = 1"),
         ({"pattern": "*.tex"}, "no file whose name matches"), ({"corpus_fingerprint": "0" * 16}, "another text than it was"), ({"corpus_fingerprint": "../x"}, "corpus_fingerprint"), ({"test_size": 1}, "test_size = 1")]


@pytest.mark.parametrize("wrong, said", WRONG, ids=[str(w) for w, _ in WRONG])
def test_wrong_parameters_are_named(wrong, said, corpus):
    with pytest.raises(ParameterError, match=said): build(Language, {"corpus": corpus, **wrong})


def test_text_metrics_of_a_hopeless_model_are_finite():
    assert text_metrics(torch.full((2, 2), 1e4), torch.ones(2, 2))["valid/perplexity"] == math.exp(700)


def test_a_sweep_trains_several_seeds_in_one_command(corpus, tmp_path):
    done = sweep(None, {"task": "language", "corpus": corpus, "length": 24, "test_size": 16, "d_model": 16, "n_layers": 1, "steps": 3, "warmup": 0, "batch_size": 2, "checkpoints": 1}, seeds=[0, 1, 2], runs_dir=tmp_path / "runs", in_process=True, progress=False)
    losses = [Run(path).metrics["valid/loss"].iloc[-1] for path in sorted((tmp_path / "runs").iterdir()) if (path / "config.yaml").exists()]
    assert len(losses) == len(set(losses)) == 3, done


def test_papermill_trains_and_shows_references_and_context(corpus, tmp_path):
    given = {"task": "language", "corpus": corpus, "model": "mingru", "steps": 20, "warmup": 0, "length": 16, "d_model": 8, "n_layers": 1, "test_size": 8, "batch_size": 4, "evaluations": 2, "checkpoints": 2, "runs_dir": tmp_path / "runs"}
    code, said = papermill(tmp_path, tmp_path / "out.ipynb", given)
    assert code == 0 and "unknown parameter" not in said.lower(), said
    [path] = (tmp_path / "runs").iterdir()
    assert Run(path).status == "done" and path.name.startswith("language-mingru-corpus-")
    training, context = outputs(nbformat.read(tmp_path / "out.ipynb", 4), "application/vnd.plotly.v1+json")[:2]
    assert {"valid/perplexity", "valid/bits_per_byte"} <= {trace["name"] for trace in training["data"]}
    assert [trace["name"] for trace in context["data"]] == ["mingru", "unigram entropy", "bigram entropy", "trigram entropy", "xz"]
