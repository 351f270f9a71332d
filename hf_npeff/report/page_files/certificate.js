// What a step along a component does where it is meant to act, where it is not, and at worst.

const mostMoved = (text, limit = 80) => isolated(line(lastLine(text), limit));

/** An example of this page as a link, a text from elsewhere, or what else is known of an input. */
function inputOf({ example, text, id }) {
  if (example !== null && example !== undefined)
    return h("a", { href: `#/example/${example}` }, mostMoved(titleOf(example)));
  if (text) return mostMoved(text);
  return id ? isolated(line(id, 40)) : h("span", { class: "muted" }, "text left out");
}

const answersOf = (row) =>
  row.before === undefined || row.before === row.after
    ? null
    : [" ", isolated(line(row.before, 24) || "␣"), " → ", h("b", {}, isolated(line(row.after, 24) || "␣"))];

/** The certificate's lines: [what, KL, interval, what else]. */
function certificateRows(j) {
  const report = facts.reports[j],
    kept = facts.components[j].evaluation ?? {};
  const best = report?.best ?? {
      top: kept.kl_top,
      others: kept.kl_others,
      other_worst: kept.kl_worst,
      other_worst_example: kept.worst_example,
      top_flips: kept.top_flips,
      other_flips: kept.other_flips,
    },
    random = report?.random?.top ?? kept.kl_random;
  const known = (x) => x !== null && x !== undefined;
  const flips = (share) => (known(share) ? `${percent(share)} of the answers changed` : "");
  const right = (pair) => (pair ? `, right ${percent(pair[0])} → ${percent(pair[1])}` : "");
  const rows = [
    ["Target: its top examples", best.top, [flips(best.top_flips), right(best.top_accuracy)]],
    ["Off target: other examples, mean", best.others, [flips(best.other_flips), right(best.other_accuracy)]],
    [
      "Off target: the worst of them",
      best.other_worst,
      known(best.other_worst_example) ? inputOf({ example: best.other_worst_example }) : "",
    ],
  ];
  const ends = (report?.searched?.ends ?? []).filter((row) => !row.own).sort((a, b) => b.kl - a.kl);
  if (ends.length)
    rows.push([
      `Off target: the worst that a search found (${plural(report.searched.tried, "input")} tried)`,
      ends[0].kl,
      [inputOf(ends[0]), answersOf(ends[0])],
    ]);
  else if (known(kept.kl_searched)) rows.push(["Off target: the worst that a search found", kept.kl_searched, ""]);
  rows.push(["Control: a random change of the same size, on its top examples", random, ""]);
  const other = report?.held_out?.steps.find((s) => !s.random)?.groups.all;
  if (other)
    rows.push([
      `Other data: ${plural(other.n, "example")}, mean`,
      other.kl,
      [flips(other.flips), right(other.accuracy)],
    ]);
  return rows.filter(([, kl]) => known(kl));
}

function certificatePanel(j) {
  const report = facts.reports[j],
    kept = facts.components[j].evaluation;
  if (!report && !(kept && "kl_top" in kept)) return null;
  const scale = report?.best?.scale ?? kept.scale;
  return section(
    "Certificate",
    h(
      "p",
      { class: "small muted" },
      `The effect of a step of ${number(scale)} along the component. KL says how far predictions move, in nats.`,
      report && report.reached === false ? " The step does not reach the KL that was asked for." : null,
    ),
    h(
      "div",
      { class: "scroller", tabindex: "0", role: "region", "aria-label": "Certificate" },
      h(
        "table",
        { class: "plain certificate" },
        h("thead", {}, h("tr", {}, ["what moves", "KL", ""].map((t) => h("th", { scope: "col" }, t)))),
        h(
          "tbody",
          {},
          certificateRows(j).map(([what, kl, more]) =>
            h("tr", {}, h("th", { scope: "row" }, what), h("td", { class: "number" }, h("b", {}, number(kl))), h("td", {}, more)),
          ),
        ),
      ),
    ),
    dosesOfSearch(report),
    worstCases(report),
  );
}

/** KL on the top examples at every step that the search tried, and on others at the steps that were kept. */
function dosesOfSearch(report) {
  const tried = report?.tried ?? [];
  if (tried.length < 2) return null;
  const others = new Map(
    [report.best, report.opposite].filter(Boolean).map((effect) => [effect.scale, effect.others]),
  );
  const points = [...tried, [0, 0]].sort((a, b) => a[0] - b[0]);
  others.set(0, 0);
  return h(
    "div",
    {},
    h("h3", {}, "KL by step size"),
    lineChart(
      points.map(([scale]) => scale),
      [
        { name: "its top examples", values: points.map(([, kl]) => kl), colour: OKABE_ITO[0] },
        { name: "others", values: points.map(([scale]) => others.get(scale) ?? null), colour: OKABE_ITO[5], dash: "6 3" },
      ],
      {
        label: "KL by the size and sign of the step, on its top examples and on others",
        over: "steps",
        high: largestOf(points.map(([, kl]) => kl)),
        format: (kl) => number(kl, 2),
      },
    ),
  );
}

/** The inputs that the step moves most although they are not the component's. */
function worstCases(report) {
  const searched = report?.searched;
  if (!searched) return null;
  const rows = [
    ...searched.worst.map((row) => [row, "as it is"]),
    ...searched.ends.map((row) => [
      row,
      `${plural(row.replaced, "token")} replaced${row.own ? "; the component is active on it, so it counts as its own" : ""}`,
    ]),
  ].sort((a, b) => b[0].kl - a[0].kl);
  return h("div", {}, h("h3", {}, "Worst off-target cases"), casesTable("Worst off-target cases", rows));
}

const casesTable = (label, rows) =>
  h(
    "div",
    { class: "scroller", tabindex: "0", role: "region", "aria-label": label },
    h(
      "table",
      { class: "plain answers" },
      h("thead", {}, h("tr", {}, ["KL", "input", "before", "after", ""].map((t) => h("th", { scope: "col" }, t)))),
      h(
        "tbody",
        {},
        rows.map(([row, how]) =>
          h(
            "tr",
            {},
            h("td", { class: "number" }, number(row.kl)),
            h("td", {}, inputOf(row)),
            h("td", {}, isolated(line(row.before, 40) || "␣")),
            h("td", { class: row.before === row.after ? null : "after" }, isolated(line(row.after, 40) || "␣")),
            h("td", { class: "muted" }, how),
          ),
        ),
      ),
    ),
  );

/** A measurement on other data: KL by dose, a line a group, and the examples that the longest step moves most. */
function measurementPanel(j) {
  const measured = facts.measurements[j] ?? facts.reports[j]?.held_out;
  if (!measured) return null;
  const own = measured.steps.filter((s) => !s.random),
    scales = [...new Set(measured.steps.map((s) => s.scale))].sort((a, b) => a - b);
  const names = Object.keys(own[0].groups);
  const at = (random, scale, name) =>
    measured.steps.find((s) => s.random === random && s.scale === scale)?.groups[name].kl ?? null;
  const lines = [
    ...names.map((name, at_) => ({
      name: line(name, 40),
      values: scales.map((scale) => at(false, scale, name)),
      colour: OKABE_ITO[at_ % OKABE_ITO.length],
    })),
    { name: "a random change", values: scales.map((scale) => at(true, scale, names[0])), colour: OTHERS, dash: "6 3" },
  ].filter(({ values }) => values.some((v) => v !== null));
  return section(
    "On other data",
    h("p", { class: "small muted" }, `Mean KL in nats on ${plural(measured.n, "example")} of other data.`),
    scales.length > 1
      ? lineChart(scales, lines, {
          label: "Mean KL by the size of the step",
          over: "steps",
          high: largestOf(lines.flatMap(({ values }) => values.map((v) => v ?? 0))),
          format: (kl) => number(kl, 2),
        })
      : null,
    h(
      "div",
      { class: "scroller", tabindex: "0", role: "region", "aria-label": "Measured on other data" },
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          {},
          h("tr", {}, ["step", "group", "examples", "KL", "answers changed", "right"].map((t) => h("th", { scope: "col" }, t))),
        ),
        h(
          "tbody",
          {},
          own.flatMap((step) =>
            Object.entries(step.groups).map(([name, effect]) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, number(step.scale)),
                h("td", {}, isolated(line(name, 40))),
                h("td", {}, count(effect.n)),
                h("td", { title: `95% interval ${effect.kl_interval.map((x) => number(x)).join(" to ")}` }, number(effect.kl)),
                h("td", {}, percent(effect.flips)),
                h("td", {}, effect.accuracy ? `${percent(effect.accuracy[0])} → ${percent(effect.accuracy[1])}` : "–"),
              ),
            ),
          ),
        ),
      ),
    ),
    measured.worst.length
      ? [
          h("h3", {}, `Moved most, at a step of ${number(measured.worst_scale)}`),
          casesTable(
            "Moved most",
            measured.worst.map((row) => [row, ""]),
          ),
        ]
      : null,
  );
}
