// The data of this page: unpacked once, read everywhere.

const TOP = 12; // the top examples that purity and search look at
const KINDS = {
  uint8: Uint8Array,
  int8: Int8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  float32: Float32Array,
};

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64); // many times faster, in browsers since 2025
  const text = atob(base64),
    bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const [name, { type, shape, at }] of Object.entries(facts.arrays)) {
    const count = shape.reduce((a, b) => a * b, 1);
    arrays[name] = Object.assign(new KINDS[type](buffer, 4 + length + at, count), { shape });
  }
  return { facts, arrays };
}

let facts, arrays, n, r;
const cache = new Map();

/** A function of one component, computed once for each. */
const once = (name, compute) => (j) => {
  const key = `${name}/${j}`;
  if (!cache.has(key)) cache.set(key, compute(j));
  return cache.get(key);
};

async function loadData() {
  ({ facts, arrays } = await unpack(document.getElementById("data").textContent));
  document.getElementById("data").remove();
  ({ n, r } = facts);
  facts.components.forEach((component, j) => {
    component.index = j;
  });
}

/** Stored coefficients of component j: 16 bits of the largest. */
const stored = (j) => arrays.W.subarray(j * n, (j + 1) * n);
const scaleOf = (j) => arrays.W_largest[j] / 65535;
const coefficient = (j, i) => arrays.W[j * n + i] * scaleOf(j);

/** Whether component j is active on example i, as Python found: a bit each, the first in the highest place. */
const isActive = (j, i) => (arrays.active[j * arrays.active.shape[1] + (i >> 3)] >> (7 - (i & 7))) & 1;

/** The examples with the largest coefficients, at most TOP of them and none without any. */
const topFew = once("topFew", (j) => {
  const w = stored(j),
    best = [];
  let least = 0;
  for (let i = 0; i < n; i++) {
    if (w[i] <= least) continue;
    let at = best.length;
    while (at > 0 && w[best[at - 1]] < w[i]) at--;
    best.splice(at, 0, i);
    if (best.length > TOP) best.pop();
    if (best.length === TOP) least = w[best[TOP - 1]];
  }
  return best;
});

/** All examples with a coefficient, the largest first. */
function ranked(j) {
  const w = stored(j),
    found = [];
  for (let i = 0; i < n; i++) if (w[i] > 0) found.push(i);
  return found.sort((a, b) => w[b] - w[a] || a - b);
}

/** Coefficients sorted and thinned to points between 0 and 1, for a sparkline. */
const sortedCurve = once("curve", (j) => {
  const w = Uint16Array.from(stored(j)).sort(),
    points = Math.min(n, 64);
  return Array.from({ length: points }, (_, p) => {
    const at = points === 1 ? 0 : Math.round((p * (n - 1)) / (points - 1));
    return w[n - 1 - at] / 65535;
  });
});

// Columns

const columnNamed = (name) => facts.columns.findIndex((column) => column.name === name);
const categories = () => facts.columns.map((c, at) => ({ ...c, at })).filter((c) => c.kind === "category");
const colourable = () => facts.columns.map((c, at) => ({ ...c, at })).filter((c) => c.kind !== "text");

/** The value of an example in a column as text; null where there is none. */
function valueOf(at, i) {
  const column = facts.columns[at];
  if (column.kind === "text") return column.values[i];
  const value = arrays[`column/${at}`][i];
  if (column.kind === "number") return Number.isNaN(value) ? null : number(value);
  return column.values[value];
}

/** The most common value among a component's top examples, and its share. */
function purity(j, at) {
  const top = topFew(j),
    counts = new Map();
  for (const i of top) {
    const code = arrays[`column/${at}`][i];
    counts.set(code, (counts.get(code) ?? 0) + 1);
  }
  let best = null;
  for (const [code, count] of counts) if (best === null || count > counts.get(best)) best = code;
  return best === null
    ? { code: -1, value: null, share: 0 }
    : { code: best, value: facts.columns[at].values[best], share: counts.get(best) / top.length };
}

/** What a component's examples have in common, the most certain first. */
const associationsOf = (j) =>
  (facts.components[j].associations ?? []).map(([feature, share, rest, corrected, same, logP]) => ({
    feature,
    share,
    rest,
    corrected,
    same,
    logP,
  }));

// Examples

const textOf = (i) => facts.text?.[i] ?? null;
const titleOf = (i) => textOf(i) ?? facts.ids[i];
const named = (...names) => names.map(columnNamed).find((at) => at >= 0);
const predictionOf = (i) => (named("prediction") === undefined ? null : valueOf(named("prediction"), i));
const truthColumn = () => named("label", "labels", "answer", "target");
const truthOf = (i) => (truthColumn() === undefined ? null : valueOf(truthColumn(), i));
const correctOf = (i) => (named("prediction correct") === undefined ? null : valueOf(named("prediction correct"), i));

const lowered = once("lowered", () =>
  Array.from({ length: n }, (_, i) => `${titleOf(i)}\n${predictionOf(i) ?? ""}`.toLowerCase()),
);

/** What explains an example: the components that bring most, the rest together, and what is left. */
function explanation(i) {
  const k = arrays.part.shape[1],
    parts = [];
  let named = 0;
  for (let a = 0; a < k; a++) {
    const share = arrays.part[i * k + a];
    if (share > 0) parts.push({ component: arrays.part_component[i * k + a], share });
    named += Math.max(share, 0);
  }
  const total = arrays.explained[i];
  return { parts, total, others: Math.max(total - named, 0), left: Math.max(1 - total, 0) };
}

const lengths = once("lengths", () => {
  const squares = new Float64Array(n);
  for (let j = 0; j < r; j++) {
    const w = stored(j),
      scale = scaleOf(j);
    for (let i = 0; i < n; i++) squares[i] += (w[i] * scale) ** 2;
  }
  return squares.map(Math.sqrt);
});

/** The examples with the most similar mixture of components, by cosine of their coefficients. */
function nearestExamples(i, count) {
  const dots = new Float64Array(n);
  for (let j = 0; j < r; j++) {
    const scale = scaleOf(j),
      own = coefficient(j, i);
    if (own === 0) continue;
    const w = stored(j);
    for (let l = 0; l < n; l++) dots[l] += own * scale * w[l];
  }
  const size = lengths(0);
  const cosines = dots.map((dot, l) => (l === i || !size[l] || !size[i] ? -1 : dot / (size[l] * size[i])));
  return Array.from(cosines.keys())
    .filter((l) => cosines[l] > 0)
    .sort((a, b) => cosines[b] - cosines[a] || a - b)
    .slice(0, count)
    .map((l) => ({ example: l, cosine: cosines[l] }));
}

const shadingOf = (j, i) => facts.shading[j]?.find((one) => one.example === i) ?? null;
const ratioOf = (j) => facts.components[j].evaluation?.ratio ?? facts.reports[j]?.best?.ratio ?? null;

/** The KL on its top examples if no step reached the KL that was wanted; the ratio of so short a step says little. */
const missedOf = (j) => {
  const kept = facts.components[j].evaluation,
    report = facts.reports[j];
  if (kept?.ratio !== undefined) return kept.reached === false ? (kept.kl_top ?? 0) : null;
  return report?.reached === false ? report.best.top : null;
};
/** The ratio of a component, and the KL of its step if that was too small; null if it was not measured. */
const ratioText = (j) => {
  const ratio = ratioOf(j),
    missed = missedOf(j);
  if (ratio === null) return null;
  return missed === null ? number(ratio, 2) : `${number(ratio, 2)} at a KL of only ${number(missed, 2)}`;
};
