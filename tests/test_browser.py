"""The scrubber in JupyterLab, in a real browser: what a person would see and do."""
import json

import numpy as np
import pytest

# The values plotly was given, the values that its markers stand at, and how long the page takes from a moved slider to
# changed pixels, by its own clock.
PLOTTED = "() => Array.from(document.querySelector('.scrub-spectrum').data[2].y)"
DRAWN = """() => {
  const panel = document.querySelector('.scrub-spectrum'), { xaxis, yaxis } = panel._fullLayout;
  return Array.from(panel.querySelectorAll('.scatterlayer .trace:last-child .point')).map((marker) => {
    const [x, y] = marker.getAttribute('transform').match(/-?[\\d.]+/g).map(Number);
    return [Math.round(xaxis.p2d(x)), yaxis.p2d(y)];
  });
}"""
PAINTED = """async (stops) => {
  const slider = document.querySelector('.scrub-bar input'), panel = document.querySelector('.scrub-spectrum');
  const times = [];
  for (const stop of stops) {
    const start = performance.now();
    slider.value = stop;
    await new Promise((done) => {                                   // the drawn path has changed
      const observer = new MutationObserver(() => { observer.disconnect(); done(); });
      observer.observe(panel.querySelector('.scatterlayer'), { subtree: true, attributes: true, childList: true });
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


@pytest.fixture(scope="module")
def explore(lab, chromium):
    """`explore.ipynb`, run; an error in the page fails the module."""
    errors = []
    page = lab.open(chromium, "explore.ipynb")
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.wait_for_selector(".scrub-spectrum .main-svg", timeout=60_000)
    page.locator(".scrub").scroll_into_view_if_needed()
    yield page
    page.close()
    assert not errors


@pytest.fixture
def page(explore):
    """The scrubber as it opens: the first matrix, a logarithmic scale, the last checkpoint."""
    explore.get_by_label("matrix").select_option("W")
    explore.get_by_label("scale").select_option("log")
    explore.wait_for_function("document.querySelector('.scrub-spectrum').layout.title.text.startsWith('W')", timeout=20_000)
    explore.locator(".scrub-bar input").focus()
    explore.keyboard.press("End")
    explore.wait_for_timeout(400)
    return explore


def expected(run, matrix, step, ranks):
    """What a logarithmic axis should show: the stored values, without those that are zero to float32's precision."""
    s = run.spectra_at(step).spectra[matrix].values.astype(np.float32)
    return np.where(s > len(s) * np.finfo(np.float32).eps * s[0], s, np.nan)[:ranks]


def plotted(page):
    page.wait_for_timeout(250)
    return np.array([np.nan if value is None else value for value in page.evaluate(PLOTTED)], dtype=float)


def shown_step(page):
    return int(page.locator(".scrub-step").inner_text().removeprefix("step ").replace(",", ""))


def drag(page, fraction):
    """Drag the slider's handle to a fraction of its length, as a hand would."""
    box = page.locator(".scrub-bar input").bounding_box()
    value, last = (float(page.locator(".scrub-bar input").evaluate(f"e => e.{name}")) for name in ("value", "max"))
    y, inner = box["y"] + box["height"] / 2, box["width"] - 16  # the handle is 16 pixels wide
    page.mouse.move(box["x"] + 8 + inner * value / last, y)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + inner * fraction, y, steps=12)
    page.mouse.up()


def test_dragging_the_slider_plots_the_stored_values(page, small_run):
    seen = set()
    for fraction in (.55, .2, .8, 1.):
        drag(page, fraction)
        values = plotted(page)
        step = shown_step(page)
        seen.add(step)
        np.testing.assert_allclose(values, expected(small_run, "W", step, len(values)), rtol=1e-6)
        rank, drawn = np.array(page.evaluate(DRAWN)).T
        np.testing.assert_array_equal(rank, 1 + np.flatnonzero(~np.isnan(values)))
        np.testing.assert_allclose(drawn, values[~np.isnan(values)], rtol=3e-3)  # pixels are written with two decimals
    assert len(seen) == 4 and seen <= set(small_run.spectra.steps.tolist())


def test_keys_move_by_one_checkpoint_and_reach_both_ends(page, small_run):
    steps = small_run.spectra.steps.tolist()
    page.locator(".scrub-bar input").focus()
    for key, step in (("Home", steps[0]), ("ArrowRight", steps[1]), ("ArrowRight", steps[2]), ("ArrowLeft", steps[1]), ("End", steps[-1])):
        page.keyboard.press(key)
        plotted(page)
        assert shown_step(page) == step


def test_another_matrix_and_a_linear_scale_show_their_values_at_the_same_step(page, small_run):
    drag(page, .6)
    page.wait_for_timeout(400)
    step = shown_step(page)
    page.get_by_label("matrix").select_option("V")
    page.wait_for_function("document.querySelector('.scrub-spectrum').layout.title.text.startsWith('V')", timeout=20_000)
    values = plotted(page)
    assert shown_step(page) == step
    np.testing.assert_allclose(values, expected(small_run, "V", step, len(values)), rtol=1e-6)
    page.get_by_label("scale").select_option("linear")
    values = plotted(page)
    np.testing.assert_allclose(values, small_run.spectra_at(step).spectra["V"].values[:len(values)], rtol=1e-6, atol=1e-9)
    assert page.evaluate("document.querySelector('.scrub-spectrum')._fullLayout.yaxis.type") == "linear"


def test_clicking_the_heat_map_moves_every_cursor_there(page, small_run):
    box = page.locator(".scrub-heat .plotly .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + .5 * box["width"], box["y"] + 20)
    page.wait_for_timeout(300)
    page.mouse.click(box["x"] + .5 * box["width"], box["y"] + 20)
    plotted(page)
    step = shown_step(page)
    low, high = page.evaluate("document.querySelector('.scrub-heat')._fullLayout.xaxis.range")
    clicked = low + .5 * (high - low)
    steps = small_run.spectra.steps
    assert step == steps[np.argmin(abs(np.log10(1 + steps) - clicked))]
    cursors = page.evaluate("Array.from(document.querySelectorAll('.scrub-cursor')).map((c) => c.getBoundingClientRect().x)")
    assert len(cursors) == 2 and abs(cursors[0] - cursors[1]) < 1
    assert abs(cursors[0] - (box["x"] + box["width"] * (np.log10(1 + step) - low) / (high - low))) < 3


def test_play_runs_to_the_last_checkpoint_and_stops(page, small_run):
    page.locator(".scrub-bar input").focus()
    page.keyboard.press("Home")
    page.get_by_role("button", name="play").click()
    page.wait_for_function(f"document.querySelector('.scrub-step').innerText === 'step {small_run.spectra.steps[-1]}'", timeout=20_000)
    page.get_by_role("button", name="play").wait_for(timeout=5_000)
    assert shown_step(page) == small_run.spectra.steps[-1]


def test_python_hears_where_the_slider_rests(page, small_run):
    page.locator(".scrub-bar input").focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(600)
    cell = page.locator(".jp-CodeCell", has_text="scrubber.run, scrubber.matrix, scrubber.step")
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    page.wait_for_timeout(1500)
    assert cell.locator(".jp-OutputArea-output").inner_text().strip().endswith(f"'W', {small_run.spectra.steps[0]})")


def test_scrubbing_works_while_the_kernel_is_busy(page, small_run):
    page.locator(".jp-CodeCell").last.click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.type("import time; time.sleep(8)")
    page.keyboard.press("Control+Enter")
    page.wait_for_timeout(500)
    drag(page, .3)
    values = plotted(page)
    assert page.locator(".jp-Notebook-ExecutionIndicator").get_attribute("data-status") == "busy"
    np.testing.assert_allclose(values, expected(small_run, "W", shown_step(page), len(values)), rtol=1e-6)


def test_time_from_slider_to_painted_pixels_is_printed(page, small_run, capsys):
    count = len(small_run.spectra.steps)
    stops = [int(i) for i in np.random.default_rng(0).permutation(np.arange(count * 10) % count)]
    stops = [a for a, b in zip(stops[1:], stops) if a != b]
    page.evaluate(PAINTED, stops[:10])
    times = np.array(page.evaluate(PAINTED, stops))
    renderer = page.evaluate("navigator.userAgent")
    with capsys.disabled():
        print("\n" + json.dumps({"moves": len(times), "median_ms": round(float(np.median(times)), 1),
                                 "p95_ms": round(float(np.percentile(times, 95)), 1), "browser": renderer.split(") ")[-1]}))
    assert len(times) == len(stops) and (times > 0).all()
