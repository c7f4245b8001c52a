// Shows which tokens a routed model computes, block by block, at every checkpoint whose weights were kept: in a notebook, and in an
// exported file. Python sends the numbers of all checkpoints once, see nbs/dashboards/routing.ipynb. page.js stands before this text
// in the same module.

const REST_MS = 120;                    // how long the slider rests before Python hears of it
const HUE = "0, 114, 178", DEEPEST = 0.5;  // of the largest value; text stays readable on it in light and dark

class TokenView {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.data = model.get("data");
    this.steps = Array.from(whole(this.data.steps));
    this.signals = Object.fromEntries(Object.entries(this.data.signals).map(([name, signal]) => [name, { ...signal, values: floats(signal.values) }]));
    this.pointed = null;                // [strip, place] of the token whose numbers are shown
    this.build();
    this.listen();
    this.showSequence();
    this.followStep();
  }

  build() {
    const button = (text, label) => element("button", { type: "button", class: "scrub-button", "aria-label": label, title: label }, text);
    this.root.classList.add("scrub", "routing");
    this.root.dataset.lmSuppressShortcuts = "true";  // else JupyterLab takes the arrow keys
    this.color = element("select");
    fill(this.color, Object.fromEntries(Object.entries(this.signals).map(([name, { title }]) => [name, title])), "");
    this.sequence = element("select");
    fill(this.sequence, Object.fromEntries(this.data.titles.map((title, i) => [String(i), title])), "");
    this.first = button("|◀", "first checkpoint");
    this.last = button("▶|", "last checkpoint");
    this.slider = element("input", { type: "range", min: 0, max: this.steps.length - 1, step: 1, "aria-label": "checkpoint" });
    this.label = element("output", { class: "scrub-step" });
    this.low = element("span");
    this.high = element("span");
    const scale = element("i", { class: "routing-scale", style: `background-image: linear-gradient(to right, rgba(${HUE}, 0), rgba(${HUE}, ${DEEPEST}))` });
    const keys = [["routing-token routing-chosen", "computed"], ["routing-token", "passes by"]].map(([kind, text]) => element("span", { class: kind }, text));
    this.caption = element("div", { class: "scrub-caption", role: "status" });
    this.strips = element("div", { class: "routing-strips" });
    this.root.append(
      element("div", { class: "scrub-choice" }, labelled("colour", this.color), element("span", { class: "routing-legend" }, this.low, scale, this.high),
        element("span", { class: "routing-legend" }, ...keys), labelled("sequence", this.sequence)),
      element("div", { class: "scrub-bar" }, this.first, this.last, this.slider, this.label), this.caption, this.strips);
    this.sequence.parentElement.hidden = this.data.titles.length < 2;
  }

  listen() {
    this.color.addEventListener("change", () => this.send("color", this.color.value));
    this.sequence.addEventListener("change", () => this.send("sequence", +this.sequence.value));
    this.slider.addEventListener("input", () => this.show(+this.slider.value));
    this.first.addEventListener("click", () => this.show(0));
    this.last.addEventListener("click", () => this.show(this.steps.length - 1));
    for (const event of ["pointerover", "focusin"]) this.strips.addEventListener(event, ({ target }) => this.point(target));
    this.strips.addEventListener("pointerleave", () => this.point(this.strips.querySelector(":focus")));
    this.strips.addEventListener("keydown", (event) => this.press(event));
    this.off = Object.entries({ step: () => this.followStep(), color: () => this.draw(), sequence: () => this.showSequence() }).map(([name, act]) => {
      this.model.on(`change:${name}`, act);
      return () => this.model.off(`change:${name}`, act);
    });
  }

  send(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  // ---- a sequence: a strip of tokens for each routed block ---------------------------------------------------------

  showSequence() {
    const marks = this.data.marks[this.model.get("sequence")];
    this.tokens = this.data.blocks.map(() => marks.map((mark, place) => element("span", { class: "routing-token", tabindex: place ? -1 : 0 }, mark.replace(/\n$/, ""))));
    this.shares = this.data.blocks.map(() => element("output", { class: "routing-share" }));
    this.strips.replaceChildren(...this.tokens.map((tokens, b) => {
      const text = element("div", { class: "routing-text", role: "group", "aria-label": `block ${this.data.blocks[b]}` });
      tokens.forEach((token, place) => text.append(token, marks[place].endsWith("\n") ? "\n" : this.data.separator));
      return element("section", { class: "routing-strip" }, element("header", {}, element("b", {}, `block ${this.data.blocks[b]}`), this.shares[b]), text);
    }));
    this.pointed = null;
    this.draw();
  }

  /** A signal's values of the tokens of a block, at the checkpoint that is shown. */
  values(name, b) {
    const time = this.tokens[0].length, rows = this.data.titles.length;
    const start = ((this.index * this.data.blocks.length + b) * rows + this.model.get("sequence")) * time;
    return this.signals[name].values.subarray(start, start + time);
  }

  draw() {
    if (this.index === undefined) return;
    const color = this.model.get("color"), { low, high, clipped, yes_no } = this.signals[color];
    this.tokens.forEach((tokens, b) => {
      const values = this.values(color, b), chosen = this.values("chosen", b);
      tokens.forEach((token, place) => {
        const share = Math.min(1, Math.max(0, (values[place] - low) / (high - low))) || 0;  // none of what is no number
        token.style.backgroundColor = `rgba(${HUE}, ${(DEEPEST * share).toFixed(3)})`;
        token.classList.toggle("routing-chosen", chosen[place] === 1);
      });
      this.shares[b].textContent = `${(100 * chosen.reduce((sum, one) => sum + one, 0) / chosen.length).toFixed(0)} %`;
    });
    this.color.value = color;
    this.sequence.value = String(this.model.get("sequence"));
    this.low.textContent = yes_no ? "no" : `${clipped ? "≤ " : ""}${number(low, 3)}`;
    this.high.textContent = yes_no ? "yes" : `${clipped ? "≥ " : ""}${number(high, 3)}`;
    this.slider.value = this.index;
    this.slider.setAttribute("aria-valuetext", `step ${this.steps[this.index]}`);
    this.label.textContent = `step ${count(this.steps[this.index])}`;
    this.showCaption();
  }

  // ---- one token ------------------------------------------------------------------------------------------------

  point(target) {
    const b = this.tokens.findIndex((tokens) => tokens.includes(target));
    if (b < 0 && target) return;        // between two tokens
    if (this.pointed) this.tokens.forEach((tokens) => tokens[this.pointed[1]].classList.remove("routing-pointed"));
    this.pointed = b < 0 ? null : [b, this.tokens[b].indexOf(target)];
    if (this.pointed) this.tokens.forEach((tokens) => tokens[this.pointed[1]].classList.add("routing-pointed"));
    this.showCaption();
  }

  /** Arrow keys on a token: along its strip, or to the same token of another block. */
  press(event) {
    const b = this.tokens.findIndex((tokens) => tokens.includes(event.target)), place = this.tokens[b]?.indexOf(event.target), last = this.tokens[0].length - 1;
    const to = { ArrowLeft: [b, place - 1], ArrowRight: [b, place + 1], ArrowUp: [b - 1, place], ArrowDown: [b + 1, place], Home: [b, 0], End: [b, last] }[event.key];
    if (b < 0 || !to) return;
    event.preventDefault();
    const next = this.tokens[to[0]]?.[to[1]];
    if (!next) return;
    this.tokens[to[0]].forEach((token) => { token.tabIndex = token === next ? 0 : -1; });
    next.focus();
  }

  showCaption() {
    if (!this.pointed) {
      this.caption.textContent = "Point at a token, or go to one by the keyboard, for its numbers.";
      return;
    }
    const [b, place] = this.pointed, told = Object.entries(this.signals).map(([name, { title, yes_no }]) => {
      const value = this.values(name, b)[place];
      return `${title.split(",")[0]} ${yes_no ? (value ? "yes" : "no") : number(value, 3)}`;
    });
    this.caption.textContent = `token ${place}, ${this.data.names[this.model.get("sequence")][place]}, block ${this.data.blocks[b]}: ${told.join(" · ")}`;
  }

  // ---- the step -------------------------------------------------------------------------------------------------

  show(index) {
    this.index = index;
    this.draw();
    clearTimeout(this.late);
    this.late = setTimeout(() => this.send("step", this.steps[this.index]), REST_MS);
  }

  /** The last kept checkpoint that is not after the step. */
  followStep() {
    const index = Math.max(0, this.steps.findLastIndex((step) => step <= this.model.get("step")));
    if (index === this.index) return;
    clearTimeout(this.late);
    this.index = index;
    this.draw();
  }

  close() {
    clearTimeout(this.late);
    this.off.forEach((stop) => stop());
  }
}

/** Show exported data in an element. */
export function mount(sent, root) { return new TokenView(new Page(revived(sent)), root); }

export default {
  render({ model, el }) {
    const view = new TokenView(model, el);
    return () => view.close();
  },
};
