// Draws a run's panels with plotly.js and scrubs through its checkpoints, all in the page.
// Python sends the panels once, and the singular values of all checkpoints as one buffer.
// `Plotly` is global: plotly.min.js stands before this text in the same module.

const EPSILON = 2 ** -23;      // float32's: a value below rank * EPSILON * largest is zero to its precision
const SYNC_MS = 120;           // how long the slider rests before Python hears of it

const CONFIG = { displayModeBar: false, responsive: false };
// Moves points without laying out the axes again: half the time of a restyle.
const AT_ONCE = { mode: "immediate", frame: { duration: 0, redraw: false }, transition: { duration: 0 } };

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function labelled(text, control) {
  return element("label", { class: "scrub-field" }, element("span", {}, text), control);
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => element("option", { value }, value)));
  select.value = chosen;
}

/** The singular values of one checkpoint, as they are drawn. */
function spectrumAt(view, index, log) {
  const s = Array.from(view.values.subarray(index * view.rank, (index + 1) * view.rank));
  const zero = log ? view.full_rank * EPSILON * s[0] : -1;
  return s.map((value) => (value > zero ? value : NaN));
}

function nearest(positions, x) {
  let best = 0;
  positions.forEach((p, i) => { if (Math.abs(p - x) < Math.abs(positions[best] - x)) best = i; });
  return best;
}

/** A vertical line over a panel that moves without the panel being drawn again. */
class Cursor {
  constructor(panel) {
    this.panel = panel;
    this.line = element("div", { class: "scrub-cursor" });
    panel.append(this.line);
    panel.on("plotly_afterplot", () => this.move(this.x));
  }
  move(x) {
    this.x = x;
    const { xaxis, yaxis } = this.panel._fullLayout;
    const at = xaxis.d2p(x);
    this.line.style.display = at >= -1 && at <= xaxis._length + 1 ? "block" : "none";
    this.line.style.transform = `translateX(${xaxis._offset + at}px)`;
    this.line.style.top = `${yaxis._offset}px`;
    this.line.style.height = `${yaxis._length}px`;
  }
}

class Scrubber {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.index = 0;
    this.build();
    this.listen();
    this.showView();
  }

  build() {
    this.run = element("select");
    this.matrix = element("select");
    this.scale = element("select", {}, element("option", { value: "log" }, "logarithmic"), element("option", { value: "linear" }, "linear"));
    this.play = element("button", { type: "button", class: "scrub-play", "aria-label": "play" }, "▶");
    this.slider = element("input", { type: "range", min: 0, step: 1, "aria-label": "checkpoint" });
    this.label = element("output", { class: "scrub-step" });
    this.message = element("div", { class: "scrub-message", role: "status" });
    this.panels = Object.fromEntries(["spectrum", "loss", "heat"].map((name) => [name, element("div", { class: `scrub-${name}` })]));
    this.body = element("div", { class: "scrub-panels" }, this.panels.spectrum, element("div", { class: "scrub-history" }, this.panels.loss, this.panels.heat));
    this.bar = element("div", { class: "scrub-bar" }, this.play, this.slider, this.label);
    this.root.classList.add("scrub");
    this.root.append(element("div", { class: "scrub-choice" }, labelled("run", this.run), labelled("matrix", this.matrix), labelled("scale", this.scale)),
      this.message, this.bar, this.body);
    // else JupyterLab takes the arrow keys from them, and folds cells
    for (const control of this.root.querySelectorAll("select, button, input")) control.dataset.lmSuppressShortcuts = "true";
  }

  listen() {
    this.run.onchange = () => this.choose("run", this.run.value);
    this.matrix.onchange = () => this.choose("matrix", this.matrix.value);
    this.scale.onchange = () => this.send("log", this.scale.value === "log");
    this.slider.oninput = () => this.show(+this.slider.value);
    this.play.onclick = () => (this.timer ? this.pause() : this.start());
    this.off = Object.entries({
      "change:view": () => this.showView(), "change:message": () => this.showMessage(),
      "change:run": () => this.showChoice(), "change:matrix": () => this.showChoice(), "change:matrices": () => this.showChoice(),
      "change:log": () => this.showScale(), "change:step": () => this.followStep(),
    }).map(([event, act]) => { this.model.on(event, act); return () => this.model.off(event, act); });
    this.resized = new ResizeObserver(() => this.body.hidden || Object.values(this.panels).forEach((p) => p.data && Plotly.Plots.resize(p)));
    this.resized.observe(this.root);
  }

  send(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  /** Another run or matrix: where the slider rested no longer matters. */
  choose(name, value) {
    this.pause();
    this.forget();
    this.send(name, value);
  }

  forget() {
    clearTimeout(this.late);
    cancelAnimationFrame(this.frame);
    this.frame = this.again = null;
  }

  showChoice() {
    fill(this.run, this.model.get("runs"), this.model.get("run"));
    fill(this.matrix, this.model.get("matrices"), this.model.get("matrix"));
    this.matrix.disabled = !this.model.get("matrices").length;
  }

  showMessage() {
    this.message.textContent = this.model.get("message");
    this.message.hidden = !this.message.textContent;
  }

  /** A run or matrix was chosen: draw its panels anew. */
  showView() {
    this.showMessage();
    const sent = this.model.get("view");
    const usable = Boolean(sent && sent.steps && sent.steps.length);
    this.bar.hidden = this.body.hidden = !usable;
    this.showChoice();
    this.forget();
    if (!usable) return this.pause();
    const bytes = sent.values;
    this.view = { ...sent, values: new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)) };
    this.slider.max = sent.steps.length - 1;
    this.index = Math.max(0, sent.steps.indexOf(this.model.get("step")));
    this.drawPanels();
  }

  drawPanels() {
    const color = getComputedStyle(this.root).color;
    for (const [name, panel] of Object.entries(this.panels)) {
      const { data, layout } = this.view[name];
      Plotly.newPlot(panel, data, { ...layout, font: { ...layout.font, color }, autosize: true }, CONFIG);
    }
    this.cursors?.forEach((cursor) => cursor.line.remove());
    this.cursors = [this.panels.loss, this.panels.heat].map((panel) => new Cursor(panel));
    for (const panel of [this.panels.loss, this.panels.heat]) {
      panel.on("plotly_click", (event) => this.show(nearest(this.view.positions, event.points[0].x)));
    }
    this.showScale();
  }

  showScale() {
    this.scale.value = this.model.get("log") ? "log" : "linear";
    if (!this.view) return;
    const { spectrum } = this.panels;
    Plotly.update(spectrum, { y: this.shown() }, { yaxis: { ...spectrum.layout.yaxis, ...this.view.scales[this.scale.value] } }, [0, 1, 2]);
    this.moveCursors();
  }

  /** First, previous, and now. */
  shown() {
    const log = this.scale.value === "log";
    return [0, Math.max(this.index - 1, 0), this.index].map((i) => spectrumAt(this.view, i, log));
  }

  /** Move to a checkpoint: at once, and when asked again within one frame, once more at its end. */
  show(index) {
    this.index = Math.min(Math.max(index, 0), this.view.steps.length - 1);
    if (this.frame) this.again = true;
    else {
      this.draw();
      this.frame = requestAnimationFrame(() => {
        this.frame = null;
        if (this.again) this.draw();
        this.again = false;
      });
    }
    clearTimeout(this.late);
    this.late = setTimeout(() => this.send("step", this.view.steps[this.index]), SYNC_MS);
  }

  draw() {
    Plotly.animate(this.panels.spectrum, { data: this.shown().slice(1).map((y) => ({ y })), traces: [1, 2] }, AT_ONCE);
    this.moveCursors();
  }

  moveCursors() {
    this.cursors.forEach((cursor) => cursor.move(this.view.positions[this.index]));
    this.slider.value = this.index;
    this.label.textContent = `step ${this.view.steps[this.index].toLocaleString("en")}`;
  }

  followStep() {
    const index = this.view ? this.view.steps.indexOf(this.model.get("step")) : -1;
    if (index >= 0 && index !== this.index) { this.index = index; this.draw(); }
  }

  start() {
    if (this.index === this.view.steps.length - 1) this.show(0);
    const advance = () => (this.index < this.view.steps.length - 1 ? this.show(this.index + 1) : this.pause());
    this.timer = setInterval(advance, 1000 / this.model.get("speed"));
    this.play.textContent = "❚❚";
    this.play.setAttribute("aria-label", "pause");
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "▶";
    this.play.setAttribute("aria-label", "play");
  }

  close() {
    this.pause();
    this.forget();
    this.resized.disconnect();
    this.off.forEach((stop) => stop());
    Object.values(this.panels).forEach((panel) => Plotly.purge(panel));
  }
}

export default {
  render({ model, el }) {
    const scrubber = new Scrubber(model, el);
    return () => scrubber.close();
  },
};
