// Small charts, each with a sentence for those who do not see it.

// Okabe and Ito's eight colours, told apart by colour-blind readers; black is left to text and grey to "others".
const OKABE_ITO = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7a7a7a"];
const OTHERS = "#9aa0a8";
// Viridis at even steps: its lightness rises all the way, so it also works in grey.
const VIRIDIS = [
  [68, 1, 84],
  [72, 40, 120],
  [62, 74, 137],
  [49, 104, 142],
  [38, 130, 142],
  [31, 158, 137],
  [53, 183, 121],
  [110, 206, 88],
  [181, 222, 43],
  [253, 231, 37],
];

function viridis(x) {
  const at = Math.max(0, Math.min(1, x)) * (VIRIDIS.length - 1),
    low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((v, c) => Math.round(v + (at - low) * (VIRIDIS[low + 1][c] - v)));
}
const rgb = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/** What `var(--name)` is at the moment, for canvases. */
function themeColour(name) {
  const probe = h("span", { style: { color: `var(--${name})` } });
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

function sparkline(values, label) {
  const points = values.map((v, i) => `${(100 * i) / Math.max(values.length - 1, 1)},${(30 - 28 * v).toFixed(2)}`);
  return h(
    "svg",
    { class: "spark", viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img", "aria-label": label },
    h("path", { class: "area", d: `M0,30 L${points.join(" ")} L100,30 Z` }),
    h("polyline", { class: "stroke", points: points.join(" ") }),
  );
}

/** Vertical bars over equal bins of numbers. */
function histogram(values, { bins = 24, label, low = 0, high = largestOf(values) }) {
  const counts = new Array(bins).fill(0);
  for (const v of values) counts[Math.min(bins - 1, Math.max(0, Math.floor(((v - low) / (high - low || 1)) * bins)))]++;
  const most = largestOf(counts, 1);
  const bars = counts.map((c, b) => {
    const height = c ? Math.max(1.5, (58 * Math.sqrt(c)) / Math.sqrt(most)) : 0;
    const range = `${number(low + (b * (high - low)) / bins, 2)} to ${number(low + ((b + 1) * (high - low)) / bins, 2)}`;
    return h(
      "rect",
      { x: (b * 240) / bins + 0.5, y: 60 - height, width: 240 / bins - 1, height, rx: 1 },
      h("title", {}, `${range}: ${plural(c, "example")}`),
    );
  });
  return h(
    "figure",
    { class: "histogram" },
    h("svg", { viewBox: "0 0 240 60", preserveAspectRatio: "none", role: "img", "aria-label": label }, bars),
    h("figcaption", {}, h("span", {}, number(low)), h("span", {}, "square-root scale"), h("span", {}, number(high))),
  );
}

/** Horizontal bars: [{label, share, base, note, href}]; `base` is a tick to compare with. */
function bars(rows, label) {
  const most = largestOf(rows.map((row) => Math.max(row.share, row.base ?? 0)));
  return h(
    "ul",
    { class: "bars", "aria-label": label },
    rows.map((row) =>
      h(
        "li",
        { title: row.note },
        h("span", { class: "name" }, isolated(row.label)),
        h(
          "span",
          { class: "track", "aria-hidden": "true" },
          h("span", { class: "fill", style: { width: `${(100 * row.share) / most}%` } }),
          row.base === undefined ? null : h("span", { class: "tick", style: { left: `${(100 * row.base) / most}%` } }),
        ),
        h(
          "span",
          { class: "amount" },
          percent(row.share),
          row.note ? h("span", { class: "offscreen" }, ` (${row.note})`) : null,
        ),
      ),
    ),
  );
}

/** Parts of a whole, side by side: [{share, colour, label, pattern}]. */
const stacked = (parts, label) =>
  h(
    "div",
    { class: "stacked", role: "img", "aria-label": label },
    parts
      .filter((part) => part.share > 0)
      .map((part) =>
        h("span", {
          class: part.pattern ?? null,
          title: `${part.label}: ${percent(part.share, 1)}`,
          style: { "flex-grow": part.share, ...(part.colour ? { background: part.colour } : {}) },
        }),
      ),
  );

/** A table whose cells are coloured by their share of the largest. */
function heatTable(rows, columns, value, label) {
  let most = 0;
  rows.forEach((_, a) =>
    columns.forEach((__, b) => {
      most = Math.max(most, value(a, b) || 0);
    }),
  );
  return h(
    "div",
    { class: "scroller", tabindex: "0", role: "region", "aria-label": label },
    h(
      "table",
      { class: columns.length > 4 ? "heat many" : "heat" },
      h("caption", { class: "offscreen" }, label),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("td", {}),
          columns.map((column) => h("th", { scope: "col" }, h("span", {}, column))),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row, a) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, row),
            columns.map((column, b) => {
              const share = value(a, b);
              if (share === null || Number.isNaN(share)) return h("td", { class: "none" });
              const said = `${row}, ${column}: ${percent(share, 1)}`;
              return h(
                "td",
                {
                  style: { background: rgb(viridis(most ? share / most : 0)) },
                  title: said,
                  onpointermove: (event) => showTip(event, said),
                  onpointerleave: hideTip,
                },
                h("span", { class: "offscreen" }, percent(share, 1)),
              );
            }),
          ),
        ),
      ),
    ),
  );
}

/** A key for viridis. */
const viridisKey = (low, high) =>
  h(
    "div",
    { class: "ramp" },
    h("span", {}, low),
    h("span", {
      class: "gradient",
      "aria-hidden": "true",
      style: { background: `linear-gradient(90deg, ${VIRIDIS.map(rgb).join(",")})` },
    }),
    h("span", {}, high),
  );

/** A canvas of w × h values drawn as squares, smooth at any size. */
function heatCanvas(width, height, colourAt, label) {
  const canvas = h("canvas", { class: "matrix", width, height, role: "img", "aria-label": label });
  const context = canvas.getContext("2d"),
    image = context.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const colour = colourAt(x, y);
      if (colour === null) continue;
      image.data.set([...colour, 255], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Where a pointer is on such a canvas. */
function cellAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return {
    x: Math.min(canvas.width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * canvas.width))),
    y: Math.min(canvas.height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * canvas.height))),
  };
}

/** About five round numbers from low to high. */
function roundTicks(low, high) {
  const rough = (high - low) / 4 || 1,
    power = 10 ** Math.floor(Math.log10(rough)),
    step = power * ([1, 2, 2.5, 5].find((m) => m * power >= rough * 0.8) ?? 10);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-9); k++) ticks.push(k * step);
  return ticks;
}

/** Lines over steps: [{name, values, colour, dash}], values between low and high, null where there is none. */
function lineChart(xs, lines, { label, low = 0, high = 1, over = "steps", format = (y) => percent(y) }) {
  const width = 640,
    height = 220,
    left = 46,
    bottom = 26,
    top = 8,
    right = 10;
  const first = xs[0],
    span = xs[xs.length - 1] - first || 1;
  const x = (v) => left + ((v - first) / span) * (width - left - right);
  const y = (v) => top + (1 - (v - low) / (high - low || 1)) * (height - top - bottom);
  const ticks = roundTicks(low, high);
  const some = xs.length > 8 ? [0, 1, 2, 3, 4].map((t) => xs[Math.round((t * (xs.length - 1)) / 4)]) : xs;
  // No label on top of another: each keeps its distance from the one before it, and from the last.
  const marks = some.reduce(
    (kept, m, at) =>
      !at || at === some.length - 1 || (x(m) - x(kept[kept.length - 1]) > 60 && x(some[some.length - 1]) - x(m) > 60)
        ? [...kept, m]
        : kept,
    [],
  );
  return h(
    "figure",
    { class: "lines" },
    h(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      ticks.map((t) =>
        h(
          "g",
          {},
          h("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
          h("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end" }, format(t)),
        ),
      ),
      marks.map((m) =>
        h(
          "text",
          { x: x(m), y: height - 8, "text-anchor": m === first ? "start" : m === xs[xs.length - 1] ? "end" : "middle" },
          count(m),
        ),
      ),
      lines.map(({ values, colour, dash, name }) => {
        const known = xs
          .map((v, i) => [v, values[i]])
          .filter(([, v]) => v !== null && v !== undefined && !Number.isNaN(v));
        const points = known.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
        return h(
          "g",
          {},
          h("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash }),
          known.map(([a, b]) =>
            h(
              "circle",
              { cx: x(a), cy: y(b), r: 2.5, fill: colour },
              h("title", {}, `${name}, ${over.replace(/s$/, "")} ${a}: ${format(b)}`),
            ),
          ),
        );
      }),
    ),
    h(
      "figcaption",
      { class: "key" },
      lines.map(({ name, colour }) => h("span", {}, h("i", { style: { background: colour } }), name)),
      h("span", { class: "muted" }, `horizontal: ${over}`),
    ),
  );
}
