"""The dashboard in a real browser: in JupyterLab, as voila's page, and as an exported file without a network; what a person would see and do."""
import csv
import json
import math
import time

import numpy as np
import pytest
from playwright.sync_api import TimeoutError
from conftest import TOP, Kernel, Lab, Voila, files_only, growing, layered_run, write_run

from tformer_lab.dashboards.dashboard import Dashboard
from tformer_lab.dashboards.figures import step_axis
from tformer_lab.dashboards.panels import GHOSTS, LAWS, LINES, SCALES, VIEWS
from tformer_lab.runs.store import Run

pytestmark = pytest.mark.timeout(300)  # a page that hangs has to end, too

SLIDER = ".scrub-bar input[type=range]"
# What plotly was given, by panel; and where the markers of the spectrum stand, in the units of the axes.
PLOTTED = """(panel) => document.querySelector(`.scrub-${panel}`).data.map(({ name, visible, x, y, z, customdata, fillcolor }) => {
  const plain = (a) => a == null ? null : Array.from(a, (v) => Array.isArray(v) || ArrayBuffer.isView(v) ? plain(v) : Number.isFinite(v) ? v : null);
  return { name, visible: visible !== false && x?.length > 0, x: plain(x), y: plain(y), z: plain(z), customdata: plain(customdata), fillcolor };
})"""
DRAWN = """() => {
  const panel = document.querySelector('.scrub-spectrum'), { xaxis, yaxis } = panel._fullLayout;
  return Array.from(panel.querySelectorAll('.scatterlayer .point')).map((marker) => {
    const [x, y] = marker.getAttribute('transform').match(/-?[\\d.]+/g).map(Number);
    return [xaxis.p2d(x), yaxis.p2d(y)];
  });
}"""
CURSORS = """() => Array.from(document.querySelectorAll('.scrub-cursor')).map((line) => {
  const panel = line.parentElement, { xaxis } = panel._fullLayout;
  return [panel.className.match(/scrub-(\\w+)/)[1], xaxis.p2d(line.getBoundingClientRect().x + 1 - panel.getBoundingClientRect().x - xaxis._offset), line.style.display];
})"""
FRAME = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))"
# From a moved slider to changed pixels, by the page's own clock.
PAINTED = """async ([positions, panel]) => {
  const slider = document.querySelector('.scrub-bar input[type=range]'), watched = document.querySelector(panel);
  const times = [];
  for (const position of positions) {
    const start = performance.now();
    await new Promise((done) => {                                   // the drawn path has changed
      const observer = new MutationObserver(() => { observer.disconnect(); done(); });
      observer.observe(watched.querySelector('.scatterlayer'), { subtree: true, attributes: true, childList: true });
      slider.value = position;
      slider.dispatchEvent(new Event('input', { bubbles: true }));
    });
    await new Promise((done) => requestAnimationFrame(() => {       // before the next paint …
      const channel = new MessageChannel();
      channel.port1.onmessage = done;                               // … and after it
      channel.port2.postMessage(0);
    }));
    times.push(performance.now() - start);
    await new Promise((done) => setTimeout(done, 30));
  }
  return times;
}"""
FRAMES = """async (positions) => {
  const slider = document.querySelector('.scrub-bar input[type=range]'), start = performance.now();
  let frames = 0;
  while (performance.now() - start < 3000) {
    slider.value = positions[frames++ % positions.length];
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    await new Promise(requestAnimationFrame);
  }
  return frames / (performance.now() - start) * 1000;
}"""
OPENED = {"run": "trained", "matrix": "W", "step": 200, "view": "rank", "scale": "log", "other_scale": "linear", "step_scale": "auto", "lines": ["first", "previous", "noise", "law"], "record": "train/loss",
          "metric": "stable_rank", "color": "stable_rank", "fixed": True, "compare": [], "align": "step", "speed": 12., "live": False}


@pytest.fixture(scope="module")
def runs(small_run, tmp_path_factory):
    """The small training; a run with two of its matrices and other steps; one of 24 matrices; one that failed."""
    import shutil
    folder = tmp_path_factory.mktemp("browser") / "runs"
    layered_run(folder / "layers", 6, 16, 40)
    shapes = {name: small_run.spectra.shapes[name] for name in ("W", "V")}
    write_run(folder / "second", {name: growing(shape, 5, seed) for seed, (name, shape) in enumerate(shapes.items())}, shapes, [0, 10, 40, 90, 160], [5., 3., 2., 1., .5], ends="failed", task="second task")
    time.sleep(1)  # the newest run is the one that opens
    shutil.copytree(small_run.path, folder / "trained")
    config = (folder / "trained" / "config.yaml").read_text()
    created = config[config.index("created:"):].split("\n")[0]
    (folder / "trained" / "config.yaml").write_text(config.replace(created, "created: '2099-01-01T00:00:00+00:00'"))
    return folder


@pytest.fixture(scope="module")
def lab(runs, tmp_path_factory):
    """JupyterLab over the notebooks and the runs."""
    lab = Lab(tmp_path_factory.mktemp("lab"), runs)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def errors():
    """Errors of the pages of the module; there must be none."""
    errors = []
    yield errors
    assert not errors


def watched(page, errors):
    page.on("pageerror", lambda error: errors.append(f"{error}\n{error.stack}"))
    return page


SHOWS = """(state) => document.querySelector('.scrub-step').innerText === `step ${state.step.toLocaleString("en")}` && document.querySelector('.scrub-caption').innerText.startsWith(state.matrix + ',')
      && document.querySelector('select[aria-label="view"]').value === state.view && (document.querySelector('tr.scrub-chosen')?.dataset.run ?? state.run) === state.run"""


@pytest.fixture(scope="module")
def explore(lab, chromium, errors):
    """`explore.ipynb` as it is after all its cells have run, and its kernel."""
    page = watched(lab.open(chromium, "explore.ipynb", height=1300), errors)
    page.wait_for_selector(".scrub-spectrum .main-svg", timeout=60_000)
    page.locator(".scrub").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'", timeout=30_000)
    kernel, = (Kernel(file) for file in lab.kernels())
    yield page, kernel
    kernel.close()
    page.close()


@pytest.fixture
def kernel(explore): return explore[1]


@pytest.fixture
def page(explore, errors):
    """The dashboard as it opened."""
    page, kernel = explore
    put(page, kernel, **OPENED)
    yield page
    assert not errors


def put(page, kernel, **state):
    """Set the state in Python, and wait until the page shows it; once more where the page was just about to say where its slider rests."""
    for patience in (4_000, 15_000, 30_000):
        kernel.run("for _name, _value in %r.items():\n if getattr(dashboard, _name) != _value: setattr(dashboard, _name, _value)" % (state,))
        try: page.wait_for_function(SHOWS, arg={**OPENED, **state}, timeout=patience)
        except TimeoutError:
            if patience == 30_000: raise
        else: return page.evaluate(FRAME)


def state_of(kernel):
    return json.loads(kernel.run("import json; print(json.dumps(dashboard.state))"))


def rests(page):
    """Python has heard where the slider rests, and the page has drawn."""
    page.wait_for_timeout(250)
    page.evaluate(FRAME)


def plotted(page, panel="spectrum"):
    page.evaluate(FRAME)
    array = lambda value: None if value is None else np.array(value, dtype=float)
    return [{**trace, **{axis: array(trace[axis]) for axis in ("x", "y", "z", "customdata")}} for trace in page.evaluate(PLOTTED, panel)]


def now(page): return next(trace for trace in plotted(page) if trace["name"] == "now")


def shown_step(page): return int(page.locator(".scrub-step").inner_text().removeprefix("step ").replace(",", ""))


def same_lines(page, figure, what=""):
    """The visible lines of the page's spectrum are those of the Python figure."""
    found = {trace["name"]: trace for trace in plotted(page) if trace["visible"]}
    wanted = {trace.name: trace for trace in figure.data if trace.visible is not False}
    assert found.keys() == wanted.keys(), what
    for name, trace in wanted.items():
        for axis in "xy": np.testing.assert_allclose(found[name][axis], np.asarray(trace[axis], dtype=float), rtol=2e-5, atol=1e-9, err_msg=f"{what} {name} {axis}")
    types = page.evaluate("(({ xaxis, yaxis }) => [xaxis.type, yaxis.type, ...xaxis.range, ...yaxis.range])(document.querySelector('.scrub-spectrum')._fullLayout)")
    assert types[:2] == [figure.layout.xaxis.type, figure.layout.yaxis.type]
    np.testing.assert_allclose(types[2:], [*figure.layout.xaxis.range, *figure.layout.yaxis.range], rtol=1e-5, atol=1e-6)


def drag(page, fraction):
    """Drag the slider's handle to a fraction of its length, as a hand would."""
    slider = page.locator(SLIDER)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    value, low, high = (float(slider.evaluate(f"e => e.{name}")) for name in ("value", "min", "max"))
    y, inner = box["y"] + box["height"] / 2, box["width"] - 16  # the handle is 16 pixels wide
    page.mouse.move(box["x"] + 8 + inner * (value - low) / (high - low), y)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + inner * fraction, y, steps=12)
    page.mouse.up()
    page.evaluate(FRAME)


def stored(run, matrix, step):
    """What a logarithmic axis shows: the stored values, without those that are zero to float32's precision."""
    s = run.spectra_at(step).spectra[matrix].values.astype(np.float32)
    return np.where(s > len(s) * np.finfo(np.float32).eps * s[0], s, np.nan)


def positions(steps):
    """Where steps are on the axis that suits them."""
    return step_axis(steps).position(steps)


def click(page, panel, fraction):
    """Click into a panel over training; returns where on its axis of steps."""
    area = page.locator(f".scrub-{panel} .plotly .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + fraction * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_timeout(100)
    page.mouse.click(box["x"] + fraction * box["width"], box["y"] + box["height"] / 2)
    page.evaluate(FRAME)
    low, high = page.evaluate(f"document.querySelector('.scrub-{panel}')._fullLayout.xaxis.range")
    return low + fraction * (high - low)


def downloaded(page, label):
    button = page.get_by_label(label, exact=True)
    button.scroll_into_view_if_needed()
    with page.expect_download() as download: button.click()
    return download.value


@pytest.fixture(scope="module")
def trained(runs): return Run(runs / "trained")


# The slider, in JupyterLab

def test_dragging_the_slider_plots_and_draws_the_stored_values(page, trained):
    seen = set()
    for fraction in (.85, .3, .6, 1.):
        drag(page, fraction)
        step, line = shown_step(page), now(page)
        seen.add(step)
        wanted = stored(trained, "W", step)[:len(line["x"])]
        np.testing.assert_allclose(line["y"], wanted, rtol=1e-6)
        np.testing.assert_array_equal(line["x"], 1 + np.arange(len(wanted)))
        rank, value = np.array(page.evaluate(DRAWN)).T
        np.testing.assert_allclose(rank, 1 + np.flatnonzero(np.isfinite(wanted)), atol=.02)
        np.testing.assert_allclose(value, wanted[np.isfinite(wanted)], rtol=3e-3)  # pixels are written with two decimals
    assert len(seen) == 4 and seen <= set(trained.spectra.steps.tolist())


def test_ghosts_are_the_first_the_previous_and_the_last_checkpoint(page, kernel, trained):
    steps = trained.spectra.steps.tolist()
    put(page, kernel, lines=["first", "previous", "final"], step=steps[5])
    for _ in range(2):
        at = steps.index(shown_step(page))
        lines = {trace["name"]: trace["y"] for trace in plotted(page) if trace["visible"]}
        for name, step in (("now", steps[at]), ("previous", steps[at - 1]), ("first", steps[0]), ("final", steps[-1])):
            np.testing.assert_allclose(lines[name], stored(trained, "W", step)[:len(lines[name])], rtol=1e-6)
        page.locator(SLIDER).press("ArrowLeft")


def test_keys_and_buttons_move_by_one_checkpoint_and_to_both_ends(page, trained):
    steps, slider = trained.spectra.steps.tolist(), page.locator(SLIDER)
    for key, step in (("Home", steps[0]), ("ArrowRight", steps[1]), ("ArrowRight", steps[2]), ("ArrowLeft", steps[1]), ("End", steps[-1])):
        slider.press(key)
        page.evaluate(FRAME)
        assert shown_step(page) == step
        np.testing.assert_allclose(now(page)["y"], stored(trained, "W", step)[:len(now(page)["y"])], rtol=1e-6)
    for label, step in (("first checkpoint", steps[0]), ("last checkpoint", steps[-1])):
        page.get_by_role("button", name=label).click()
        assert shown_step(page) == step


def test_play_runs_to_the_last_checkpoint_and_stops_or_is_paused(page, kernel, trained):
    steps = trained.spectra.steps.tolist()
    page.get_by_label("checkpoints a second").select_option("30")
    page.evaluate("""() => { const label = document.querySelector('.scrub-step'); window.passed = [];
      window.watcher = new MutationObserver(() => window.passed.at(-1) !== label.innerText && window.passed.push(label.innerText));
      window.watcher.observe(label, { childList: true, characterData: true, subtree: true }); }""")
    page.get_by_role("button", name="play").click()  # from the last: begins again
    page.wait_for_function(f"window.passed.length > 1 && document.querySelector('.scrub-step').innerText === 'step {steps[-1]}'", timeout=30_000)
    page.get_by_role("button", name="play").wait_for(timeout=20_000)
    assert page.evaluate("(window.watcher.disconnect(), window.passed)") == [f"step {step}" for step in steps]
    np.testing.assert_allclose(now(page)["y"], stored(trained, "W", steps[-1])[:len(now(page)["y"])], rtol=1e-6)
    page.get_by_label("checkpoints a second").select_option("2")
    page.get_by_role("button", name="first checkpoint").click()
    start = page.evaluate("performance.now()")
    page.get_by_role("button", name="play").click()
    page.wait_for_function(f"document.querySelector('.scrub-step').innerText === 'step {steps[3]}'", timeout=30_000)
    took = page.evaluate("performance.now()") - start
    page.get_by_role("button", name="pause").click()
    at = shown_step(page)
    page.wait_for_timeout(700)
    assert shown_step(page) == at and 1_300 < took < 4_000  # three steps at two a second
    assert state_of(kernel)["speed"] == 2. and state_of(kernel)["step"] == at


def test_jump_goes_to_the_first_checkpoint_with_a_loss_as_low(page, trained):
    records = trained.metrics[["step", "train/loss"]].dropna()
    steps, losses = records["step"].to_numpy(), records["train/loss"].to_numpy()
    lowest = losses < np.r_[np.inf, np.minimum.accumulate(losses)[:-1]]
    at_checkpoint = float(losses[lowest & np.isin(steps, trained.spectra.steps) & (steps > 10)][0])  # reached exactly there
    box = page.get_by_label("jump to the first checkpoint")
    for wanted in (at_checkpoint * (1 + 1e-6), float(losses[[0, -1]].mean())):
        box.fill(str(wanted))
        box.press("Enter")
        assert shown_step(page) == next(step for step in trained.spectra.steps if step >= steps[losses <= wanted][0])
    box.fill("-100")
    box.press("Enter")
    assert "never came down to -100" in page.locator(".scrub-message").inner_text()
    box.fill(str(wanted))
    box.press("Enter")
    assert page.locator(".scrub-message").is_hidden()
    box.fill("")


@pytest.mark.parametrize("panel", ["heat", "loss", "trajectories", "metric"])
def test_click_into_a_panel_over_training_moves_every_cursor_there(page, trained, panel):
    steps = trained.spectra.steps
    for fraction in (.5, .85):
        at = click(page, panel, fraction)
        step = shown_step(page)
        assert step == steps[np.argmin(abs(positions(steps) - at))]
        cursors = page.evaluate(CURSORS)
        assert [name for name, _, _ in cursors] == ["heat", "trajectories", "loss", "metric"] and {display for _, _, display in cursors} == {"block"}
        np.testing.assert_allclose([x for _, x, _ in cursors], positions(steps)[list(steps).index(step)], atol=.01 * positions(steps)[-1])
        np.testing.assert_allclose(now(page)["y"], stored(trained, "W", step)[:len(now(page)["y"])], rtol=1e-6)


def test_panels_over_training_hold_the_stored_values(page, trained):
    steps, s = trained.spectra.steps, trained.spectra["W"]
    x = positions(steps)
    heat, = plotted(page, "heat")
    drawn = np.stack([stored(trained, "W", step) for step in steps])[:, :len(heat["y"])]
    np.testing.assert_allclose(heat["x"], x)
    np.testing.assert_allclose(heat["z"].T, np.log10(drawn), rtol=1e-5, atol=1e-6)
    for trace in plotted(page, "trajectories"):
        if trace["visible"]: np.testing.assert_allclose(trace["y"], drawn[:, int(trace["name"].removeprefix("rank ")) - 1], rtol=1e-6)
    band, line = plotted(page, "metric")[:2]
    with np.errstate(invalid="ignore"): np.testing.assert_allclose(line["y"], (s**2).sum(1) / s[:, 0]**2, rtol=1e-5)  # W begins at zero
    assert band["visible"] and len(band["x"]) == 2 * len(steps)
    loss, optimum = plotted(page, "loss")[:2]
    records = trained.metrics[["step", "train/loss"]].dropna()
    np.testing.assert_array_equal(loss["customdata"], records["step"])
    np.testing.assert_allclose(loss["y"], records["train/loss"], rtol=1e-6)
    assert optimum["name"].startswith("optimum") and (optimum["y"] == np.float64(trained.optimum[0]["value"])).all()


# Choosing

def test_table_of_runs_is_searched_sorted_and_opens_a_run(page, kernel):
    rows = page.locator(".scrub-runs tbody tr")
    assert rows.count() == 3 and page.locator(".scrub-table summary").inner_text() == "Runs (3)"
    search = page.get_by_label("search runs")
    search.fill("SECOND failed")
    assert [rows.nth(i).get_attribute("data-run") for i in range(rows.count())] == ["second"] and page.locator(".scrub-table summary").inner_text() == "Runs (1 of 3)"
    search.fill("")
    for _ in range(2):
        page.locator(".scrub-runs th button", has_text="loss").click()
        losses = [float(text) for text in page.locator(".scrub-runs tbody tr").evaluate_all("rows => rows.map((r) => r.querySelectorAll('td')[5].innerText)")]
        direction = page.locator(".scrub-runs th", has_text="loss").get_attribute("aria-sort")
        assert losses == sorted(losses, reverse=direction == "descending")
    assert direction == "descending"
    page.locator(".scrub-runs").get_by_role("button", name="layers", exact=True).click()
    page.wait_for_function("document.querySelector('.scrub-caption').innerText.startsWith('encoder.0.self_attn.q')", timeout=30_000)
    rests(page)
    state = state_of(kernel)
    assert (state["run"], state["matrix"]) == ("layers", "encoder.0.self_attn.q") and page.locator("tr.scrub-chosen").get_attribute("data-run") == "layers"
    page.locator(".scrub-runs").get_by_role("button", name="second", exact=True).click()
    page.wait_for_function("document.querySelector('.scrub-status').innerText === 'failed: RuntimeError: the loss is NaN'", timeout=30_000)


def test_another_matrix_is_shown_at_the_same_step(page, kernel, trained):
    drag(page, .6)
    step = shown_step(page)
    page.get_by_label("matrix", exact=True).select_option("V")
    page.wait_for_function("document.querySelector('.scrub-caption').innerText.startsWith('V,')", timeout=30_000)
    line = now(page)
    assert shown_step(page) == step
    np.testing.assert_allclose(line["y"], stored(trained, "V", step)[:len(line["y"])], rtol=1e-6)
    rests(page)
    assert (state_of(kernel)["matrix"], state_of(kernel)["step"]) == ("V", step)


def test_click_on_a_cell_of_all_matrices_opens_that_matrix(page, kernel, runs):
    names = Run(runs / "layers").spectra.matrices
    put(page, kernel, run="layers", matrix=names[0], step=int(Run(runs / "layers").spectra.steps[20]))
    cells = plotted(page, "grid")
    figure = Dashboard(runs, run="layers", step=shown_step(page)).figure("grid")
    for found, wanted in zip(cells[:24], figure.data[:24], strict=True):
        np.testing.assert_allclose(found["y"], wanted.y, atol=1e-5)
        np.testing.assert_allclose(found["x"], wanted.x, atol=1e-3)
    area = page.locator(".scrub-grid .plotly .nsewdrag").first
    for layer, role in ((4, 2), (0, 3)):
        rests(page)  # a panel above may still become higher
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        page.mouse.click(box["x"] + (layer + .5) / 6 * box["width"], box["y"] + (role + .5) / 4 * box["height"])
        wanted = f"encoder.{layer}.self_attn.{'qkvo'[role]}"
        page.wait_for_function(f"document.querySelector('.scrub-caption').innerText.startsWith('{wanted},')", timeout=30_000)
        page.evaluate(FRAME)
        chosen, = page.evaluate("document.querySelector('.scrub-grid').layout.shapes.map(({ x0, y0 }) => [Math.floor(x0), Math.floor(y0)])")
        assert chosen == [layer, role] and shown_step(page) == Run(runs / "layers").spectra.steps[20]
        rests(page)
        assert state_of(kernel)["matrix"] == wanted
    before = [cell["fillcolor"] for cell in plotted(page, "grid")[:24]]
    page.locator(SLIDER).press("Home")
    assert [cell["fillcolor"] for cell in plotted(page, "grid")[:24]] != before


def test_every_view_and_scale_in_jupyterlab_is_as_python_draws_it(page, runs):
    drag(page, .7)
    for name in ("final", "fit"): page.locator(f".scrub-line-{name} input").check()
    dashboard = Dashboard(runs, run="trained", matrix="W", step=shown_step(page), lines=["first", "previous", "noise", "law", "final", "fit"])
    for view, scale, other in [(view, scale, other) for view in VIEWS for scale in SCALES for other in SCALES]:
        page.get_by_label("view", exact=True).select_option(view)
        page.get_by_label("values", exact=True).select_option(scale)
        page.get_by_label("other axis", exact=True).select_option(other)
        dashboard.view, dashboard.scale, dashboard.other_scale = view, scale, other
        same_lines(page, dashboard.figure(), f"{view} {scale} {other}")


def test_shuffled_values_are_drawn_at_a_step_whose_weights_were_kept(page, kernel, runs, trained):
    kept = max(set(trained.checkpoints) & set(trained.spectra.steps.tolist()))
    put(page, kernel, step=kept)
    page.locator(".scrub-line-shuffled input").check()
    page.wait_for_function(f"document.querySelector('.scrub-spectrum').data.some((t) => t.name === '{LINES['shuffled'][0]}' && t.visible && t.x.length)", timeout=20_000)
    dashboard = Dashboard(runs, run="trained", matrix="W", step=kept, lines=[*OPENED["lines"], "shuffled"])
    same_lines(page, dashboard.figure())
    page.get_by_label("view", exact=True).select_option("density")
    dashboard.view = "density"
    same_lines(page, dashboard.figure())
    page.locator(SLIDER).press("Home" if kept else "End")
    page.evaluate(FRAME)
    assert LINES["shuffled"][0] not in [trace["name"] for trace in plotted(page) if trace["visible"]]


def test_axes_stay_unless_they_are_released(page):
    axes = "(({ xaxis, yaxis }) => [...xaxis.range, ...yaxis.range])(document.querySelector('.scrub-spectrum')._fullLayout)"
    page.get_by_label("values", exact=True).select_option("linear")
    page.evaluate(FRAME)
    fixed = page.evaluate(axes)
    page.locator(SLIDER).press("Home")
    page.evaluate(FRAME)
    assert page.evaluate(axes) == fixed
    page.get_by_label("fixed axes").uncheck()
    page.evaluate(FRAME)
    first = page.evaluate(axes)
    for name in ("first", "previous", "noise", "law"): page.locator(f".scrub-line-{name} input").uncheck()
    page.locator(SLIDER).press("End")
    page.evaluate(FRAME)
    assert first != fixed and page.evaluate(axes) != first
    page.get_by_label("fixed axes").check()
    page.evaluate(FRAME)
    assert page.evaluate(axes) == fixed


# Side by side

def test_another_matrix_and_another_run_are_drawn_beside(page, kernel, runs):
    put(page, kernel, step=int(Run(runs / "trained").spectra.steps[8]))
    dashboard = Dashboard(runs, run="trained", matrix="W", step=shown_step(page), lines=OPENED["lines"])
    for name in ("second", "V"):
        page.get_by_label("compare with", exact=True).select_option(name)
        page.get_by_role("button", name=f"stop comparing with {name}").wait_for(timeout=20_000)
    dashboard.compare = ["second", "V"]
    for align in ("step", "fraction", "loss"):
        page.get_by_label("by", exact=True).select_option(align)
        dashboard.align = align
        for key in ("", "ArrowLeft", "Home"):
            if key: page.locator(SLIDER).press(key)
            page.evaluate(FRAME)
            dashboard.step = shown_step(page)
            same_lines(page, dashboard.figure(), f"{align} {key}")
        page.locator(SLIDER).press("End")
    for panel in ("metric", "loss"):
        names = [trace["name"] for trace in plotted(page, panel) if trace["visible"]]
        assert "second" in names
    rests(page)
    assert state_of(kernel)["compare"] == ["second", "V"] and state_of(kernel)["align"] == "loss"
    page.get_by_role("button", name="stop comparing with second").click()
    page.get_by_role("button", name="stop comparing with second").wait_for(state="detached", timeout=20_000)
    assert [trace["name"] for trace in plotted(page) if trace["visible"]][-1] == "V"


def test_run_without_the_matrix_is_not_compared_and_said(page):
    page.get_by_label("compare with", exact=True).select_option("layers")
    page.wait_for_function("!document.querySelector('.scrub-message').hidden", timeout=20_000)
    assert "layers has no matrix W" in page.locator(".scrub-message").inner_text()
    assert page.get_by_role("button", name="stop comparing with layers").count() == 0


# Python and the page

def test_python_hears_the_state_and_sets_it(page, kernel, trained):
    drag(page, .4)
    page.get_by_label("view", exact=True).select_option("cumulative")
    page.get_by_label("values", exact=True).select_option("linear")
    page.get_by_label("other axis", exact=True).select_option("log")
    page.get_by_label("steps", exact=True).select_option("linear")
    page.get_by_label("metric of the spectrum", exact=True).select_option("spectral_norm")
    page.get_by_label("colour", exact=True).select_option("effective_rank")
    page.locator(".scrub-line-fit input").check()
    page.locator(".scrub-line-noise input").uncheck()
    page.get_by_label("fixed axes").uncheck()
    rests(page)
    state = state_of(kernel)
    assert state == {**OPENED, "step": shown_step(page), "view": "cumulative", "scale": "linear", "other_scale": "log", "step_scale": "linear", "metric": "spectral_norm", "color": "effective_rank", "fixed": False,
                     "lines": ["first", "previous", "law", "fit"]}
    put(page, kernel, **{**OPENED, "step": int(trained.spectra.steps[3]), "view": "density", "matrix": "V", "metric": "effective_rank", "speed": 30.})
    line = now(page)
    assert shown_step(page) == trained.spectra.steps[3] and len(line["x"]) == 82
    assert page.get_by_label("metric of the spectrum", exact=True).input_value() == "effective_rank" and page.get_by_label("checkpoints a second").input_value() == "30"
    assert page.locator(".scrub-line-noise input").is_checked() and not page.locator(".scrub-line-fit input").is_checked()


def test_copied_code_is_that_of_python_and_opens_the_same_view(page, kernel, runs):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("compare with", exact=True).select_option("second")
    page.get_by_label("values", exact=True).select_option("linear")
    page.get_by_label("checkpoints a second").select_option("5")
    page.get_by_label("fixed axes").uncheck()
    drag(page, .5)
    rests(page)
    page.get_by_label("copy code").click()
    page.wait_for_timeout(200)
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == kernel.run("print(dashboard.to_code())").strip()
    assert eval(code).state == state_of(kernel)


def test_tables_and_pictures_are_downloaded(page, kernel, runs, trained, tmp_path):
    put(page, kernel, step=int(trained.spectra.steps[8]))
    rows = list(csv.DictReader(downloaded(page, "save spectrum as CSV").path().read_text().splitlines()))
    values = [float(row["y"] or "nan") for row in rows if row["line"] == "now"]
    np.testing.assert_allclose(values, stored(trained, "W", shown_step(page))[:len(values)], rtol=1e-6)
    assert {row["line"] for row in rows} >= {"now", "first", "previous", LINES["noise"][0]}
    heat = list(csv.DictReader(downloaded(page, "save all singular values as CSV").path().read_text().splitlines()))
    assert [int(row["step"]) for row in heat] == trained.spectra.steps.tolist()
    np.testing.assert_allclose([float(row["s1"]) for row in heat], trained.spectra["W"][:, 0], rtol=1e-6)
    loss = list(csv.DictReader(downloaded(page, "save recorded metric as CSV").path().read_text().splitlines()))
    assert [int(row["step"]) for row in loss if row["line"] == "train/loss"] == trained.metrics[["step", "train/loss"]].dropna()["step"].tolist()
    grid = list(csv.DictReader(downloaded(page, "save all matrices as CSV").path().read_text().splitlines()))
    assert [row["matrix"] for row in grid] == trained.spectra.matrices
    picture = downloaded(page, "save spectrum as PNG")
    assert picture.suggested_filename == f"trained-W-spectrum-{shown_step(page)}.png" and picture.path().read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in downloaded(page, "save all singular values as SVG").path().read_bytes()[:300]


def test_scrubbing_works_while_the_kernel_is_busy(page, kernel, trained):
    kernel.start("import time; time.sleep(4)")
    page.wait_for_timeout(300)
    seen = set()
    for fraction in (.3, .8):
        drag(page, fraction)
        seen.add(shown_step(page))
        np.testing.assert_allclose(now(page)["y"], stored(trained, "W", shown_step(page))[:len(now(page)["y"])], rtol=1e-6)
    page.get_by_label("values", exact=True).select_option("linear")
    page.evaluate(FRAME)
    assert page.evaluate("document.querySelector('.scrub-spectrum')._fullLayout.yaxis.type") == "linear"
    assert page.locator(".jp-Notebook-ExecutionIndicator").get_attribute("data-status") == "busy" and len(seen) == 2
    at = shown_step(page)
    for _ in range(50):
        if state_of(kernel)["step"] == at: break  # as soon as it can hear
        page.wait_for_timeout(100)
    assert state_of(kernel)["step"] == at and state_of(kernel)["scale"] == "linear"


def test_errors_are_shown(page, kernel):
    kernel.run("""
from tformer_lab.dashboards import dashboard as _module
_kept = _module.matrix_data
def _broken(*_): raise ZeroDivisionError("nothing to divide by")
_module.matrix_data = _broken
""")
    try:
        page.get_by_label("matrix", exact=True).select_option("V")
        page.wait_for_function("document.querySelector('.scrub-message').innerText === 'ZeroDivisionError: nothing to divide by'", timeout=30_000)
    finally: kernel.run("_module.matrix_data = _kept")
    kernel.run("dashboard.matrix = 'W'")
    page.wait_for_function("document.querySelector('.scrub-message').hidden", timeout=30_000)
    kernel.run("_about = dashboard.about; dashboard.set_trait('about', {**_about, 'records': [1]})")  # what the page cannot draw
    page.wait_for_function("document.querySelector('.scrub-message').innerText.startsWith('The page could not do this')", timeout=30_000)
    kernel.run("dashboard.set_trait('about', _about)")
    page.wait_for_function("document.querySelector('.scrub-message').hidden", timeout=30_000)


# A run that is still training

def train_slowly(folder):
    """A training that takes some seconds."""
    from tformer_lab.tasks.recall import Recall
    from tformer_lab.training import fit as module
    losses = Recall.loss
    def slow(self, *arguments, **named):
        time.sleep(.05)
        return losses(self, *arguments, **named)
    Recall.loss = slow
    module.fit(Recall(length=8, vocab_size=20, d_model=40), runs_dir=folder, steps=120, batch_size=16, checkpoints=60, progress=False)


def test_training_in_another_process_is_followed_to_its_end(page, kernel, runs, processes, tmp_path_factory):
    process = processes.Process(target=train_slowly, args=(runs,))
    process.start()
    try:
        before, found = {"trained", "second", "layers"}, set()
        for _ in range(200):
            found = {path.parent.parent.name for path in runs.glob("*/spectra/*.safetensors") if not path.name.startswith(".")} - before
            if found: break
            time.sleep(.1)
        name, = found
        kernel.run(f"dashboard.run = {name!r}")
        page.wait_for_function("document.querySelector('.scrub-status').innerText === 'running'", timeout=30_000)
        page.get_by_label("follow", exact=True).check()
        page.locator(SLIDER).press("End")
        lengths, deadline = [], time.monotonic() + 60
        while time.monotonic() < deadline and page.locator(".scrub-status").inner_text() == "running":
            lengths.append(plotted(page, "heat")[0]["x"].size)
            page.wait_for_timeout(300)
        assert page.locator(".scrub-status").inner_text() == "done"
        process.join(20)
        run = Run(runs / name)
        rests(page)
        assert run.status == "done" and len(set(lengths)) >= 3 and lengths == sorted(lengths)
        assert plotted(page, "heat")[0]["x"].size == len(run.spectra) and shown_step(page) == run.spectra.steps[-1]  # it stayed at the end
        np.testing.assert_allclose(now(page)["y"], stored(run, run.spectra.matrices[0], shown_step(page))[:len(now(page)["y"])], rtol=1e-6)
        assert state_of(kernel)["step"] == run.spectra.steps[-1]
    finally:
        if process.is_alive(): process.terminate()
        process.join()


# How it looks

def fits(page):
    """Panels that are shown, each drawn and inside its column."""
    return page.evaluate("""() => Array.from(document.querySelectorAll('.scrub-panel')).filter((p) => getComputedStyle(p).display !== 'none').map((panel) => {
      const inner = panel.querySelector('.main-svg')?.getBoundingClientRect(), outer = panel.getBoundingClientRect(), root = document.querySelector('.scrub').getBoundingClientRect();
      return { name: panel.getAttribute('aria-label'), drawn: Boolean(inner && inner.width > 200 && inner.height > 80 && panel.querySelector('.scatterlayer path, .heatmaplayer image')),
               inside: Boolean(inner && inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && outer.right <= root.right + 1 && panel.scrollWidth <= panel.clientWidth + 1) };
    })""")


def choose_theme(page, theme):
    """Light or Dark, through the menu."""
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu").get_by_text("Theme", exact=True).hover()
    page.locator(".lm-Menu").get_by_text(f"JupyterLab {theme}", exact=True).click()
    page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(theme == 'Light').lower()}'", timeout=30_000)


STATES = {
    "opened": {},
    "density": {"view": "density", "lines": [*GHOSTS, *LAWS]},
    "cumulative": {"view": "cumulative", "other_scale": "log", "lines": ["noise", "law", "fit", "final"], "step_scale": "linear"},
    "compare": {"compare": ["second", "V"], "align": "fraction", "scale": "linear"},
    "layers": {"run": "layers", "matrix": "encoder.2.self_attn.v", "step": 120, "color": "effective_rank"},
    "failed": {"run": "second", "step": 160},
}


def test_every_state_is_drawn_inside_its_column_in_light_and_dark(page, kernel):
    folder = TOP / "artifacts"
    folder.mkdir(exist_ok=True)
    try:
        for theme in ("Light", "Dark"):
            choose_theme(page, theme)
            for width in (1400, 900):
                page.set_viewport_size({"width": width, "height": 1900 if width > 1000 else 2700})
                page.wait_for_timeout(400)
                for name, state in STATES.items():
                    put(page, kernel, **{**OPENED, **state})
                    page.wait_for_timeout(150)
                    page.locator(".scrub").screenshot(path=folder / f"{name}-{width}-{theme.lower()}.png")
                    for panel in fits(page): assert panel["drawn"] and panel["inside"], (name, width, theme, panel)
                    text, behind = page.evaluate("""() => [document.querySelector('.scrub-spectrum .xtick text'), document.querySelector('.scrub')].map((e) => {
                      for (let at = e; at; at = at.parentElement) { const c = e.tagName === 'text' ? getComputedStyle(e).fill : getComputedStyle(at).backgroundColor; if (!/^(transparent|rgba\\(0, 0, 0, 0\\))$/.test(c)) return c.match(/\\d+/g).slice(0, 3).map(Number); }
                    })""")
                    assert abs(np.mean(text) - np.mean(behind)) > 100, (name, theme, text, behind)
    finally:
        page.set_viewport_size({"width": 1400, "height": 1300})
        choose_theme(page, "Light")


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(page):
    nameless = page.evaluate("""() => Array.from(document.querySelectorAll('.scrub :is(input, select, button)')).filter((e) => e.offsetParent)
      .filter((e) => !(e.getAttribute('aria-label') || e.labels?.[0]?.innerText.trim() || e.innerText.trim()) || e.tabIndex < 0).map((e) => e.outerHTML)""")
    assert nameless == []
    page.get_by_label("search runs").focus()
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.labels?.[0]?.innerText || ''"))
    assert seen >= {"matrix", "view", "values", "other axis", "play", "checkpoint", "copy code that shows this view again"}, seen


# Voila

def test_voila_shows_the_same_dashboard(runs, chromium, errors, tmp_path_factory, trained):
    voila = Voila(tmp_path_factory.mktemp("voila"), runs, "explore.ipynb")
    try:
        page = watched(chromium.new_page(viewport={"width": 1400, "height": 1300}), errors)
        page.goto(voila.url)
        page.wait_for_selector(".scrub-spectrum .main-svg", timeout=90_000)
        page.locator(".scrub-runs").get_by_role("button", name="second", exact=True).click()
        page.wait_for_function("document.querySelector('.scrub-status').innerText.startsWith('failed')", timeout=30_000)
        page.locator(".scrub-runs").get_by_role("button", name="trained", exact=True).click()
        page.wait_for_function("document.querySelector('tr.scrub-chosen')?.dataset.run === 'trained' && !document.querySelector('.scrub-status').innerText.startsWith('failed')", timeout=30_000)
        page.get_by_label("matrix", exact=True).select_option("W")
        page.wait_for_function("document.querySelector('.scrub-caption').innerText.startsWith('W,')", timeout=30_000)
        for fraction in (.4, .9):
            drag(page, fraction)
            np.testing.assert_allclose(now(page)["y"], stored(trained, "W", shown_step(page))[:len(now(page)["y"])], rtol=1e-6)
        page.get_by_role("button", name="first checkpoint").click()
        page.get_by_role("button", name="play").click()
        page.wait_for_function(f"document.querySelector('.scrub-step').innerText === 'step {trained.spectra.steps[-1]}'", timeout=20_000)
        (TOP / "artifacts").mkdir(exist_ok=True)
        page.screenshot(path=TOP / "artifacts" / "voila.png")
        page.close()
    finally: voila.close()


# The exported page

@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """A page of the small training with a run and a matrix beside it."""
    dashboard = Dashboard(runs, run="trained", matrix="W", lines=[*GHOSTS, *LAWS], compare=["second", "V"])
    dashboard.step = max(set(Run(runs / "trained").checkpoints) & set(Run(runs / "trained").spectra.steps.tolist()))
    dashboard.figure()  # draws the shuffled values, which the page then has at this step, and at no other
    return dashboard.state, dashboard.to_html(tmp_path_factory.mktemp("page") / "page.html", matrices=["W", "V"])


@pytest.fixture
def alone(exported, chromium, errors):
    """The exported page without a network; any request that is for no file fails."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1300})
    asked = files_only(context)
    page = watched(context.new_page(), errors)
    page.goto(exported[1].as_uri())
    page.wait_for_selector(".scrub-spectrum .main-svg", timeout=20_000)
    page.evaluate(FRAME)
    yield page
    assert asked == [] and not errors
    context.close()


def test_exported_page_scrubs_and_changes_the_matrix_without_kernel_and_network(alone, exported, runs, trained):
    for matrix in ("W", "V", "W"):
        alone.get_by_label("matrix", exact=True).select_option(matrix)
        for fraction in (.3, .8):
            drag(alone, fraction)
            line = now(alone)
            np.testing.assert_allclose(line["y"], stored(trained, matrix, shown_step(alone))[:len(line["y"])], rtol=1e-6)
    at = click(alone, "heat", .75)
    steps = trained.spectra.steps
    assert shown_step(alone) == steps[np.argmin(abs(positions(steps) - at))]
    assert alone.locator(".scrub-table").is_hidden() and alone.locator(".scrub-message").is_hidden()
    rows = list(csv.DictReader(downloaded(alone, "save spectrum as CSV").path().read_text().splitlines()))
    assert {"now", "second", "V"} <= {row["line"] for row in rows}


def test_every_view_scale_and_line_of_the_exported_page_is_as_python_draws_it(alone, exported, runs):
    dashboard, kept = Dashboard(runs, **exported[0]), exported[0]["step"]
    same_lines(alone, dashboard.figure(), "as it opens")
    for view, scale, other in [(view, scale, other) for view in VIEWS for scale in SCALES for other in SCALES]:
        alone.get_by_label("view", exact=True).select_option(view)
        alone.get_by_label("values", exact=True).select_option(scale)
        alone.get_by_label("other axis", exact=True).select_option(other)
        dashboard.view, dashboard.scale, dashboard.other_scale = view, scale, other
        for step in (kept, int(Run(runs / "trained").spectra.steps[6])):
            dashboard.step, dashboard.lines = step, [*GHOSTS, *LAWS][:None if step == kept else -1]
            alone.evaluate("(step) => globalThis.dashboard.show(globalThis.dashboard.steps.indexOf(step))", step)
            same_lines(alone, dashboard.figure(), f"{view} {scale} {other} {step}")


def test_exported_page_of_another_kind_of_run_opens(chromium, errors, tmp_path):
    """One checkpoint; gaps, infinities and a matrix of zeros; no metrics; names that look like HTML."""
    evil, gaps = "<img src=x onerror=alert(1)>.0.W&</script>", growing((9, 12), 6, 0)
    gaps[3] = np.nan
    write_run(tmp_path / "one", {"W": growing((6, 8), 1, 0)}, {"W": (6, 8)}, [7], [3.])
    write_run(tmp_path / "gaps", {"W": gaps, "N": np.full((6, 5), np.nan), "Z": np.zeros((6, 4))}, {"W": (9, 12), "N": (5, 5), "Z": (4, 4)}, range(6), [3., np.nan, np.inf, 2., 1., 1.])
    write_run(tmp_path / "quiet", {evil: growing((5, 5), 3, 0), "V": growing((5, 5), 3, 1)}, {evil: (5, 5), "V": (5, 5)}, range(3))
    page = watched(chromium.new_page(viewport={"width": 1400, "height": 1300}), errors)
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: said.append("dialog"))
    for name in ("one", "gaps", "quiet"):
        dashboard = Dashboard(tmp_path / name, lines=[*GHOSTS, *LAWS], **({"compare": [evil], "matrix": "V"} if name == "quiet" else {}))
        page.goto(dashboard.to_html(tmp_path / f"{name}.html").as_uri())
        page.wait_for_selector(".scrub-spectrum .main-svg", timeout=20_000)
        for matrix in dashboard.about["matrices"]:
            page.get_by_label("matrix", exact=True).select_option(matrix)
            dashboard.matrix = matrix
            for view in VIEWS:
                for scale in SCALES:
                    page.get_by_label("view", exact=True).select_option(view)
                    page.get_by_label("values", exact=True).select_option(scale)
                    for key in ("Home", "End"): page.locator(SLIDER).press(key)
                    page.evaluate(FRAME)
            dashboard.view, dashboard.scale = view, scale
            line = now(page)
            wanted = next(trace for trace in dashboard.figure().data if trace.name == "now")
            np.testing.assert_allclose(line["x"], wanted.x, rtol=1e-5)
        assert page.locator(".scrub-message").is_hidden() and said == [], (name, said, page.locator(".scrub-message").inner_text())
        assert page.locator("img").count() == 0
    assert page.locator(".scrub-panel-loss").is_hidden()
    page.close()


# Times

def summary(times): return {"median_ms": round(float(np.median(times)), 1), "p95_ms": round(float(np.percentile(times, 95)), 1)}


def positions_of(steps, moves=50):
    """Positions of the slider, as if a hand went to and fro."""
    at, where = np.random.default_rng(0).integers(0, len(steps), 2 * moves), positions(steps)
    return [float(where[a]) for a, b in zip(at[1:], at) if a != b][:moves]


def test_time_from_slider_to_painted_pixels_is_printed(lab, chromium, errors, tmp_path, capsys):
    """On 24 matrices × 64 values × 500 and 5,000 checkpoints in JupyterLab, and frames a second of the exported page; the renderer is named."""
    import nbformat
    found = {}
    source = "import time; _t = time.perf_counter(); dashboard = Dashboard({path!r}); python_s = time.perf_counter() - _t; display(dashboard)"
    made = {}
    for checkpoints in (500, 5000):
        for layers in (.25, 6): made[checkpoints, int(4 * layers)] = timed_run(tmp_path / f"{checkpoints}-{layers}", layers, checkpoints)
    cells = ["from tformer_lab.dashboards.dashboard import Dashboard", *(source.format(path=str(run.path)) for run in made.values())]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), lab.folder / "nbs" / "times.ipynb")
    before = lab.kernels()
    page = watched(lab.open(chromium, "times.ipynb", height=1300, run=False), errors)
    kernel, = (Kernel(file) for file in lab.kernels() - before)
    cells = page.locator(".jp-CodeCell")
    cells.nth(0).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    kernel.run("Dashboard")
    for i, ((checkpoints, matrices), run) in enumerate(made.items(), 1):
        cells.nth(i).locator(".cm-content").click()
        page.evaluate("""() => { window.opened = new Promise((done) => addEventListener('keydown', (event) => {
          if (event.key !== 'Enter') return;
          const start = performance.now(), look = () => (document.querySelector('.scrub-spectrum .main-svg .point') ? requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))) : requestAnimationFrame(look));
          look();
        }, { capture: true })); }""")
        page.keyboard.press("Control+Enter")
        opened = page.evaluate("window.opened")
        page.wait_for_timeout(700)
        moves = positions_of(run.spectra.steps)
        page.evaluate(PAINTED, [moves[:8], ".scrub-spectrum"])
        times = page.evaluate(PAINTED, [moves, ".scrub-grid" if matrices > 1 else ".scrub-spectrum"])
        assert len(times) == len(moves) and min(times) > 0
        found[f"{checkpoints} checkpoints, {'1 matrix' if matrices == 1 else f'{matrices} matrices'}"] = {**summary(times), "moves": len(times), "open_s": round(opened / 1000, 2), "open_python_s": round(float(kernel.run("print(python_s)")), 2)}
        kernel.run("dashboard.close()")
        page.wait_for_function("!document.querySelector('.scrub')", timeout=20_000)
    kernel.close()
    page.close()
    page, run = watched(chromium.new_page(viewport={"width": 1400, "height": 1300}), errors), made[500, 24]
    page.goto(Dashboard(run).to_html(tmp_path / "page.html").as_uri())
    page.wait_for_selector(".scrub-spectrum .main-svg", timeout=20_000)
    page.wait_for_timeout(500)
    frames = page.evaluate(FRAMES, positions(run.spectra.steps).tolist())
    agent, gpu = page.evaluate("""() => { const gl = document.createElement('canvas').getContext('webgl'), info = gl?.getExtension('WEBGL_debug_renderer_info');
      return [navigator.userAgent, info ? gl.getParameter(info.UNMASKED_RENDERER_WEBGL) : 'none']; }""")
    page.close()
    renderer = f"{agent.split(') ')[-1]}, software rendering (GPU off; WebGL: {gpu})"
    with capsys.disabled(): print("\n" + json.dumps({"renderer": renderer, **found, "exported page": {"frames_per_s": round(frames, 1)}}))
    assert math.isfinite(frames) and frames > 0


def timed_run(path, layers, checkpoints):
    """A run of 4 × layers matrices of 64 × 128."""
    if layers >= 1: return layered_run(path, layers, 64, checkpoints)
    steps = np.arange(checkpoints) * np.arange(checkpoints) // 4 + np.arange(checkpoints)
    return write_run(path, {"W": growing((64, 128), checkpoints, 0)}, {"W": (64, 128)}, steps, 1.2 + 3 * np.exp(-6 * np.linspace(0, 1, checkpoints)))
