"""What a routed model chooses, token by token: arrays against the model run by hand, figures against the weights, the page in a real browser."""
import json
import math
import shutil
import time

import nbformat
import numpy as np
import pytest
import torch
import traitlets
from conftest import Kernel, Lab, files_only
from plotly.colors import unlabel_rgb
from torch.nn import functional as F

from tformer_lab.dashboards.routing import (RECORDS, ROLES, SHOWN, SIGNALS, TokenView, blocks_figure, blocks_metric_figure, blocks_of, capacity_of, color_limits, gates_figure, gates_table, routing_history,
                                            token_marks)
from tformer_lab.data.text import Vocabulary
from tformer_lab.models.language import language_model
from tformer_lab.models.routed import Routed
from tformer_lab.runs.store import Run, RunError
from tformer_lab.storage import read_safetensors
from tformer_lab.tasks.decoder_recall import DecoderRecall
from tformer_lab.tasks.graphical import Graphical
from tformer_lab.tasks.language import Language
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import fit
from tformer_lab.training.parameters import build

pytestmark = pytest.mark.timeout(200)  # a page that hangs has to end, too

SMALL = {"length": 24, "d_model": 16, "n_layers": 4, "test_size": 8}
STEPS = 12
FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))"
# By strip: its block, what its tokens say, which are marked, and the opacity of their backgrounds.
STRIPS = """() => Array.from(document.querySelectorAll('.routing-strip')).map((strip) => { const tokens = Array.from(strip.querySelectorAll('.routing-token'));
  return { block: strip.querySelector('b').innerText, share: strip.querySelector('.routing-share').innerText, text: strip.querySelector('.routing-text').textContent, marks: tokens.map((t) => t.textContent),
           chosen: tokens.map((t) => t.classList.contains('routing-chosen')), colors: tokens.map((t) => getComputedStyle(t).backgroundColor) }; })"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the corpus, its tokens and the runs are."""
    folder = tmp_path_factory.mktemp("routing")
    rng, words = np.random.default_rng(0), np.array(["one ", "two\n", "\tthree ", "λόγος "])
    (folder / "corpus").mkdir()
    for i in range(60): (folder / f"corpus/{i}.txt").write_text("".join(words[(np.arange(30) + i + (rng.random(30) < .1).cumsum()) % 4]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFORMER_DATA", str(folder / "data"))
        yield folder


def train(folder, kind, name, seed=0, steps=STEPS, keep_weights=True, **given):
    task = build(Language, {"corpus": str(folder / "corpus"), "model": kind, **SMALL, **given})
    return fit(task, runs_dir=folder / "runs", name=name, seed=seed, steps=steps, warmup=0, checkpoints=5, evaluations=5, keep_weights=keep_weights, progress=False)


@pytest.fixture(scope="module")
def run(folder): return train(folder, "sdt", "sdt", capacity=.5, beta_warmup=2, beta_to=20.)


@pytest.fixture(scope="module")
def seeds(folder): return [train(folder, "mod", f"mod{seed}", seed, unit="characters") for seed in range(2)]


@pytest.fixture(scope="module")
def history(run): return routing_history(run)


@pytest.fixture(scope="module")
def tokens_read(run): return build(Language, run.config["parameters"]).test[:, :-1]


# What was chosen

def by_hand(run, step, tokens, **options):
    """Log-odds of the causal routers, and what the decision blocks did, in a model that is built and loaded here."""
    weights, _ = read_safetensors(run.path / "checkpoints" / f"{step:08d}.safetensors", "pt")
    model, odds, residuals = language_model("sdt", 256, 16, 4, capacity=.5, beta_warmup=2, beta_to=20.), [], []
    model.load_state_dict(weights)
    for i in ("1", "3"): model.routers[i].causal.register_forward_hook(lambda module, x, out: odds.append(out))
    for i in (0, 2): model.blocks[i].register_forward_hook(lambda module, x, out: residuals.append(out - x[0]))
    with torch.no_grad(): model.eval()(tokens)
    return model, torch.stack(odds), torch.stack(residuals)


def test_signals_are_those_of_the_model_run_by_hand_at_each_checkpoint(run, history, tokens_read):
    assert history.steps.tolist() == list(run.checkpoints) and len(history.steps) >= 4 and history.blocks == (1, 3) and history.run == "sdt"
    np.testing.assert_array_equal(history.tokens, tokens_read[:SHOWN])
    chosen = set()
    for t, step in enumerate(history.steps):
        found, (model, odds, residuals) = {name: values[t] for name, values in history.signals.items()}, by_hand(run, step, tokens_read[:SHOWN])
        np.testing.assert_array_equal(found["chosen"], odds > 0)
        np.testing.assert_allclose(found["probability"], 1 / (1 + np.exp(-odds.numpy())), rtol=1e-5)
        np.testing.assert_allclose(found["static"], (residuals**2).mean(-1), rtol=1e-5)
        beta = .1 + 19.9 * max(0, step - 2) / (STEPS - 2)  # a straight line after the warm-up, by the step that the weights are of
        for b, router in enumerate(model.routers.values()):
            static, change = found["static"][b], found["change"][b]
            trailing = np.cumsum(static, 1) / np.arange(1, static.shape[1] + 1)  # the window is longer than the text
            score = np.logaddexp(0, beta * (static - change + router.log_o_ce.item())) + np.logaddexp(0, beta * (static - router.m_cu.item() * trailing))
            np.testing.assert_allclose(found["gate"][b], -np.expm1(-score), rtol=2e-3, atol=1e-5)
            ranks = (-score).argsort(1, kind="stable").argsort(1, kind="stable")
            assert ((ranks < 11) == found["top"][b]).mean() > .99 and (found["top"][b].sum(-1) == 11).all()  # half of 23; scores within rounding may change places
        chosen.add(found["chosen"].tobytes())
    assert len(chosen) > 2 and 0 < history.signals["chosen"].mean() < 1


def test_shares_of_the_whole_evaluation_are_what_the_run_recorded(run, tokens_read):
    found, metrics = routing_history(run, tokens_read), run.metrics.set_index("step")
    common = [step for step in found.steps if step in metrics["routing/chosen_1"].dropna().index]
    assert len(common) > 2
    for name, values in {"chosen": found.signals["chosen"], "gate": found.signals["gate"], "surprise": found.signals["static"], "accuracy": found.signals["chosen"] == found.signals["top"]}.items():
        for b, block in enumerate(found.blocks): np.testing.assert_allclose([values[found.index(step), b].mean() for step in common], metrics.loc[common, f"routing/{name}_{block}"], rtol=1e-5)


def test_sequences_are_texts_or_tokens_and_do_not_change_one_another(run):
    text = "two\n\tλό one "
    both, alone, tokens = (routing_history(run, sequences) for sequences in ([text, "one two\n three"], text, list(text.encode())))
    assert both.tokens.shape == (2, 14) and alone.tokens.shape == tokens.tokens.shape == (1, 14)
    for name, values in both.signals.items():
        np.testing.assert_allclose(values[:, :, :1], alone.signals[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(alone.signals[name], tokens.signals[name])
    assert "".join(alone.marks[0]) == r"two↵" + "\n→\t" + r"\xce\xbb\xcf\x8c one "


def test_step_between_two_checkpoints_is_the_one_before(history):
    for index, step in enumerate(history.steps): assert history.index(int(step)) == index and history.index(int(step) + 1) == index + (step + 1 in history.steps)
    assert history.index(-1) == 0 and history.index(10**9) == len(history.steps) - 1


def test_marks_are_what_tokens_stand_for():
    rows = torch.tensor([[0, 1, 2, 3, 4]])
    assert token_marks(rows, Vocabulary("\0a\n\tλ")) == [["␀", "a", "↵\n", "→\t", "λ"]]
    assert token_marks(torch.tensor([[65, 32, 13, 127, 128, 255]]), Vocabulary()) == [["A", " ", "␍", r"\x7f", r"\x80", r"\xff"]]
    assert token_marks(rows, None) == [["0", "1", "2", "3", "4"]]


def test_another_kind_and_unit_has_no_surprise(seeds):
    found = routing_history(seeds[0], "λόγος one ")
    assert list(found.signals) == ["chosen", "top", "gate", "probability"] and found.marks == [list("λόγος one ")]
    with pytest.raises(traitlets.TraitError, match="no color 'static' here; there are chosen, top, gate, probability"): TokenView(found, color="static")


@pytest.mark.parametrize("sequences, said", [
    ("x" * 24, "24 tokens: the model was trained on 23, so there should be from 2 to 23"), ("x", "1 tokens: the model was trained on 23"), ([], "float64: they should be text"), (["one", "three"], "3, 5 tokens"),
    ([[1, 256]], "a token 256: the model knows those from 0 to 255"), ([-1, 3], "a token -1"), ([[1, 2], [3, 4, 5]], "not of one length"), ([.5, 1.], "float64: they should be text, or whole numbers"), (np.zeros((1, 1, 4), int), r"\[1, 1, 4\]")])
def test_sequences_that_cannot_be_read_are_refused(run, sequences, said):
    with pytest.raises(ValueError, match=said): routing_history(run, sequences)


def test_characters_that_the_corpus_lacks_are_refused(seeds):
    with pytest.raises(ValueError, match="character 'X', which the alphabet of the corpus lacks"): routing_history(seeds[0], "one X")


@pytest.mark.parametrize("kind, given, said", [("transformer", {}, "nothing is routed: it should be one of mod, sdt, stt, with a capacity below 1"), ("stt", {"capacity": 1.}, "nothing is routed"),
                                               ("mod", {"keep_weights": False}, "kept no weights: train it with keep_weights=True")])
def test_runs_without_what_is_shown_are_refused(folder, kind, given, said):
    with pytest.raises(RunError, match=said): routing_history(train(folder, kind, f"refused-{kind}", steps=1, **given))


def test_other_tasks_are_refused_or_shown_as_numbers(tmp_path):
    with pytest.raises(RunError, match="nothing is routed"): routing_history(fit(Recall(length=8), runs_dir=tmp_path, steps=1, progress=False))
    other = fit(build(Graphical, {"model": "stt", **SMALL}), runs_dir=tmp_path, steps=1, progress=False)
    with pytest.raises(ValueError, match="graphical is of no text: give rows of tokens"): routing_history(other, "one")
    found = routing_history(other)
    assert not found.text and found.marks[0] == [str(token) for token in found.tokens[0]] and found.signals["change"].shape == (len(found.steps), 2, SHOWN, 23)


def test_sentences_of_recall_are_read_to_their_last_token(folder):
    run = fit(DecoderRecall(model="mod", length=12, d_model=16, test_size=8), runs_dir=folder / "runs", name="recall", steps=2, warmup=0, checkpoints=1, evaluations=1, progress=False)
    found = routing_history(run)
    assert not found.text and np.array_equal(found.tokens, DecoderRecall(length=12, test_size=8).tests["valid"].tokens[:SHOWN]) and found.signals["chosen"].shape == (2, 1, SHOWN, 12)
    with pytest.raises(ValueError, match="from 2 to 12"): routing_history(run, torch.zeros(13, dtype=torch.int64))


def test_weights_of_another_model_are_refused(run, seeds, tmp_path):
    shutil.copytree(run.path, tmp_path / "mixed")
    shutil.copy(seeds[0].checkpoints.path(STEPS), tmp_path / "mixed/checkpoints")
    with pytest.raises(RunError, match=f"{STEPS:08d}.safetensors does not fit this task's model"): routing_history(Run(tmp_path / "mixed"))


def test_colour_scale_is_of_the_whole_run_and_always_finite(history):
    for name, values in history.signals.items():
        low, high = color_limits(name, values)
        assert (low, high) == ((0., 1.) if name not in ("static", "change") else tuple(np.quantile(values, [.01, .99])))
    assert color_limits("static", np.array([np.nan, np.inf])) == (0., 1.) and color_limits("change", np.array([2., 2., np.nan])) == (1.5, 2.5)


# Over training

def test_gates_are_the_means_over_seeds_with_their_intervals(seeds):
    metrics = [run.metrics.set_index("step") for run in seeds]
    table = gates_table(seeds)
    assert set(table["metric"]) == {"chosen", "gate", "accuracy"} and set(table["block"]) == {1, 3} and set(table["n"]) == {2}
    for row in table.itertuples():
        a, b = (m.loc[row.step, f"routing/{row.metric}_{row.block}"] for m in metrics)
        np.testing.assert_allclose([row.mean, row.high - row.mean, row.mean - row.low], [(a + b) / 2, *2 * [math.tan(.475 * math.pi) * abs(a - b) / 2]], rtol=1e-9, atol=1e-12)  # Student's t of one degree is Cauchy's
    figure = gates_figure(seeds)
    assert [a.text for a in figure.layout.annotations] == [RECORDS[name] for name in ("chosen", "gate", "accuracy")]
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines" and trace.xaxis == "x"}
    assert list(lines["capacity 0.75"].y) == [.75, .75] and lines["capacity 0.75"].line.dash == "dash"
    np.testing.assert_allclose(lines["block 3"].y, (metrics[0]["routing/chosen_3"] + metrics[1]["routing/chosen_3"]).dropna() / 2)


def test_gates_of_one_run_are_what_it_recorded_with_its_capacity(run):
    figure = gates_figure(run)
    assert [trace.name for trace in figure.data if "capacity" in trace.name] == ["capacity 0.5"] and not any(trace.fill for trace in figure.data)
    for axis, name in zip(("x", "x2", "x3", "x4"), ("chosen", "gate", "accuracy", "surprise")):
        for block in (1, 3):
            line, = [trace for trace in figure.data if trace.xaxis == axis and trace.name == f"block {block}"]
            np.testing.assert_allclose(line.y, run.metrics[f"routing/{name}_{block}"].dropna())


def test_capacity_is_the_models(run, seeds, folder):
    for each in (run, seeds[0]): assert capacity_of(each) == build(Language, each.config["parameters"]).model().capacity
    assert capacity_of(seeds[0]) == Routed(8, 8, 2).capacity


def test_gates_of_runs_that_differ_or_are_not_routed_are_refused(run, seeds, folder):
    with pytest.raises(ValueError, match="the runs differ in beta_to, beta_warmup, capacity, corpus_fingerprint, model, unit: a mean"): gates_table([run, seeds[0]])
    with pytest.raises(ValueError, match="plain recorded nothing of routers"): gates_figure(train(folder, "transformer", "plain", steps=1))


# Routed and unrouted blocks

def kept(run, step, role, block):
    """A matrix as it stands in the kept weights."""
    return run.checkpoints[step][f"blocks.{block}.{role}.weight"].numpy().astype(float)


@pytest.mark.parametrize("log", [False, True])
def test_frames_are_the_normalised_singular_values_of_the_kept_weights(run, log):
    figure, last = blocks_figure(run, log), list(run.checkpoints)[-1]
    names = [(role, block) for role in ROLES for block in range(4)]
    assert [frame.name for frame in figure.frames] == [str(step) for step in run.checkpoints] and len(figure.data) == len(names) == 28
    for frame, step in zip(figure.frames, run.checkpoints):
        for trace, line, (role, block) in zip(frame.data, figure.data, names):
            s = np.linalg.svd(kept(run, step, role, block), compute_uv=False)
            np.testing.assert_allclose(trace.y, s / s[0], rtol=1e-4, atol=1e-6)
            if step == last: np.testing.assert_array_equal(line.y, trace.y)
            low, high = figure.layout.yaxis.range
            assert low <= (np.log10(np.nanmin(trace.y)) if log else 0) and high >= (0 if log else 1)
    assert figure.layout.sliders[0].active == len(figure.frames) - 1
    for line, (_, block) in zip(figure.data, names):
        red, _, blue = unlabel_rgb(f"rgb({','.join(str(int(line.line.color[i:i + 2], 16)) for i in (1, 3, 5))})")
        assert (line.line.dash, blue > red, line.name) == (("solid", True, f"block {block}, routed") if block in (1, 3) else ("dash", False, f"block {block}, not routed"))
        assert line.showlegend == (line.xaxis == "x") and len({line.xaxis for line in figure.data}) == 7


def test_stable_rank_over_training_is_that_of_the_kept_weights(run):
    figure = blocks_metric_figure(run)
    for line, (role, block) in zip(figure.data, ((role, block) for role in ROLES for block in range(4)), strict=True):
        matrices = [kept(run, step, role, block) for step in run.checkpoints]
        np.testing.assert_allclose(line.y, [(w**2).sum() / np.linalg.norm(w, 2)**2 for w in matrices], rtol=1e-4)
        np.testing.assert_array_equal(line.customdata, list(run.checkpoints))
    with pytest.raises(ValueError, match="no metric 'rank'; there are spectral_norm"): blocks_metric_figure(run, "rank")


def test_blocks_of_an_unrouted_model_are_refused(folder):
    with pytest.raises(ValueError, match="has no routers among its matrices"): blocks_of(train(folder, "transformer", "unrouted", steps=1).spectra)


# The page, alone

@pytest.fixture(scope="module")
def texts(run): return routing_history(run, ["two <b>one</b>\n\tthree", "λόγος two\nthree."])


@pytest.fixture
def open_page(chromium, texts, tmp_path):
    """Opens a view's file without a network; there must be no request but for files, and no error."""
    context = chromium.new_context(viewport={"width": 1000, "height": 700})
    wrong = files_only(context)
    def open_page(view):
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(view.to_html(tmp_path / "view.html").as_uri())
        page.wait_for_selector(".routing-strip", timeout=20_000)
        return page
    yield open_page
    context.close()
    assert wrong == []


def shows(page, history, step, color, sequence):
    """The page shows a checkpoint: words, marks and colours are those of the arrays."""
    page.evaluate(FRAME)
    t, strips = history.index(step), page.evaluate(STRIPS)
    assert page.locator(".scrub-step").inner_text() == f"step {history.steps[t]}" and [strip["block"] for strip in strips] == [f"block {block}" for block in history.blocks]
    low, high = color_limits(color, history.signals[color])
    for b, strip in enumerate(strips):
        chosen, marks = history.signals["chosen"][t, b, sequence], history.marks[sequence]
        assert strip["text"] == "".join(marks) and strip["marks"] == [mark.removesuffix("\n") for mark in marks]
        assert strip["chosen"] == chosen.tolist() and strip["share"] == f"{math.floor(100 * chosen.mean() + .5)} %"
        share = np.clip((history.signals[color][t, b, sequence].astype(float) - low) / (high - low), 0, 1)
        opacity = [float(color.rstrip(")").split(",")[3]) if color.startswith("rgba") else 1. for color in strip["colors"]]
        np.testing.assert_allclose(opacity, .5 * share, atol=4e-3)


def test_page_scrubs_by_mouse_and_keys_and_marks_what_the_arrays_say(open_page, texts):
    page = open_page(TokenView(texts, step=0))
    slider, steps = page.get_by_label("checkpoint", exact=True), texts.steps
    shows(page, texts, 0, "chosen", 0)
    for key, index in (("End", len(steps) - 1), ("ArrowLeft", len(steps) - 2), ("Home", 0), ("ArrowRight", 1)):
        slider.press(key)
        shows(page, texts, int(steps[index]), "chosen", 0)
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 8 + (box["width"] - 16) / (len(steps) - 1), box["y"] + box["height"] / 2)
    page.mouse.down()
    for index in range(1, len(steps)):
        page.mouse.move(box["x"] + 8 + (box["width"] - 16) * index / (len(steps) - 1), box["y"] + box["height"] / 2)
        shows(page, texts, int(steps[index]), "chosen", 0)
    page.mouse.up()
    page.get_by_role("button", name="first checkpoint").click()
    shows(page, texts, 0, "chosen", 0)


def test_list_of_colours_and_of_sequences_change_what_is_shown(open_page, texts):
    between = int(texts.steps[-1]) - 1  # no checkpoint
    page = open_page(TokenView(texts, step=between, color="static", sequence=1))
    colour, sequence = page.get_by_label("colour", exact=True), page.get_by_label("sequence", exact=True)
    assert colour.locator("option").all_inner_texts() == list(SIGNALS.values()) and sequence.locator("option").count() == 2
    assert between not in texts.steps
    for i in (1, 0):
        sequence.select_option(str(i))
        for color in SIGNALS:
            colour.select_option(color)
            shows(page, texts, between, color, i)
            low, high = (text.split()[-1] for text in page.locator(".routing-legend").first.locator("span").all_inner_texts())
            if color in ("chosen", "top"): assert (low, high) == ("no", "yes")
            else: np.testing.assert_allclose([float(low), float(high)], color_limits(color, texts.signals[color]), rtol=6e-3)
    styles = page.evaluate("""() => ['.routing-chosen', ':not(.routing-chosen)'].map((kind) => { const s = getComputedStyle(document.querySelector('.routing-strips .routing-token' + kind)); return [s.fontWeight, s.borderBottomColor]; })""")
    assert styles[0][0] == "700" and styles[1] == ["400", "rgba(0, 0, 0, 0)"] and styles[0][1] != styles[1][1]


def test_token_that_is_pointed_at_shows_its_numbers(open_page, texts):
    page = open_page(TokenView(texts))
    numbers = lambda place, b: [f"{texts.signals[name][-1, b, 0, place]:.3g}" for name in ("gate", "probability", "static", "change")]
    def told(place, b):
        text = page.locator(".scrub-caption").inner_text()
        head, rest = text.split(": ", 1)
        assert head == f"token {place}, {texts.marks[0][place].strip() or 'space'!r} ({texts.tokens[0, place]}), block {texts.blocks[b]}"
        chosen, top, *others = rest.split(" · ")
        assert (chosen, top) == tuple(f"{name} {'yes' if texts.signals[key][-1, b, 0, place] else 'no'}" for name, key in (("chosen", "chosen"), ("among the first", "top")))
        np.testing.assert_allclose([float(other.split()[-1]) for other in others], [float(number) for number in numbers(place, b)], rtol=6e-3)
    strips = page.locator(".routing-strip")
    strips.nth(1).locator(".routing-token").nth(5).hover()
    told(5, 1)
    strips.nth(0).locator(".routing-token").nth(2).focus()
    for key, place, b in (("ArrowRight", 3, 0), ("ArrowDown", 3, 1), ("ArrowLeft", 2, 1), ("End", len(texts.marks[0]) - 1, 1), ("ArrowRight", len(texts.marks[0]) - 1, 1), ("ArrowUp", len(texts.marks[0]) - 1, 0), ("Home", 0, 0)):
        page.keyboard.press(key)
        told(place, b)
    assert page.locator(".routing-pointed").count() == 2


def test_what_is_no_number_has_no_colour(open_page, texts):
    broken = texts._replace(signals=texts.signals | {"static": np.full_like(texts.signals["static"], np.nan)})
    page = open_page(TokenView(broken, color="static"))
    assert {color for strip in page.evaluate(STRIPS) for color in strip["colors"]} == {"rgba(0, 114, 178, 0)"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_every_colour(open_page, texts, scheme):
    page = open_page(TokenView(texts, color="top"))  # not all of these are chosen, and those are fainter
    page.emulate_media(color_scheme=scheme)
    page.evaluate(FRAME)
    found = page.evaluate("""() => { const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const painted = (...colors) => { for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); } return Array.from(canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)); };
      const behind = getComputedStyle(document.body).backgroundColor;
      return Array.from(document.querySelectorAll('.routing-strips .routing-token')).map((t) => { const s = getComputedStyle(t); return [painted(behind, s.backgroundColor, s.color), painted(behind, s.backgroundColor)]; }); }""")
    def luminance(rgb): return np.where((c := np.array(rgb) / 255) <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4) @ [.2126, .7152, .0722]
    contrast = [(max(a, b) + .05) / (min(a, b) + .05) for a, b in ((luminance(text), luminance(behind)) for text, behind in found)]
    assert min(contrast) > 4.5  # what WCAG 2 asks for


# In JupyterLab

def test_dashboard_and_view_are_scrubbed_together_in_jupyterlab(chromium, run, folder, tmp_path):
    lab = Lab(tmp_path, folder / "runs")
    try:
        cells = ["import traitlets\nfrom tformer_lab.dashboards.dashboard import Dashboard\nfrom tformer_lab.dashboards.routing import TokenView, routing_history\nfrom tformer_lab.runs.store import Run",
                 f"run = Run({str(run.path)!r})\nview = TokenView(routing_history(run, 'one two three'))\ndashboard = Dashboard(run)\nlink = traitlets.link((dashboard, 'step'), (view, 'step'))\nview", "dashboard"]
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), lab.folder / "nbs/view.ipynb")
        page, wrong = lab.open(chromium, "view.ipynb"), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.wait_for_selector(".routing-strip", timeout=60_000)
        page.wait_for_selector(".scrub-spectrum .main-svg", timeout=60_000)
        texts, steps = routing_history(run, "one two three"), list(run.checkpoints)
        view = page.locator(".routing")
        view.get_by_label("checkpoint", exact=True).press("Home")
        page.wait_for_function("Array.from(document.querySelectorAll('.scrub-step')).every((step) => step.innerText === 'step 0')", timeout=20_000)
        kernel = Kernel(lab.kernels().pop())
        try:
            deadline = time.monotonic() + 10
            while (state := json.loads(kernel.run("import json; print(json.dumps([view.step, dashboard.step]))"))) != [0, 0]: assert time.monotonic() < deadline, state
            kernel.run(f"dashboard.step = {steps[2]}")
            page.wait_for_function(f"Array.from(document.querySelectorAll('.scrub-step')).every((step) => step.innerText === 'step {steps[2]}')", timeout=20_000)
            assert [strip["chosen"] for strip in page.evaluate(STRIPS)] == texts.signals["chosen"][2, :, 0].tolist()
        finally: kernel.close()
        page.close()
        assert wrong == []
    finally: lab.close()


@pytest.mark.parametrize("wrong, said", [([["a"]], "should be text, several in one list, or whole numbers"), (5, r"sequences are \[\] of int64: they should be text"), (object(), "should be text")], ids=["lists", "number", "object"])
def test_what_are_no_sequences_is_refused(run, wrong, said):
    with pytest.raises(ValueError, match=said): routing_history(run, wrong)


def test_no_runs_have_no_gates():
    with pytest.raises(ValueError, match="there are no runs"): gates_figure([])
