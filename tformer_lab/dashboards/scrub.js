// Draws a run's panels with plotly.js and scrubs through its checkpoints, all in the page: in a notebook, and in an exported file.
// Python sends figures once, and the numbers of all checkpoints as buffers; see nbs/dashboards/views.ipynb and panels.ipynb, which
// define every line that is computed here. plotly.min.js, whose `Plotly` is global, and page.js stand before this text in the same module.

const EPSILON = 2 ** -23;       // float32's: a value below rank * EPSILON * largest is zero to its precision
const TINY = 1e-9;              // where a band that reaches zero ends on a logarithmic axis
const FIT_POINTS = 33;
const REST_MS = 120;            // how long the slider rests before Python hears of it
const POLL_MS = 1500;           // between two looks at a run that is still training
const MANY_CELLS = 60;          // above this, the small multiples are drawn when the slider rests
const CONFIG = { displayModeBar: false, responsive: false, doubleClick: "reset" };
// Moves points without laying out the axes again: half the time of a restyle.
const AT_ONCE = { mode: "immediate", frame: { duration: 0, redraw: false }, transition: { duration: 0 } };

const PANELS = { spectrum: "Spectrum", heat: "All singular values", trajectories: "Leading singular values", loss: "Recorded metric", metric: "Metric of the spectrum", grid: "All matrices" };
const CHOICES = {
  view: ["view", { rank: "by rank", density: "density", cumulative: "cumulative" }],
  scale: ["values", { log: "logarithmic", linear: "linear" }],
  other_scale: ["other axis", { linear: "linear", log: "logarithmic" }],
  step_scale: ["steps", { auto: "as they were recorded", log: "logarithmic", linear: "linear" }],
};
const LINES = {
  first: ["first", "the first checkpoint"], previous: ["previous", "the checkpoint before"], final: ["final", "the last checkpoint"],
  noise: ["noise, 95%", "where the values of Gaussian matrices of the same shape and variance lie: from the smallest to the largest of 39 draws"],
  law: ["Marchenko–Pastur", "the limit law of a matrix of noise of this shape and variance, from edge to edge"],
  fit: ["power law", "fitted to the largest eigenvalues s², drawn from its threshold on"],
  shuffled: ["shuffled, 95%", "where the values lie when the matrix's own entries are shuffled; computed when asked for, at steps whose weights were kept"],
};

/** Text as Python's repr gives it. */
function quoted(text) {
  const mark = text.includes("'") && !text.includes('"') ? '"' : "'";
  return mark + JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(mark, `\\${mark}`) + mark;
}

function nearest(positions, x) {
  let best = 0;
  positions.forEach((p, i) => { if (Math.abs(p - x) < Math.abs(positions[best] - x)) best = i; });
  return best;
}

/** A histogram as one line, from the axis up and back. */
function outlineX(edges) { return Array.from({ length: 2 * edges.length }, (_, i) => edges[i >> 1]); }
function outlineY(heights, floor = 0) {
  const n = heights.length;
  return Array.from({ length: 2 * n + 2 }, (_, i) => (i === 0 || i === 2 * n + 1 ? floor : Math.max(heights[(i - 1) >> 1], floor)));
}

/** The numbers of one matrix: what its lines are computed from. */
class Matrix {
  constructor(sent) {
    Object.assign(this, sent);
    this.values = floats(sent.values);
    this.places = whole(sent.places);
    this.drawn = this.places.length;
    this.hist = {};
    for (const [scale, { edges, heights }] of Object.entries(sent.histograms)) this.hist[scale] = { edges: Array.from(floats(edges)), heights: floats(heights) };
    this.rows_of_metrics = floats(sent.metric_values);
    this.length = this.rows_of_metrics.length / Math.max(sent.metrics.length, 1);
    if (sent.noise) {
      this.spread = floats(sent.spread);
      this.null = Object.fromEntries(Object.entries(sent.noise).map(([name, buffer]) => [name, floats(buffer)]));
      this.tail = Object.fromEntries(Object.entries(sent.tails).map(([name, buffer]) => [name, floats(buffer)]));
      this.kept = Array.from(whole(sent.kept));
    }
    if (sent.at) {
      this.at = Object.fromEntries(Object.entries(sent.at).map(([name, buffer]) => [name, whole(buffer)]));
      this.steps = Array.from(whole(sent.steps));
      this.recorded = Object.fromEntries(Object.entries(sent.records).map(([name, r]) => [name, { steps: Array.from(whole(r.steps)), values: Array.from(floats(r.values)) }]));
    }
    this.ranks = Array.from(this.places, (p) => p + 1);
    this.shares = this.ranks.map((k) => k / this.rank);
  }

  row(index, log) {
    const s = Array.from(this.values.subarray(index * this.drawn, (index + 1) * this.drawn));
    const zero = log ? Math.fround(this.rank * EPSILON) * s[0] : -1;
    return s.map((value) => (value > zero ? value : NaN));
  }

  metric(name) {
    const at = this.metrics.indexOf(name);
    return at < 0 ? null : this.rows_of_metrics.subarray(at * this.length, (at + 1) * this.length);
  }

  /** The singular values at a checkpoint. `bins`: of the matrix that the panel belongs to. */
  line(index, view, scale) {
    const { edges, heights } = this.hist[scale];
    const bins = edges.length - 1;
    if (view === "density") return { x: outlineX(edges), y: outlineY(heights.subarray(index * bins, (index + 1) * bins)) };
    const s = this.row(index, scale === "log");
    return view === "rank" ? { x: this.ranks, y: s } : { x: s, y: this.shares };
  }

  law(index, view, scale) {
    const c = this.spread[index], q = Array.from(this.null.quantiles, (v) => c * v);
    if (view === "rank") return { x: this.ranks.slice(0, q.length), y: q };
    if (view === "cumulative") return { x: q, y: this.shares.slice(0, q.length) };
    return { x: Array.from(this.null.grid, (u) => c * u), y: Array.from(this.null.density, (f, i) => f * (scale === "log" ? this.null.grid[i] * Math.LN10 : 1 / c)) };
  }

  /** The upper end of the law. */
  edge(index, view, scale) {
    const { grid, density } = this.null;
    if (!grid.length) return { x: [], y: [] };
    const c = this.spread[index], end = c * grid[grid.length - 1], most = density.reduce((top, f, i) => Math.max(top, f * (scale === "log" ? grid[i] * Math.LN10 : 1 / c)), 0);
    if (view === "rank") return { x: [1, this.ranks[this.drawn - 1]], y: [end, end] };
    return { x: [end, end], y: view === "cumulative" ? [0.5 / this.rank, 1] : [most / 1000, most] };
  }

  fit(index, view, scale) {
    const [alpha, xmin, m] = ["alpha", "xmin", "n_tail"].map((name) => this.tail[name][index]);
    const k = Array.from({ length: FIT_POINTS }, (_, i) => (m > 0 ? m ** (i / (FIT_POINTS - 1)) : NaN));
    const s = k.map((v) => Math.sqrt(xmin) * (v / m) ** (-0.5 / (alpha - 1)));
    if (view === "rank") return { x: k, y: s };
    if (view === "cumulative") return { x: s, y: k.map((v) => v / this.rank) };
    return { x: s, y: k.map((v, i) => v / this.rank * 2 * (alpha - 1) * (scale === "log" ? Math.LN10 : 1 / s[i])) };
  }

  /** Where the draws of a null lie, times a factor: along the lower limit and back along the upper. */
  band({ draws, low, high }, factor, view, scale) {
    if (view === "density") {
      const [least, most] = this.densities(draws, factor, scale), x = outlineX(this.hist[scale].edges);
      return { x: [...x, ...x.slice().reverse()], y: [...outlineY(least, TINY), ...outlineY(most, TINY).reverse()] };
    }
    const along = view === "rank" ? this.ranks : this.shares;
    const there = [...along, ...along.slice().reverse()];
    const across = [...Array.from(low, (v) => factor * v), ...Array.from(high, (v) => factor * v).reverse()];
    return view === "rank" ? { x: there, y: across } : { x: across, y: there };
  }

  densities(draws, factor, scale) {
    const edges = this.hist[scale].edges, bins = edges.length - 1, by = scale === "log" ? Math.log10 : (v) => v;
    const start = by(edges[0]), width = (by(edges[bins]) - start) / bins, unit = 1 / (this.rank * width);
    const least = new Array(bins).fill(Infinity), most = new Array(bins).fill(0);
    for (let d = 0; d < draws.length; d += this.rank) {
      const counts = new Array(bins).fill(0);
      for (let i = d; i < d + this.rank; i++) {
        const place = Math.floor((by(factor * draws[i]) - start) / width);
        if (place >= 0 && place < bins) counts[place]++;
      }
      counts.forEach((n, i) => { least[i] = Math.min(least[i], n * unit); most[i] = Math.max(most[i], n * unit); });
    }
    return [least, most];
  }
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

class Dashboard {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.index = 0;
    this.build();
    this.listen();
    this.guard(() => { this.showTable(); this.showAll(); });
  }

  get(name) { return this.model.get(name); }

  /** Run something; what goes wrong is shown, and not only logged. */
  guard(act) {
    try { return act(); } catch (error) {
      console.error(error);
      this.say(`The page could not do this: ${error.message}`);
    }
    return undefined;
  }

  on(control, event, act) { control.addEventListener(event, (e) => this.guard(() => act(e))); }

  // ---- what is there -------------------------------------------------------------------------------------------

  build() {
    const button = (text, label) => element("button", { type: "button", class: "scrub-button", "aria-label": label, title: label }, text);
    this.root.classList.add("scrub");
    this.search = element("input", { type: "search", placeholder: "search runs", "aria-label": "search runs" });
    this.runs = element("table", { class: "scrub-runs" });
    this.anew = button("look again", "look for new runs");
    this.table = element("details", { class: "scrub-table", open: "" }, element("summary", {}, "Runs"), this.search, this.anew, element("div", { class: "scrub-rows" }, this.runs));
    this.selects = { matrix: element("select"), record: element("select", { "aria-label": "recorded metric" }), metric: element("select", { "aria-label": "metric of the spectrum" }), color: element("select"), align: element("select") };
    for (const name of Object.keys(CHOICES)) this.selects[name] = element("select");
    for (const [name, [, options]] of Object.entries(CHOICES)) fill(this.selects[name], options, "");
    fill(this.selects.align, { step: "step", fraction: "fraction of training", loss: "loss reached" }, "step");
    this.boxes = Object.fromEntries(Object.keys(LINES).map((name) => [name, element("input", { type: "checkbox" })]));
    this.fixed = element("input", { type: "checkbox" });
    this.live = element("input", { type: "checkbox" });
    this.status = element("span", { class: "scrub-status", role: "status" });
    this.compare = element("select", { "aria-label": "compare with" });
    this.compared = element("span", { class: "scrub-compared" });
    this.first = button("|◀", "first checkpoint");
    this.play = button("▶", "play");
    this.last = button("▶|", "last checkpoint");
    this.speed = element("select", { "aria-label": "checkpoints a second" });
    this.slider = element("input", { type: "range", step: "any", "aria-label": "checkpoint" });
    this.label = element("output", { class: "scrub-step" });
    this.jump = element("input", { type: "number", step: "any", class: "scrub-jump", placeholder: "loss", "aria-label": "jump to the first checkpoint with at most this loss" });
    this.caption = element("div", { class: "scrub-caption" });
    this.message = element("div", { class: "scrub-message", role: "alert" });
    this.code = button("copy code", "copy code that shows this view again");
    const choose = (name) => labelled(CHOICES[name][0], this.selects[name]);
    const lines = element("span", { class: "scrub-lines", role: "group", "aria-label": "lines" }, 
      element("span", { class: "scrub-line scrub-line-now" }, element("i"), "now"),
      ...Object.entries(LINES).map(([name, [text, title]]) => element("label", { class: `scrub-line scrub-line-${name}`, title }, this.boxes[name], element("i"), text)));
    this.liveField = labelled("follow", this.live);
    this.compareField = element("span", { class: "scrub-field" }, element("span", {}, "compare with"), this.compare, this.compared, labelled("by", this.selects.align));
    this.choice = element("div", { class: "scrub-choice" }, labelled("matrix", this.selects.matrix), choose("view"), choose("scale"), choose("other_scale"), choose("step_scale"),
      labelled("fixed axes", this.fixed), this.compareField, this.liveField, this.status, this.code);
    this.bar = element("div", { class: "scrub-bar" }, this.first, this.play, this.last, this.slider, this.label, labelled("speed", this.speed), labelled("to loss", this.jump));
    this.panels = {};
    this.heads = {};
    this.body = element("div", { class: "scrub-panels" });
    for (const [name, title] of Object.entries(PANELS)) this.body.append(this.panel(name, title));
    this.heads.loss.prepend(this.selects.record);
    this.heads.metric.prepend(this.selects.metric);
    this.heads.grid.prepend(labelled("colour", this.selects.color));
    this.lines = lines;
    this.root.append(this.table, this.message, this.choice, this.bar, lines, this.caption, this.body);
    // else JupyterLab takes the arrow keys from them, and folds cells
    for (const control of this.root.querySelectorAll("select, button, input, summary")) control.dataset.lmSuppressShortcuts = "true";
  }

  panel(name, title) {
    const save = (format) => {
      const made = element("button", { type: "button", class: "scrub-save", "aria-label": `save ${title.toLowerCase()} as ${format.toUpperCase()}` }, format.toUpperCase());
      this.on(made, "click", () => (format === "csv" ? this.saveTable(name) : this.savePicture(name, format)));
      return made;
    };
    this.panels[name] = element("div", { class: `scrub-${name}` });
    this.heads[name] = element("span", { class: "scrub-note" });
    return element("section", { class: `scrub-panel scrub-panel-${name}`, "aria-label": title },
      element("header", {}, element("h4", {}, title), this.heads[name], element("span", { class: "scrub-saves" }, ...["csv", "png", "svg"].map(save))), this.panels[name]);
  }

  listen() {
    for (const name of ["matrix", ...Object.keys(CHOICES), "record", "metric", "color", "align"]) this.on(this.selects[name], "change", () => this.choose(name, this.selects[name].value));
    for (const [name, box] of Object.entries(this.boxes)) this.on(box, "change", () => this.toggle(name, box.checked));
    this.on(this.fixed, "change", () => this.choose("fixed", this.fixed.checked));
    this.on(this.live, "change", () => this.choose("live", this.live.checked));
    this.on(this.compare, "change", () => this.addOther(this.compare.value));
    // Its values are positions on the axis of the steps, linear or logarithmic as that is; it stops at checkpoints only.
    this.on(this.slider, "input", () => this.show(nearest(this.positions, +this.slider.value)));
    this.on(this.slider, "keydown", (event) => this.press(event));
    this.on(this.first, "click", () => this.show(0));
    this.on(this.last, "click", () => this.show(this.steps.length - 1));
    this.on(this.play, "click", () => (this.timer ? this.pause() : this.start()));
    this.on(this.speed, "change", () => { this.send("speed", +this.speed.value); if (this.timer) { this.pause(); this.start(); } });
    this.on(this.jump, "keydown", (event) => { if (event.key === "Enter") { event.stopPropagation(); this.jumpToLoss(this.jump.value); } });
    this.on(this.search, "input", () => this.showTable());
    this.on(this.anew, "click", () => this.model.send({ do: "list" }));
    this.on(this.code, "click", () => this.copyCode());
    const react = {
      table: () => this.showTable(), about: () => this.showAll(), shown: () => this.showMatrix(), grid: () => this.showGrid(), shuffled: () => this.showShuffled(), message: () => this.say(this.get("message")),
      step: () => this.followStep(), polled: () => this.pollLater(), run: () => this.markRun(),
      fixed: () => this.drawSpectrum(), lines: () => this.showLines(), live: () => this.showStatus(), align: () => this.drawAll(), speed: () => this.showControls(),
      view: () => this.drawSpectrum(), scale: () => this.drawAll(), other_scale: () => this.drawSpectrum(), step_scale: () => this.drawAll(), record: () => this.drawLoss(), metric: () => this.drawMetric(),
    };
    this.off = Object.entries(react).map(([name, act]) => {
      const event = `change:${name}`, handle = () => this.guard(() => { this.showControls(); act(); });
      this.model.on(event, handle);
      return () => this.model.off(event, handle);
    });
    for (const name of ["heat", "trajectories", "loss", "metric"]) this.on(this.panels[name], "click", (event) => this.goTo(this.panels[name], event));
    this.resized = new ResizeObserver(() => this.body.hidden || Object.values(this.panels).forEach((p) => p.data && p.offsetParent && Plotly.Plots.resize(p)));  // plotly refuses hidden ones
    this.resized.observe(this.body);
  }

  // ---- state, on both sides -------------------------------------------------------------------------------------

  send(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  choose(name, value) {
    if (name === "run" || name === "matrix") { this.pause(); this.forget(); this.sendStep(); }
    this.send(name, value);
  }

  toggle(name, on) {
    const lines = this.get("lines").filter((other) => other !== name);
    this.choose("lines", on ? [...lines, name] : lines);
  }

  addOther(name) {
    if (name) this.choose("compare", [...this.get("compare"), name]);
    this.compare.value = "";
  }

  forget() {
    clearTimeout(this.late);
    cancelAnimationFrame(this.frame);
    this.frame = this.again = null;
  }

  sendStep() { if (this.steps?.length && this.get("step") !== this.steps[this.index]) this.send("step", this.steps[this.index]); }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
  }

  showControls() {
    for (const name of [...Object.keys(CHOICES), "align"]) this.selects[name].value = this.get(name);
    for (const name of ["matrix", "record", "metric", "color"]) if (this.get(name)) this.selects[name].value = this.get(name);
    for (const [name, box] of Object.entries(this.boxes)) box.checked = this.get("lines").includes(name);
    this.fixed.checked = this.get("fixed");
    this.live.checked = this.get("live");
    const speeds = [...new Set([2, 5, 12, 30, 60, this.get("speed")])].sort((a, b) => a - b);
    fill(this.speed, Object.fromEntries(speeds.map((v) => [String(v), `${v}/s`])), String(this.get("speed")));
    const compared = this.get("compare");
    const taken = compared.map((name, i) => {
      const away = element("button", { type: "button", class: "scrub-other", "aria-label": `stop comparing with ${name}`, style: `border-color: ${this.get("panels").others?.[i]}` }, `${name} ×`);
      away.dataset.lmSuppressShortcuts = "true";
      this.on(away, "click", () => this.choose("compare", this.get("compare").filter((other) => other !== name)));
      return away;
    });
    this.compared.replaceChildren(...taken);
    this.selects.align.parentElement.hidden = !compared.length;
    const open = this.get("others").filter((name) => !compared.includes(name));
    fill(this.compare, { "": "…", ...Object.fromEntries(open.map((name) => [name, name])) }, "");
    this.compareField.hidden = !this.get("others").length && !compared.length;
    this.compare.disabled = compared.length >= 3 || !open.length;
  }

  // ---- the table of runs ----------------------------------------------------------------------------------------

  showTable() {
    const { columns = [], rows = [] } = this.get("table");
    this.table.hidden = !this.get("table").columns;
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (value) => (value === null || value === undefined ? "" : typeof value === "number" ? (Number.isInteger(value) ? count(value) : number(value)) : String(value));
    const found = rows.filter((row) => words.every((word) => columns.some(([name]) => text(row[name]).toLowerCase().includes(word))));
    if (this.sorted) {
      const [by, down] = this.sorted, key = (row) => row[by] ?? (typeof rows.find((r) => r[by] != null)?.[by] === "number" ? Infinity : "￿");
      found.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (down ? -1 : 1));
    }
    const head = element("tr", {}, ...columns.map(([name, title]) => {
      const down = this.sorted?.[0] === name ? this.sorted[1] : null;
      const sort = element("button", { type: "button" }, title + (down === null ? "" : down ? " ↓" : " ↑"));
      sort.dataset.lmSuppressShortcuts = "true";
      this.on(sort, "click", () => { this.sorted = [name, down === false]; this.showTable(); });
      return element("th", { scope: "col", "aria-sort": down === null ? "none" : down ? "descending" : "ascending" }, sort);
    }));
    const lines = found.map((row) => element("tr", { "data-run": row.run }, ...columns.map(([name]) => {
      if (name !== "run") return element("td", { class: typeof row[name] === "number" ? "scrub-number" : "", title: name === "status" ? row.error || "" : "" }, text(row[name]));
      const open = element("button", { type: "button", title: row.run }, row.run);
      open.dataset.lmSuppressShortcuts = "true";
      this.on(open, "click", () => this.choose("run", row.run));
      return element("td", {}, open);
    })));
    this.runs.replaceChildren(element("thead", {}, head), element("tbody", {}, ...lines));
    this.table.querySelector("summary").textContent = `Runs (${found.length === rows.length ? rows.length : `${found.length} of ${rows.length}`})`;
    this.markRun();
  }

  markRun() { for (const row of this.runs.querySelectorAll("tbody tr")) row.classList.toggle("scrub-chosen", row.dataset.run === this.get("run")); }

  // ---- a run, a matrix ------------------------------------------------------------------------------------------

  showAll() {
    const before = this.about?.run;
    this.about = this.get("about");
    this.say(this.get("message"));
    this.cells = null;
    const atEnd = this.steps && this.index === this.steps.length - 1;
    this.steps = this.about.steps ? Array.from(whole(this.about.steps)) : [];
    this.grew = atEnd && this.get("live") && before === this.about.run;
    this.records = Object.fromEntries((this.about.records || []).map((r) => [r.name, { ...r, steps: Array.from(whole(r.steps)), values: Array.from(floats(r.values)) }]));
    if (this.steps.length) {
      fill(this.selects.matrix, this.about.matrices, this.get("matrix"));
      fill(this.selects.record, Object.keys(this.records), this.get("record"));
      this.selects.record.hidden = !Object.keys(this.records).length;
    }
    this.showControls();
    this.showStatus();
    this.showMatrix();
    this.showGrid();
  }

  showMatrix() {
    const { main, others } = this.get("shown");
    const usable = Boolean(this.steps?.length && main);
    for (const part of [this.bar, this.choice, this.lines, this.caption, this.body]) part.hidden = !usable;
    if (!usable) { this.forget(); return this.pause(); }
    if (new Matrix(main).length !== this.steps.length) return undefined;  // the other half of a change is on its way
    this.forget();
    this.matrix = new Matrix(main);
    this.others = (others || []).map((sent) => new Matrix(sent));
    fill(this.selects.metric, Object.fromEntries(this.matrix.metrics.map((name) => [name, name.replaceAll("_", " ")])), this.get("metric"));
    this.selects.align.querySelector('[value="loss"]').disabled = !this.others.every((other) => other.losses);
    const place = this.steps.indexOf(this.get("step"));
    this.index = this.grew || place < 0 ? this.steps.length - 1 : place;
    if (this.grew) this.sendStep();  // before the other half of the change asks where to stand
    this.grew = false;
    this.showShuffled(false);
    this.drawAll();
    return this.drawGrid();
  }

  position(step) { return this.logSteps ? Math.log10(1 + step) : step; }

  stepAxis() { return this.about.axes[this.logSteps ? "log" : "linear"]; }

  layout(layout, own = {}) {
    const color = getComputedStyle(this.root).color;
    return { ...layout, ...own, autosize: true, font: { ...layout.font, color }, title: undefined };
  }

  /** The step from which on rounding moves the weights, shaded. */
  shapes() {
    if (this.about.unresolved === null || this.about.unresolved === undefined) return [];
    const x0 = this.position(this.about.unresolved), x1 = this.position(this.about.last), wide = x1 - x0 > 0.15 * (x1 - this.position(0));
    return [{ type: "rect", x0, x1, y0: 0, y1: 1, yref: "paper", line: { width: 0 }, fillcolor: "rgba(128,128,128,.22)",
      label: { text: wide ? "rounding" : "", textposition: "top center", font: { size: 11 } } }];
  }

  drawAll() {
    if (!this.matrix) return;
    const wanted = this.get("step_scale");
    this.logSteps = (wanted === "auto" ? this.about.step_scale : wanted) === "log";
    this.positions = this.steps.map((step) => this.position(step));
    this.slider.min = this.positions[0];
    this.slider.max = this.positions[this.positions.length - 1];
    this.slider.disabled = this.positions.length < 2;
    this.drawSpectrum();
    this.drawHeat();
    this.drawTrajectories();
    this.drawLoss();
    this.drawMetric();
    this.cursors?.forEach((cursor) => cursor.line.remove());
    this.cursors = ["heat", "trajectories", "loss", "metric"].filter((name) => this.panels[name].data).map((name) => new Cursor(this.panels[name]));
    this.moveCursors();
  }

  note(name, text) {
    let note = this.heads[name].querySelector(".scrub-thin");
    if (!note) this.heads[name].append(note = element("span", { class: "scrub-thin" }));
    note.textContent = text;
  }

  thinning(drawn, of, what = "checkpoints") { return drawn < of ? `${count(drawn)} of ${count(of)} ${what} drawn` : ""; }

  // ---- the spectrum ---------------------------------------------------------------------------------------------

  chosen() { return { view: this.get("view"), scale: this.get("scale"), other: this.get("other_scale") }; }

  /** All lines, in the order of the panel's traces; `moving`: only those that depend on the step. */
  spectrumLines(moving) {
    const { view, scale } = this.chosen(), m = this.matrix, i = this.index, on = this.get("lines");
    const lines = {
      noise: () => m.band({ draws: m.null.draws, low: m.null.low, high: m.null.high }, m.spread[i], view, scale),
      shuffled: () => (this.shuffled ? m.band(this.shuffled, 1, view, scale) : { x: [], y: [] }),
      law: () => m.law(i, view, scale), edge: () => m.edge(i, view, scale), fit: () => m.fit(i, view, scale),
      first: () => m.line(0, view, scale), final: () => m.line(this.steps.length - 1, view, scale),
      previous: () => m.line(Math.max(i - 1, 0), view, scale), now: () => m.line(i, view, scale),
    };
    const found = [];
    this.get("panels").lines.forEach((name, trace) => {
      const visible = name === "now" || on.includes(name === "edge" ? "law" : name);
      if (moving && (!visible || name === "first" || name === "final")) return;
      const line = visible ? lines[name]() : { x: [], y: [] };
      found.push({ trace, ...line, visible: visible && line.x.length > 0 });
    });
    const start = this.get("panels").lines.length;
    this.get("panels").others.forEach((_, j) => {
      const other = this.others[j];
      if (!other && moving) return;
      const line = other ? other.line(other.at[this.get("align")][i], view, scale) : { x: [], y: [] };
      found.push({ trace: start + j, ...line, visible: Boolean(other), name: other?.label });
    });
    return found;
  }

  drawSpectrum() {
    if (!this.matrix) return;
    const { view, scale, other } = this.chosen(), { data, layout } = this.get("panels").spectrum[view];
    const traces = this.spectrumLines(false).map(({ trace, x, y, visible, name }) => ({ ...data[trace], x, y, visible, name: name ?? data[trace].name }));
    const axes = this.spectrumAxes(view, scale, other);
    this.axes = Object.fromEntries(["xaxis", "yaxis"].map((name) => [name, { ...layout[name], ...axes[name], autorange: !this.get("fixed") }]));
    Plotly.react(this.panels.spectrum, traces, this.layout(layout, { ...this.axes, showlegend: false, margin: { ...layout.margin, t: 14 } }), CONFIG);  // the boxes are the legend
    this.note("spectrum", this.thinning(this.matrix.drawn, Math.min(this.matrix.rank, this.matrix.places[this.matrix.drawn - 1] + 1), "ranks"));
  }

  spectrumAxes(view, scale, other) {
    const { axes } = this.matrix, values = { ...axes.values[scale], title: { text: "singular value", standoff: 6 } };
    if (view === "rank") return { xaxis: axes.rank[other], yaxis: values };
    return { xaxis: values, yaxis: view === "cumulative" ? axes.share[other] : axes.density[scale][other] };
  }

  moveSpectrum() {
    if (!this.get("fixed")) { this.drawSpectrum(); return; }  // an animation does not look for new ranges
    const lines = this.spectrumLines(true);
    Plotly.animate(this.panels.spectrum, { data: lines.map(({ x, y }) => ({ x, y })), traces: lines.map(({ trace }) => trace) }, AT_ONCE);
  }

  showShuffled(draw = true) {
    const sent = this.get("shuffled"), here = this.matrix && sent.draws && sent.matrix === this.matrix.matrix && sent.run === this.about.run && sent.step === this.steps[this.index];
    this.shuffled = here ? { draws: floats(sent.draws), low: floats(sent.low), high: floats(sent.high) } : null;
    if (draw && this.matrix) this.drawSpectrum();
    if (this.matrix) this.showCaption();
  }

  showLines() {
    this.drawSpectrum();
    this.askShuffled();
  }

  /** The null of the matrix's own entries is computed where it is asked for, at a step whose weights were kept. */
  askShuffled() {
    if (!this.get("lines").includes("shuffled") || this.shuffled || !this.kept().has(this.steps[this.index])) return;
    this.model.send({ do: "shuffle", step: this.steps[this.index] });
  }

  kept() { return new Set(whole(this.about.kept)); }

  showCaption() {
    const m = this.matrix, i = this.index, alpha = m.tail.alpha[i], percentile = m.tail.percentile[i];
    const word = percentile < 2.5 ? "heavier than noise" : percentile > 97.5 ? "lighter than noise" : "like noise";
    const tail = Number.isFinite(alpha) ? `tail of the eigenvalues: α = ${number(alpha, 3)} over ${m.tail.n_tail[i]} values from s = ${number(Math.sqrt(m.tail.xmin[i]), 3)} on, ${word} (percentile ${Math.round(percentile)} of random matrices)` : "no power law was fitted here";
    const lines = this.get("lines"), missing = lines.includes("shuffled") && !this.shuffled ? (this.model.alone ? " · the shuffled values of this step are not in the page" : this.kept().has(this.steps[i]) ? " · shuffling…" : " · no weights were kept at this step to shuffle") : "";
    this.caption.textContent = `${m.matrix}, ${m.rows} × ${m.columns} · ${tail}${missing}`;
  }

  // ---- over training --------------------------------------------------------------------------------------------

  drawHeat() {
    const scale = this.get("scale"), { data, layout } = this.get("panels").heat[scale], log = scale === "log", m = this.matrix, [zmin, zmax] = m.axes.heat[scale];
    const rows = m.kept.map((t) => m.row(t, log));
    const z = m.ranks.map((_, k) => rows.map((row) => (log ? Math.log10(row[k]) : row[k])));
    const steps = m.kept.map((t) => this.steps[t]);
    const trace = { ...data[0], x: steps.map((s) => this.position(s)), y: m.ranks, z, zmin, zmax,
      customdata: m.drawn * steps.length < 20000 ? m.ranks.map(() => steps) : undefined,
      hovertemplate: `${m.drawn * steps.length < 20000 ? "step %{customdata}, " : ""}rank %{y}: ${log ? "10^%{z:.2f}" : "%{z:.4g}"}<extra></extra>` };
    Plotly.react(this.panels.heat, [trace], this.layout(layout, { xaxis: { ...layout.xaxis, ...this.stepAxis() }, yaxis: { ...layout.yaxis, range: [m.ranks[m.drawn - 1] + 0.5, 0.5] }, shapes: this.shapes() }), CONFIG);
    this.note("heat", this.thinning(m.kept.length, m.of));
  }

  drawTrajectories() {
    const scale = this.get("scale"), { data, layout } = this.get("panels").trajectories[scale], m = this.matrix, steps = m.kept.map((t) => this.steps[t]);
    const yaxis = { ...layout.yaxis, ...m.axes.leading[scale], title: { ...layout.yaxis.title, text: `s<sub>1</sub> … s<sub>${Math.min(data.length, m.drawn)}</sub>` } };
    const rows = m.kept.map((t) => m.row(t, scale === "log"));
    const traces = data.map((trace, j) => ({ ...trace, x: steps.map((s) => this.position(s)), y: rows.map((row) => row[data.length - 1 - j]), customdata: steps, mode: steps.length > 1 ? "lines" : "markers", visible: data.length - 1 - j < m.drawn }));
    Plotly.react(this.panels.trajectories, traces, this.layout(layout, { xaxis: { ...layout.xaxis, ...this.stepAxis() }, yaxis, shapes: this.shapes() }), CONFIG);
    this.note("trajectories", this.thinning(m.kept.length, m.of));
  }

  /** Where a step of another run stands on this run's axis. */
  otherPosition(other, step) { return this.position(this.get("align") === "fraction" ? step * this.about.last / Math.max(other.last, 1) : step); }

  drawLoss() {
    const record = this.records[this.get("record")] || Object.values(this.records)[0];
    this.body.classList.toggle("scrub-no-loss", !record);
    if (!record) return;  // not purged: a drawing may be on its way
    const { data, layout } = record.figure, ends = [this.position(0), this.position(this.about.last)];
    const main = { ...data[0], x: record.steps.map((s) => this.position(s)), y: record.values, customdata: record.steps, showlegend: false };
    const levels = data.slice(1).map((trace, j) => ({ ...trace, x: ends, y: [record.levels[j], record.levels[j]], showlegend: true }));
    const others = this.others.map((other, j) => ({ other, found: other.recorded[record.name], color: this.get("panels").others[j] })).filter(({ found }) => found)
      .map(({ other, found, color }) => ({ ...data[0], x: found.steps.map((s) => this.otherPosition(other, s)), y: found.values, customdata: found.steps, name: other.label, line: { color, width: 1.5 }, showlegend: false }));
    const every = [...record.values, ...others.flatMap(({ y }) => y), ...record.levels, 0].filter(Number.isFinite), low = Math.min(...every), high = Math.max(...every), margin = 0.04 * (high - low) || 0.5;
    const axes = { xaxis: { ...layout.xaxis, ...this.stepAxis() }, yaxis: { ...layout.yaxis, range: [low - margin, high + margin] }, shapes: this.shapes() };
    Plotly.react(this.panels.loss, [main, ...levels, ...others], this.layout(layout, axes), CONFIG);
    this.note("loss", this.thinning(record.drawn, record.of, "records"));
    this.cursors?.find((cursor) => cursor.panel === this.panels.loss)?.move(this.positions[this.index]);
  }

  drawMetric() {
    const name = this.matrix.metric(this.get("metric")) ? this.get("metric") : this.matrix.metrics[0], m = this.matrix;
    const { data, layout } = this.get("panels").metric, values = m.metric(name), steps = m.kept.map((t) => this.steps[t]), x = steps.map((s) => this.position(s));
    const [low, high] = (m.bands[name] || [NaN, NaN]).map((limit) => m.kept.map((t) => limit * (m.scaled.includes(name) ? m.spread[t] : 1)));
    const traces = [{ ...data[0], x: [...x, ...x.slice().reverse()], y: [...low, ...high.slice().reverse()], visible: Boolean(m.bands[name]) && this.get("lines").includes("noise") },
      { ...data[1], x, y: m.kept.map((t) => values[t]), customdata: steps, name, mode: steps.length > 1 ? "lines" : "markers" }];
    this.others.forEach((other, j) => traces.push({ ...data[2 + j], x: other.steps.map((s) => this.otherPosition(other, s)), y: Array.from(other.metric(name) || []), customdata: other.steps, name: other.label }));
    const every = traces.filter((t) => t.visible !== false).flatMap((t) => t.y).filter(Number.isFinite);
    const least = Math.min(...every), most = Math.max(...every), margin = 0.06 * (most - least) || 0.1 * Math.abs(most) || 0.5;
    const yaxis = { ...layout.yaxis, range: every.length ? [least - margin, most + margin] : [0, 1], title: { ...layout.yaxis.title, text: name.replaceAll("_", " ") } };
    Plotly.react(this.panels.metric, traces, this.layout(layout, { xaxis: { ...layout.xaxis, ...this.stepAxis() }, yaxis, shapes: this.shapes() }), CONFIG);
    this.note("metric", this.thinning(m.kept.length, m.of));
    this.cursors?.find((cursor) => cursor.panel === this.panels.metric)?.move(this.positions[this.index]);
  }

  // ---- all matrices ---------------------------------------------------------------------------------------------

  showGrid() {
    const sent = this.get("grid");
    this.body.classList.toggle("scrub-no-grid", !sent.names || sent.names.length < 2);
    this.cells = null;
    if (!sent.names || sent.names.length < 2 || !this.matrix) return;
    this.cells = { ...sent, kept: Array.from(whole(sent.kept)), heights: floats(sent.heights), values: floats(sent.values) };
    fill(this.selects.color, Object.fromEntries((sent.colors || [sent.metric]).map((name) => [name, name.replaceAll("_", " ")])), sent.metric);
    this.drawGrid();
    const rest = sent.names.length > MANY_CELLS ? "drawn when the slider rests" : "";
    this.note("grid", [this.thinning(this.cells.kept.length, sent.of), rest].filter(Boolean).join(", "));
    if (this.hovered) return;
    this.hovered = true;
    const under = (event) => {
      const { xaxis, yaxis } = this.panels.grid._fullLayout, box = this.panels.grid.getBoundingClientRect();
      const column = Math.floor(xaxis.p2d(event.clientX - box.left - xaxis._offset)), row = Math.floor(yaxis.p2d(event.clientY - box.top - yaxis._offset));
      return this.cells.cells.findIndex(([r, c]) => r === row && c === column);
    };
    this.on(this.panels.grid, "mousemove", (event) => {
      const at = this.cells ? under(event) : -1;
      this.panels.grid.style.cursor = at < 0 ? "" : "pointer";
      this.panels.grid.title = at < 0 ? "" : `${this.cells.names[at]}: ${this.cells.metric.replaceAll("_", " ")} ${number(this.cells.values[this.cellRow() * this.cells.names.length + at])}`;
    });
    this.on(this.panels.grid, "click", (event) => { const at = this.cells ? under(event) : -1; if (at >= 0) this.choose("matrix", this.cells.names[at]); });
  }

  drawGrid() {
    if (!this.cells) return;
    const { figure: { data, layout }, names } = this.cells;
    const traces = this.cellTraces().map((trace, i) => ({ ...data[i], ...trace }));
    Plotly.react(this.panels.grid, [...traces, ...data.slice(names.length)], this.layout(layout, { shapes: this.chosenCell() }), CONFIG);
  }

  chosenCell() {
    const at = this.cells.names.indexOf(this.get("matrix"));
    if (at < 0) return [];
    const [row, column] = this.cells.cells[at];
    return [{ type: "rect", x0: column + 0.02, x1: column + 0.98, y0: row + 0.03, y1: row + 0.97, line: { color: "#CC79A7", width: 2 } }];
  }

  cellRow() { return Math.max(0, this.cells.kept.findLastIndex((t) => t <= this.index)); }

  cellTraces() {
    const { names, points, cells, heights, values, palette, low, high } = this.cells, t = this.cellRow();
    return names.map((_, m) => {
      const start = (t * names.length + m) * points, floor = cells[m][0] + 0.9, value = values[t * names.length + m];
      const y = Array.from(heights.subarray(start, start + points), (h) => floor - 0.78 * h);
      const shade = Number.isFinite(value) ? palette[Math.round(Math.min(1, Math.max(0, (value - low) / (high - low || 1))) * (palette.length - 1))] : "rgb(160,160,160)";
      return { y: [...y, floor, floor], fillcolor: shade, line: { color: shade, width: 1 } };
    });
  }

  drawCells() {
    if (!this.cells || !this.panels.grid.data) return;
    Plotly.animate(this.panels.grid, { data: this.cellTraces(), traces: this.cells.names.map((_, m) => m) }, AT_ONCE);
  }

  // ---- moving ---------------------------------------------------------------------------------------------------

  /** Move to a checkpoint; at most one drawing a frame, and Python hears where it rests. */
  show(index) {
    if (!this.matrix) return;
    this.index = Math.max(0, Math.min(index, this.steps.length - 1));
    this.moveCursors();
    if (this.frame) this.again = true;
    else {
      this.draw();
      this.frame = requestAnimationFrame(() => {
        this.frame = null;
        if (this.again) this.guard(() => { this.again = false; this.draw(); });
      });
    }
    clearTimeout(this.late);
    this.late = setTimeout(() => this.guard(() => this.rest()), REST_MS);
  }

  rest() {
    this.sendStep();
    if (this.cells?.names.length > MANY_CELLS) this.drawCells();
    this.askShuffled();
  }

  draw() {
    if (this.shuffled || this.get("shuffled").step === this.steps[this.index]) this.showShuffled(true);
    else this.moveSpectrum();
    if (this.cells && this.cells.names.length <= MANY_CELLS) this.drawCells();
    this.showCaption();
  }

  moveCursors() {
    this.cursors?.forEach((cursor) => cursor.move(this.positions[this.index]));
    this.slider.value = this.positions[this.index];
    this.slider.setAttribute("aria-valuetext", `step ${this.steps[this.index]}`);
    this.label.textContent = `step ${count(this.steps[this.index])}`;
  }

  /** A key on the slider: by one checkpoint, by a tenth of them, or to an end. */
  press(event) {
    const last = this.steps.length - 1, tenth = Math.max(1, Math.round(last / 10));
    const to = { ArrowLeft: this.index - 1, ArrowDown: this.index - 1, ArrowRight: this.index + 1, ArrowUp: this.index + 1, PageDown: this.index - tenth, PageUp: this.index + tenth, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.show(to);
  }

  followStep() {
    if (this.about !== this.get("about")) return;  // of another run, which is on its way
    const index = this.steps?.indexOf(this.get("step")) ?? -1;
    if (index >= 0 && index !== this.index && this.matrix) { this.index = index; this.moveCursors(); this.draw(); this.rest(); }
  }

  /** To the checkpoint nearest to a click into a panel over training. */
  goTo(panel, event) {
    const { xaxis, yaxis } = panel._fullLayout, box = panel.getBoundingClientRect();
    const x = event.clientX - box.left - xaxis._offset, y = event.clientY - box.top - yaxis._offset;
    if (x >= 0 && x <= xaxis._length && y >= 0 && y <= yaxis._length) this.show(nearest(this.positions, xaxis.p2d(x)));
  }

  jumpToLoss(text) {
    const record = this.records[this.get("record")] || Object.values(this.records)[0], wanted = Number(text);
    if (!record || text === "" || !Number.isFinite(wanted)) return;
    const at = record.values.findIndex((value) => value <= wanted);
    if (at < 0) return this.say(`${record.name} never came down to ${wanted}; its least value is ${number(Math.min(...record.values.filter(Number.isFinite)))}.`);
    this.say("");
    const place = this.steps.findIndex((step) => step >= record.steps[at]);
    return this.show(place < 0 ? this.steps.length - 1 : place);
  }

  start() {
    if (this.index === this.steps.length - 1) this.show(0);
    const advance = () => this.guard(() => (this.index < this.steps.length - 1 ? this.show(this.index + 1) : this.pause()));
    this.timer = setInterval(advance, 1000 / this.get("speed"));
    this.play.textContent = "❚❚";
    this.play.setAttribute("aria-label", "pause");
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "▶";
    this.play.setAttribute("aria-label", "play");
  }

  // ---- a run that is still training -----------------------------------------------------------------------------

  showStatus() {
    const { status = "", error = "" } = this.about || {}, open = ["running", "new", "interrupted"].includes(status);
    this.status.textContent = status === "done" || !status ? status : error ? `${status}: ${error}` : status;
    this.status.dataset.status = status;
    this.liveField.hidden = !open && !this.get("live");
    clearTimeout(this.poll);
    if (this.get("live") && open) this.pollLater();
  }

  pollLater() {
    clearTimeout(this.poll);
    if (!this.get("live") || !["running", "new", "interrupted"].includes(this.about?.status)) return;
    this.poll = setTimeout(() => this.model.send({ do: "poll" }), POLL_MS);
  }

  // ---- take away ------------------------------------------------------------------------------------------------

  saveTable(name) {
    const cell = (value) => (value === undefined || value === null || Number.isNaN(value) ? "" : /[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    const lines = [];
    if (name === "heat") {
      const steps = this.matrix.kept.map((t) => this.steps[t]);
      lines.push(["step", ...this.matrix.ranks.map((k) => `s${k}`)], ...this.matrix.kept.map((t, i) => [steps[i], ...this.matrix.row(t, false)]));
    } else if (name === "grid") {
      const t = this.cellRow();
      lines.push(["matrix", "step", this.cells.metric], ...this.cells.names.map((matrix, m) => [matrix, this.steps[this.cells.kept[t]], this.cells.values[t * this.cells.names.length + m]]));
    } else {
      const over = ["loss", "metric", "trajectories"].includes(name);
      lines.push(["line", over ? "step" : "x", "y"]);
      for (const trace of this.panels[name].data) {
        if (trace.visible === false || !trace.x) continue;
        trace.x.forEach((x, i) => lines.push([trace.name, over && trace.customdata ? trace.customdata[i] : x, trace.y[i]]));
      }
    }
    this.download(`${this.fileName(name)}.csv`, new Blob([lines.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" }));
  }

  fileName(name) { return [this.about.run, this.matrix.matrix, name, this.steps[this.index]].join("-").replace(/[^\w.-]+/g, "_"); }

  savePicture(name, format) {
    const panel = this.panels[name], background = this.background();
    const figure = { data: panel.data, layout: { ...panel.layout, paper_bgcolor: background, width: panel.clientWidth, height: panel.clientHeight } };
    if (name === "spectrum") figure.layout = { ...figure.layout, showlegend: true, margin: { ...panel.layout.margin, t: 64 } };
    return Plotly.downloadImage(figure, { format, scale: format === "png" ? 2 : 1, filename: this.fileName(name), width: panel.clientWidth, height: panel.clientHeight });
  }

  background() {
    for (let at = this.root; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (color && !/^(transparent|rgba\(0, 0, 0, 0\))$/.test(color)) return color;
    }
    return "#fff";
  }

  download(name, blob) {
    const link = element("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  /** The current view as Python. */
  codeText() {
    const { source, defaults } = this.get("code");
    const python = (value) => (value === true ? "True" : value === false ? "False" : Array.isArray(value) ? `[${value.map(python).join(", ")}]` : typeof value === "number" ? String(value) : quoted(value));
    const state = { run: this.get("run"), matrix: this.get("matrix"), step: this.steps[this.index] };
    for (const [name, value] of Object.entries(defaults)) if (JSON.stringify(this.get(name)) !== JSON.stringify(value)) state[name] = this.get(name);
    const written = Object.entries(state).map(([name, value]) => `${name}=${python(value)}${name === "speed" && Number.isInteger(value) ? ".0" : ""}`);
    return `Dashboard(${[source, ...written].join(", ")})`;
  }

  async copyCode() {
    const text = this.codeText();
    try { await navigator.clipboard.writeText(text); this.code.textContent = "copied"; setTimeout(() => { this.code.textContent = "copy code"; }, 1200); } catch { this.say(text); }
  }

  close() {
    this.pause();
    this.forget();
    clearTimeout(this.poll);
    this.resized.disconnect();
    this.off.forEach((stop) => stop());
    Object.values(this.panels).forEach((panel) => Plotly.purge(panel));
  }
}

// ---- without a kernel ---------------------------------------------------------------------------------------------

/** Stands in for the notebook's model in an exported page: all matrices are in the page. */
class Pages extends Page {
  constructor({ state, shown }) {
    super({ ...state, shown: shown[state.matrix] });
    this.all = shown;
  }
  follow(name) {
    if (name !== "matrix" && name !== "compare") return [];
    const { main, others } = this.all[this.values.matrix];
    this.values.shown = { main, others: others.filter(({ label }) => this.values.compare.includes(label)) };
    return ["shown", "grid"];
  }
}

/** Show exported data in an element. */
export function mount(sent, root) { return new Dashboard(new Pages(revived(sent)), root); }

export default {
  render({ model, el }) {
    const dashboard = new Dashboard(model, el);
    return () => dashboard.close();
  },
};
