"""Models to and from folders and a hub: what comes back, what is refused, and a hub on this machine that accepts, refuses or is silent."""
import base64
import json
import math
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from tformer_lab.models.language import KINDS, language_model, own_options
from tformer_lab.runs import hub as module
from tformer_lab.runs.hub import HubError, SavedConfig, SavedModel, build_model, evaluate_saved, main, model_card, read_config
from tformer_lab.storage import FileError
from tformer_lab.tasks.graphical import Graphical
from tformer_lab.tasks.language import Language
from tformer_lab.tasks.next_token import OPTIONS
from tformer_lab.tasks.recall import Recall
from tformer_lab.tasks.task import Optimum, task_class
from tformer_lab.training.fit import fit, trained
from tformer_lab.training.parameters import ParameterError, field_names

pytestmark = pytest.mark.timeout(120)
METRICS = "valid/loss", "valid/perplexity", "valid/bits_per_byte"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus and the data made of it."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFORMER_DATA", str(folder / "data"))
        (folder / "corpus").mkdir()
        for i in range(40): (folder / f"corpus/{i}.txt").write_text(f"text {i} λόγος " * 10, encoding="utf-8")
        yield folder


@pytest.fixture(scope="module")
def run(place):
    task = Language(corpus=str(place / "corpus"), unit="characters", model="mingru", d_model=8, n_layers=1, length=16, test_size=8, tied=True)
    return fit(task, runs_dir=place / "runs", steps=5, batch_size=4, warmup=0, checkpoints=1, progress=False)


@pytest.fixture
def saved(run, tmp_path):
    """A folder with its model."""
    SavedModel.from_run(run).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(folder, **values): (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **values}))


# A folder

def test_what_is_loaded_is_what_was_saved(run, saved):
    before, after = SavedModel.from_run(run), SavedModel.from_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert after.config == before.config and same(after.model.state_dict(), before.model.state_dict()) and not after.model.training
    tokens = after.vocabulary.encode("text λόγος")[None]
    assert torch.equal(after.model(tokens), before.model(tokens)) and after.vocabulary.decode(tokens[0]) == "text λόγος"
    assert same(load_file(saved / "model.safetensors"), {name: t for name, t in run.checkpoints[5].items()})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_built_again_with_its_options(kind):
    options = {"feedforward": 24, "tied": True} | ({"n_heads": 2} if "n_heads" in own_options(kind) else {})
    config = SavedConfig(kind=kind, vocab_size=11, d_model=16, n_layers=2, options=options)
    model, tokens = language_model(kind, 11, 16, 2, **options).eval(), torch.arange(10)[None]
    assert not any(t.is_meta for t in (*build_model(config, model.state_dict()).buffers(), *build_model(config, model.state_dict()).parameters()))
    again = build_model(read_config(config.model_dump_json()), model.state_dict())
    assert torch.equal(again(tokens), model(tokens)) and all(p.requires_grad for p in again.parameters())


def test_config_says_what_a_run_says(run, saved, place):
    config = SavedModel.from_pretrained(saved).config
    last = run.metrics.iloc[-1]
    assert config.metrics == {name: last[name] for name in ("train/loss", *METRICS)} and (config.kind, config.step, config.options) == ("mingru", 5, {"tied": True})
    assert config.parameters["corpus"] == "corpus" and str(place) not in "".join(path.read_text(encoding="utf-8") for path in (saved / "config.json", saved / "README.md"))
    assert config.trainer["steps"] == 5 and {(r.metric, r.name) for r in config.references} >= {("valid/bits_per_byte", "xz"), ("train/loss", "trigram entropy")}


def test_card_has_each_number_beside_its_references(run, saved):
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "tformer_lab" and {"mingru", "language"} <= set(card.data.tags)
    value, xz = run.metrics["valid/bits_per_byte"].iloc[-1], next(r["value"] for r in run.references if r["name"] == "xz" and r["metric"] == "valid/bits_per_byte")
    [row] = [line for line in card.text.splitlines() if line.startswith("| valid/bits_per_byte")]
    assert f"{value:.4f}" in row and f"xz {xz:.4g}" in row and "from_pretrained" in card.text
    assert "optimum 1.25 (bound)" in model_card(SavedConfig(kind="mingru", vocab_size=2, d_model=8, n_layers=1, metrics={"a": 1.5}, optimum=[Optimum("a", 1.25, "bound")])).text


def test_the_code_on_the_card_runs(saved, monkeypatch):
    code = ModelCard.load(saved / "README.md").text.split("```python\n")[1].split("```")[0].replace("owner/name", str(saved)).replace('"def "', '"text "').replace("200", "5")
    said = []
    exec(code, {"print": said.append})  # our own, from the fixture
    assert said[0].startswith("text ") and len(said[0]) == 10


def test_a_card_is_never_that_of_another_model(run, saved):
    (saved / "README.md").write_text("# old numbers")
    SavedModel.from_run(run).save_pretrained(saved)
    assert "old numbers" not in (saved / "README.md").read_text(encoding="utf-8")


def test_a_graphical_run_is_saved_with_its_optimum(tmp_path):
    (tmp_path / "tiny.yaml").write_text("- {name: Z, states: 3, concentration: 0.3, mode: slow}\n- {name: X, states: 4, concentration: 0.3, parents: [Z], observed: true}\n")
    run = fit(Graphical(graph=str(tmp_path / "tiny.yaml"), length=12, test_size=16, d_model=8, n_layers=1), runs_dir=tmp_path / "runs", steps=3, batch_size=4, checkpoints=1, progress=False)
    SavedModel.from_run(run).save_pretrained(tmp_path / "model")
    found = SavedModel.from_pretrained(tmp_path / "model").config
    assert {o.metric: o.value for o in found.optimum} == {o["metric"]: o["value"] for o in run.optimum} and found.alphabet is None
    assert evaluate_saved(tmp_path / "model", graph=str(tmp_path / "tiny.yaml"))["valid/excess"] == pytest.approx(run.metrics["valid/excess"].iloc[-1])


def test_only_language_models_are_saved(tmp_path):
    run = fit(Recall(length=8, vocab_size=10, n_outputs=2, d_model=24), runs_dir=tmp_path, steps=2, batch_size=4, checkpoints=1, progress=False)
    with pytest.raises(HubError, match="OneLayer: only language models"): SavedModel.from_run(run)


# What comes from others

WRONG = [({"kind": "os.system"}, "kind is 'os.system'"), ({"kind": 3}, "kind"), ({"d_model": 2**40}, "d_model"), ({"n_layers": 10**6}, "n_layers"), ({"d_model": "8"}, "d_model"), ({"format": 2}, "format"), ({"options": {"n_heads": 4}}, "takes no 'n_heads'"),
         ({"options": {"tied": "yes"}}, "options.tied"), ({"options": {"feedforward": -1}}, "feedforward"), ({"alphabet": "\0ab"}, "the alphabet has 3 characters"), ({"alphabet": "ab"}, "an alphabet should"), ({"auto_map": {"a": "b"}}, "auto_map"), ({"optimum": [{"metric": "a"}]}, "optimum"),
         ({"metrics": {"a": "__import__('os')"}}, "metrics")]


@pytest.mark.parametrize("wrong, said", WRONG, ids=[str(w) for w, _ in WRONG])
def test_a_wrong_configuration_is_refused(wrong, said, saved):
    change(saved, **wrong)
    with pytest.raises(HubError, match="config.json describes no model of this library") as caught: SavedModel.from_pretrained(saved)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "{}", '{"kind": NaN}', "\xff"])
def test_what_is_no_configuration_is_refused(text, saved):
    (saved / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(HubError, match="describes no model of this library"): SavedModel.from_pretrained(saved)


def test_a_huge_model_without_its_weights_takes_no_memory(saved):
    change(saved, d_model=2**20, vocab_size=2**24, alphabet=None)
    with pytest.raises(HubError, match="does not fit its configuration"): SavedModel.from_pretrained(saved)


@pytest.mark.parametrize("harm, said", [(lambda w: w.pop("norm.weight"), "norm.weight is missing"), (lambda w: w.update(extra=torch.zeros(2)), r"extra is \[2\] of real numbers, and it should be missing"), (lambda w: w.update({"norm.weight": torch.ones(9)}), r"norm.weight is \[9\]"),
                                        (lambda w: w.update({"norm.weight": torch.ones(8, dtype=torch.int64)}), r"norm.weight is \[8\] torch.int64, and it should be \[8\] of real numbers")])
def test_weights_that_do_not_fit_are_named(harm, said, saved):
    weights = load_file(saved / "model.safetensors")
    harm(weights)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(HubError, match=said): SavedModel.from_pretrained(saved)


def test_a_pickle_is_never_looked_for(saved, tmp_path):
    torch.save({"weights": torch.zeros(1)}, saved / "pytorch_model.bin")
    (saved / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(HubError, match="has no model.safetensors"): SavedModel.from_pretrained(saved)
    torch.save({"weights": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(FileError, match="no readable safetensors"): SavedModel.from_pretrained(saved)


@pytest.mark.parametrize("name", ["nowhere/at/all", "../model", "a b"])
def test_what_is_neither_folder_nor_name_is_refused(name):
    with pytest.raises(HubError, match="neither a folder here nor a name on the hub"): SavedModel.from_pretrained(name)


# Evaluation

def test_evaluation_of_what_was_loaded_is_that_of_the_run(run, saved, place):
    recorded = {name: run.metrics[name].iloc[-1] for name in METRICS}
    assert evaluate_saved(run) == evaluate_saved(str(run.path)) == evaluate_saved(saved, corpus=str(place / "corpus")) == pytest.approx(recorded, rel=1e-6)
    assert recorded["valid/perplexity"] == pytest.approx(math.exp(recorded["valid/loss"])) and evaluate_saved(run, test_size=4) != recorded


def test_weights_in_the_file_are_those_that_are_evaluated(saved, place):
    before = evaluate_saved(saved, corpus=str(place / "corpus"))
    save_file({name: t * 2 for name, t in load_file(saved / "model.safetensors").items()}, saved / "model.safetensors")
    assert evaluate_saved(saved, corpus=str(place / "corpus")) != before


def test_no_path_of_a_configuration_is_followed(saved, place):
    change(saved, parameters={**json.loads((saved / "config.json").read_text())["parameters"], "corpus": str(place / "corpus")})
    with pytest.raises(ParameterError, match="give corpus for the same here"): evaluate_saved(saved)


def test_a_task_of_a_configuration_is_one_of_ours(saved):
    change(saved, task="os:system")
    with pytest.raises(HubError, match="the task 'os:system'"): evaluate_saved(saved)


def test_another_alphabet_is_no_text_for_the_model(saved, tmp_path):
    for i in range(30):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / f"other/{i}.txt").write_text(f"ABC {i} " * 9)
    with pytest.raises(HubError, match="other characters"): evaluate_saved(saved, corpus=str(tmp_path / "other"))


@pytest.mark.parametrize("name, value", [("capacity", .5), ("model", "mod"), ("d_model", 32), ("tied", False), ("unit", "bytes"), ("steps", 3), ("lr", 1.), ("seed", 1)])
def test_what_is_no_data_cannot_be_changed(name, value, run, saved, place):
    for source, given in ((run, {}), (saved, {"corpus": str(place / "corpus")})):
        with pytest.raises(ParameterError, match=f"{name} = {value!r}: the model is evaluated as it was trained; .* corpus, .*length, .*may be changed"): evaluate_saved(source, **given, **{name: value})


def test_what_may_be_changed_are_parameters_and_none_of_the_models():
    for name, may in module._DATA.items():
        assert set(may) <= field_names(task_class(name)) and not {"model", "d_model", "n_layers", "vocab_size", "unit", *OPTIONS} & set(may)


def other_text(place, name):
    """With the same characters in the same order: only numbers change their places"""
    (place / name).mkdir()
    for i in range(40): (place / f"{name}/{i}.txt").write_text(f"text {i} λόγος " * 10 + f"λόγος {i} text " * 10, encoding="utf-8")
    return str(place / name)


def test_a_run_is_evaluated_on_another_text_as_its_saved_model_is(run, saved, place):
    corpus = other_text(place, "other")
    found = evaluate_saved(run, corpus=corpus)
    assert found == evaluate_saved(saved, corpus=corpus) == pytest.approx(Language(**{**run.config["parameters"], "corpus": corpus, "corpus_fingerprint": None}).evaluate(trained(run)))
    assert found != evaluate_saved(run) and evaluate_saved(run, valid_fraction=.3) == evaluate_saved(saved, corpus=str(place / "corpus"), valid_fraction=.3) != evaluate_saved(run)
    with pytest.raises(ParameterError, match="another text than it was"): evaluate_saved(run, corpus=corpus, corpus_fingerprint=run.config["parameters"]["corpus_fingerprint"])
    for i in range(40): (place / f"other/{i}.txt").write_text(f"TEXT {i} " * 20)
    with pytest.raises(HubError, match="other characters"): evaluate_saved(run, corpus=corpus)


def test_a_graph_with_other_tokens_is_refused(tmp_path):
    graph = "- {name: Z, states: 3, concentration: 0.3, mode: slow}\n- {name: X, states: 4, concentration: 0.3, parents: [Z], observed: true}\n"
    for name, text in (("mine", graph), ("more", graph.replace("states: 4", "states: 5")), ("slow", graph.replace("0.3, mode", "0.1, mode"))): (tmp_path / f"{name}.yaml").write_text(text)
    run = fit(Graphical(graph=str(tmp_path / "mine.yaml"), length=12, test_size=16, d_model=8, n_layers=1), runs_dir=tmp_path / "runs", steps=3, batch_size=4, checkpoints=1, progress=False)
    with pytest.raises(HubError, match=r"the data have \d different tokens, and the model knows \d"): evaluate_saved(run, graph=str(tmp_path / "more.yaml"))
    assert evaluate_saved(run, graph=str(tmp_path / "slow.yaml")) != evaluate_saved(run) != evaluate_saved(run, concentration=.2)


def test_of_other_tasks_the_size_of_the_test_may_be_changed(tmp_path):
    run = fit(Recall(length=8, vocab_size=10, n_outputs=2, d_model=24), runs_dir=tmp_path, steps=2, batch_size=4, checkpoints=1, progress=False)
    assert evaluate_saved(run, test_size=8) != evaluate_saved(run)
    with pytest.raises(ParameterError, match="of the task recall test_size may be changed"): evaluate_saved(run, noise=.5)


def test_a_model_is_not_saved_onto_a_file(run, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(HubError, match="model is a file: a model is saved as a folder"): SavedModel.from_run(run).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_command_says_the_metrics_or_what_is_wrong(run, saved, place, capsys, monkeypatch):
    assert main([str(saved), "-p", "corpus", str(place / "corpus")]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in said.items()} == pytest.approx({name: run.metrics[name].iloc[-1] for name in METRICS}, rel=1e-4)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for wrong in ([str(saved)], [str(run.path), "-p", "corpus", "hf://a/b"], [str(saved), "-p", "corpsu", "x"], [str(place)], [str(saved), "--best", "-p", "corpus", "x"], [str(run.path), "--best"]):
        assert main(wrong) == 2 and (captured := capsys.readouterr()).err and not captured.out


def test_best_weights_of_a_run_with_patience(place, tmp_path):
    task = Language(corpus=str(place / "corpus"), model="mingru", d_model=8, n_layers=1, length=16, test_size=8)
    run = fit(task, runs_dir=tmp_path, steps=200, batch_size=4, warmup=0, schedule="constant", lr=1., patience=2, evaluations=100, spacing="linear", checkpoints=1, progress=False)
    best = SavedModel.from_run(run, best=True)
    assert evaluate_saved(run, best=True)["valid/loss"] == best.config.metrics["valid/loss"] < SavedModel.from_run(run).config.metrics["valid/loss"]
    assert best.config.metrics["valid/loss"] == pytest.approx(np.nanmin(run.metrics["valid/loss"]))


# A hub

class Hub(ThreadingHTTPServer):
    """As much of the hub as pushing and loading need."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.status, self.silent, self.open, self.models, self.asked, self.commit = f"http://127.0.0.1:{self.server_port}", None, False, threading.Event(), {}, [], "1" * 40


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def answer(self, status, data=b"", **headers):
        if not isinstance(data, bytes): data = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **{name.replace("_", "-"): value for name, value in headers.items()}}.items(): self.send_header(name, value)
        self.end_headers()
        with suppress(BrokenPipeError):  # nobody waits for what a silent hub says in the end
            if self.command != "HEAD": self.wfile.write(data)

    def handle_any(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if hub.silent: hub.open.wait(30)
        if hub.status: return self.answer(hub.status, {"error": "refused"})
        path = self.path.split("?")[0].strip("/").split("/")
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.models.setdefault(name, {})
            return self.answer(200, {"url": f"{hub.url}/{name}"})
        if path == ["api", "validate-yaml"]: return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(path[2:4] if path[0] == "api" else path[:2])
        if name not in hub.models: return self.answer(404, X_Error_Code="RepoNotFound")
        if path[4:5] == ["preupload"]: return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if path[4:5] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file": hub.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{hub.commit}", "commitOid": hub.commit})
        if path[0] == "api": return self.answer(200, {"id": name, "sha": hub.commit, "siblings": []})
        data = hub.models[name].get("/".join(path[4:]))
        if data is None: return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit)
        self.answer(200, data, ETag=f'"{hash(data) % 2**64:x}"', X_Repo_Commit=hub.commit)

    do_GET = do_HEAD = do_POST = handle_any


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, which the library takes for the real one."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.open.set()
    hub.shutdown()
    hub.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(hub, run, tmp_path, monkeypatch):
    saved = SavedModel.from_run(run)
    assert saved.push_to_hub("me/mingru", token="hf_secret") == f"{hub.url}/me/mingru/commit/{hub.commit}"
    assert hub.models["me/mingru"].keys() == {"README.md", "config.json", "model.safetensors"} and {who for _, path, who in hub.asked if "mingru" in path or "create" in path} == {"Bearer hf_secret"}
    loaded = SavedModel.from_pretrained("me/mingru", cache_dir=tmp_path)
    assert loaded.config == saved.config and same(loaded.model.state_dict(), saved.model.state_dict())
    monkeypatch.setattr(module, "TIMEOUT", .2)
    hub.silent = True
    assert SavedModel.from_pretrained("me/mingru", cache_dir=tmp_path).config == saved.config  # as it is kept


@pytest.mark.parametrize("status, said", [(401, r"refuses \(401\).*hf auth login"), (403, r"refuses \(403\).*hf auth login")])
def test_a_hub_that_refuses_is_named_with_what_to_do(hub, run, tmp_path, status, said):
    hub.status = status
    with pytest.raises(HubError, match=f"'me/mingru' cannot be pushed to: {hub.url} {said}.*write"): SavedModel.from_run(run).push_to_hub("me/mingru", token="hf_wrong")
    with pytest.raises(HubError, match=f"'me/mingru' cannot be loaded: {hub.url} {said}.*read"): SavedModel.from_pretrained("me/mingru", cache_dir=tmp_path)


def test_a_model_that_is_not_there_and_one_without_weights(hub, tmp_path):
    with pytest.raises(HubError, match=r"has no such model, or it lacks a file \(404\)"): SavedModel.from_pretrained("me/none", cache_dir=tmp_path)
    hub.models["me/half"] = {"config.json": SavedConfig(kind="mingru", vocab_size=2, d_model=8, n_layers=1).model_dump_json().encode(), "pytorch_model.bin": b"pickle"}
    with pytest.raises(HubError, match=r"it lacks a file \(404\)"): SavedModel.from_pretrained("me/half", cache_dir=tmp_path)
    assert not any("pytorch_model" in path for _, path, _ in hub.asked)


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", .2)
    hub.silent = True
    with pytest.raises(HubError, match="'me/mingru' cannot be pushed to: no answer from [^ ]+ \\(TimeoutError\\)"): SavedModel.from_run(run).push_to_hub("me/mingru", token="hf_x")
    with pytest.raises(HubError, match="'me/mingru' cannot be loaded: no answer from"): SavedModel.from_pretrained("me/mingru", cache_dir=tmp_path)
    assert hub.models == {}


def test_a_configuration_from_the_hub_is_checked_before_weights_are_asked_for(hub, tmp_path):
    hub.models["me/bad"] = {"config.json": b'{"kind": "transformer", "auto_map": "x.py"}', "model.safetensors": b""}
    with pytest.raises(HubError, match="describes no model of this library"): SavedModel.from_pretrained("me/bad", cache_dir=tmp_path)
    assert not any("safetensors" in path for _, path, _ in hub.asked)


def test_the_command_evaluates_a_model_of_the_hub(hub, run, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    SavedModel.from_run(run).push_to_hub("me/mingru", token="hf_x")
    assert main(["me/mingru", "-p", "corpus", str(place / "corpus")]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["valid/loss"]) == pytest.approx(run.metrics["valid/loss"].iloc[-1], rel=1e-4)
    assert main(["me/none"]) == 2 and "has no such model" in capsys.readouterr().err
