// Elements from data. Strings become text nodes only, so nothing in the data is ever markup.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "rect", "line", "g", "circle", "polyline", "text", "title"]);

/** An element: attributes, `on…` handlers, `style` and `data` objects, then children (strings, elements, lists, null). */
function h(tag, attributes = {}, ...children) {
  const svg = SVG_TAGS.has(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

const clear = (element, ...children) =>
  element.replaceChildren(...children.flat(Infinity).filter((c) => c != null && c !== false));

// Arrays of any length: spreading them into Math.max overflows the stack
const largestOf = (values, least = 1e-12) => values.reduce((a, b) => (b > a ? b : a), least);
const smallestOf = (values, most = Infinity) => values.reduce((a, b) => (b < a ? b : a), most);

// Numbers and texts for people

const percent = (x, digits = 0) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(digits)}%`);
function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1);
  return size >= 100 && Number.isInteger(x) ? x.toLocaleString("en") : String(Number(x.toPrecision(digits)));
}
const count = (x) => x.toLocaleString("en");
const plural = (x, word) => `${count(x)} ${word}${x === 1 ? "" : "s"}`;

/** A text with its control characters made visible; lines stay lines. */
function visible(text) {
  const wellFormed = text.toWellFormed ? text.toWellFormed() : text;
  return wellFormed
    .replace(/\r\n/g, "\n")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) =>
      c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)),
    );
}

/** The first `length` characters, no pair of surrogates cut in two. */
function firstOf(text, length) {
  if (text.length <= length) return text;
  const end = /[\ud800-\udbff]/.test(text[length - 1]) ? length - 1 : length;
  return text.slice(0, end);
}

/** A line of a text, for lists. */
const line = (text, length = 160) => {
  const all = visible(firstOf(String(text), 4 * length))
    .replace(/\s+/g, " ")
    .trim();
  const short = firstOf(all, length);
  return short.length < all.length || all.length < text.trim().length - 3 * length ? `${short}…` : short;
};

/** A text kept apart from its surroundings, whichever direction it runs in. */
const isolated = (text, attributes = {}) => h("bdi", { dir: "auto", ...attributes }, text);

/** A whole text, folded where it is long. */
function foldedText(text, limit = 1200) {
  const box = h("div", { class: "text", dir: "auto" }, visible(firstOf(text, limit)));
  if (text.length <= limit) return box;
  const more = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () => {
        box.textContent = visible(text);
        more.remove();
      },
    },
    `Show all ${count(text.length)} characters`,
  );
  return h("div", {}, box, more);
}

const pill = (label, value, title) => h("span", { class: "pill", title }, h("b", {}, value), ` ${label}`);

const section = (title, ...children) => {
  const id = `s-${title.toLowerCase().replace(/\W+/g, "-")}`;
  return h("section", { class: "panel", "aria-labelledby": id }, h("h2", { id }, title), ...children);
};

const select = (label, options, value, onchange) =>
  h(
    "label",
    { class: "field" },
    h("span", {}, label),
    h(
      "select",
      { onchange: (event) => onchange(event.target.value) },
      options.map(([v, text]) => h("option", { value: v, selected: String(v) === String(value) }, text)),
    ),
  );

const checkbox = (label, checked, onchange) =>
  h(
    "label",
    { class: "check" },
    h("input", { type: "checkbox", checked, onchange: (event) => onchange(event.target.checked) }),
    label,
  );

function searchField(label, value, oninput) {
  let timer = 0;
  return h("input", {
    type: "search",
    class: "search",
    placeholder: label,
    "aria-label": label,
    value,
    oninput: (event) => {
      clearTimeout(timer);
      timer = setTimeout(() => oninput(event.target.value.trim().toLowerCase()), 120);
    },
  });
}

async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // a page from the disk may not be allowed to: the old way
    const area = h("textarea", { value: text, class: "offscreen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// A tooltip beside the pointer

const tip = document.getElementById("tip");
function showTip(event, ...content) {
  clear(tip, ...content);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}
const hideTip = () => {
  tip.hidden = true;
};
