// What the modules of several widgets share: it stands before scrub.js, and before routing.js, in the same module.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function labelled(text, control) {
  if (!control.hasAttribute("aria-label")) control.setAttribute("aria-label", text);
  return element("label", { class: "scrub-field" }, element("span", {}, text), control);
}

function fill(select, options, chosen) {
  const pairs = Array.isArray(options) ? options.map((value) => [value, value]) : Object.entries(options);
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
  select.value = chosen;
}

const number = (value, digits = 4) => (Number.isFinite(value) ? String(+value.toPrecision(digits)) : "–");
const count = (value) => value.toLocaleString("en");

/** A buffer as numbers; copied, since its start may not be aligned. */
const bytesOf = (sent) => sent.buffer.slice(sent.byteOffset, sent.byteOffset + sent.byteLength);
const floats = (sent) => new Float32Array(bytesOf(sent));
const whole = (sent) => new Int32Array(bytesOf(sent));

/** Stands in for the notebook's model in an exported page. */
class Page {
  constructor(values) {
    this.values = values;
    this.handlers = {};
    this.alone = true;
  }
  get(name) { return this.values[name]; }
  set(name, value) {
    if (JSON.stringify(this.values[name]) === JSON.stringify(value)) return;
    this.values[name] = value;
    for (const each of [name, ...this.follow(name)]) (this.handlers[`change:${each}`] || []).forEach((act) => act());
  }
  /** Changes what depends on a value that has changed, and says what that was. */
  follow() { return []; }
  on(event, act) { (this.handlers[event] ||= []).push(act); }
  off(event, act) { this.handlers[event] = (this.handlers[event] || []).filter((other) => other !== act); }
  save_changes() {}
  send() {}
}

function revived(value) {
  if (Array.isArray(value)) return value.map(revived);
  if (value === null || typeof value !== "object") return value;
  if (typeof value.$bytes === "string") {
    const text = atob(value.$bytes), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new DataView(bytes.buffer);
  }
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, revived(part)]));
}
