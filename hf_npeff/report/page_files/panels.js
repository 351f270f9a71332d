// Where a component is active, in which modules it lives, and what is near to it.

function associationsPanel(j) {
  const found = associationsOf(j);
  if (facts.components[j].associations === undefined) return null;
  if (!found.length)
    return section(
      "In common",
      h("p", { class: "muted" }, "Its examples have nothing more often than the others that is certain enough."),
    );
  return section(
    "In common",
    bars(
      found.map((a) => ({
        label: line(a.feature, 60),
        share: a.share,
        base: a.rest,
        note:
          `${percent(a.share)} of its examples, ${percent(a.rest)} of the others; corrected p ${number(a.corrected, 2)}` +
          (a.same.length ? `; on the same examples: ${a.same.map((s) => line(s, 40)).join(", ")}` : ""),
      })),
      "What its examples have in common",
    ),
    h(
      "p",
      { class: "small muted" },
      "Found automatically: words and column values that its examples have more often than the others. The tick is the share of the others. Significance is corrected for everything that was tried.",
    ),
  );
}

function columnPanel(j) {
  const usable = colourable();
  if (!usable.length) return null;
  const body = h("div");
  componentState.column ??= (usable.find((c) => c.name === "prediction") && overviewState.column) ?? usable[0].at;
  if (!usable.some((c) => c.at === componentState.column)) componentState.column = usable[0].at;
  const active = [];
  for (let i = 0; i < n; i++) if (isActive(j, i)) active.push(i);
  function draw() {
    const column = facts.columns[componentState.column],
      data = arrays[`column/${componentState.column}`];
    if (column.kind === "number") {
      const known = [...data].filter((v) => !Number.isNaN(v)),
        low = smallestOf(known),
        high = largestOf(known, -Infinity);
      const label = `${column.name} of the examples on which it is active`;
      clear(
        body,
        known.length
          ? histogram(
              active.map((i) => data[i]).filter((v) => !Number.isNaN(v)),
              { label, low, high },
            )
          : "No values.",
      );
      return;
    }
    const all = new Map(),
      here = new Map();
    for (let i = 0; i < n; i++) all.set(data[i], (all.get(data[i]) ?? 0) + 1);
    for (const i of active) here.set(data[i], (here.get(data[i]) ?? 0) + 1);
    const codes = [...here.keys()].sort((a, b) => here.get(b) - here.get(a) || a - b),
      shown = codes.slice(0, 12);
    const rows = shown.map((code) => ({
      label:
        column.values[code] === null ? "no value" : line(visible(column.values[code]).replace(/\n/g, "↵"), 40) || "␣",
      share: here.get(code) / active.length,
      base: all.get(code) / n,
      note: `${count(here.get(code))} of its ${plural(active.length, "example")}; ${percent(all.get(code) / n, 1)} of all`,
    }));
    clear(
      body,
      bars(rows, `${column.name} of the examples on which it is active`),
      codes.length > 12 ? h("p", { class: "small muted" }, `and ${plural(codes.length - 12, "other value")}`) : null,
      h(
        "p",
        { class: "small muted" },
        `The ${plural(active.length, "example")} on which it is active. The tick is the share of all examples.`,
      ),
    );
  }
  draw();
  return section(
    "By column",
    usable.length > 1
      ? select(
          "Column",
          usable.map((c) => [c.at, c.name]),
          componentState.column,
          (v) => {
            componentState.column = Number(v);
            draw();
          },
        )
      : h("p", { class: "muted" }, usable[0].name),
    body,
  );
}

function modulesPanel(j) {
  if (!facts.modules) return null;
  const { layers, kinds, exact } = facts.modules,
    size = layers.length * kinds.length;
  const value = (a, b) => arrays.energy[j * size + a * kinds.length + b];
  const all = layers
    .flatMap((layer, a) => kinds.map((kind, b) => [layer, kind, value(a, b)]))
    .filter(([, , v]) => !Number.isNaN(v));
  if (!all.length) return section("Where it lives", h("p", { class: "muted" }, "This component was not lifted."));
  all.sort((a, b) => b[2] - a[2]);
  return section(
    "Where it lives",
    h(
      "p",
      { class: "small" },
      "Most of its energy: ",
      all
        .slice(0, 3)
        .map(([layer, kind, v], at) => `${at ? ", " : ""}${layer === "other" ? "" : `layer ${layer} `}${kind} ${percent(v)}`)
        .join(""),
    ),
    heatTable(layers, kinds, value, "Share of its energy by layer and kind of module"),
    viridisKey("0", percent(all[0][2], 1)),
    exact.includes(j) ? null : h("p", { class: "small muted" }, "Estimated from the blocks of the sketch."),
  );
}

function neighboursPanel(j) {
  if (!arrays.near) return null;
  const k = arrays.near.shape[1];
  return section(
    "Neighbours",
    h(
      "ul",
      { class: "neighbours" },
      Array.from({ length: k }, (_, a) => {
        const other = arrays.near[j * k + a],
          cosine = arrays.near_cosine[j * k + a];
        return h(
          "li",
          {},
          h(
            "a",
            { href: `#/component/${other}` },
            h("span", { class: "badge" }, `${other}`),
            isolated(line(labelOf(other), 40)),
          ),
          h(
            "span",
            { class: "meter", "aria-hidden": "true" },
            h("span", { style: { width: percent(Math.abs(cosine)) } }),
          ),
          h("span", { class: "amount" }, cosine.toFixed(2)),
        );
      }),
    ),
    h("p", { class: "small muted" }, "The components with the largest |cosine| of pseudo-Fishers. The sign is arbitrary."),
  );
}
