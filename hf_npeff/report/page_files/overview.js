// All components, a card each.

const overviewState = { sort: "number", column: null, value: "", search: "", only: "", group: "" };

const SORTS = {
  number: ["number", (j) => j],
  active: ["largest share of the examples", (j) => -facts.components[j].active],
  rare: ["smallest share of the examples", (j) => facts.components[j].active],
  purity: ["purest", (j) => -purity(j, overviewState.column).share],
  ratio: ["most selective", (j) => (missedOf(j) === null ? -(ratioOf(j) ?? -1) : 0)],
  stability: ["most stable", (j) => -(facts.components[j].stability ?? -1)],
  accuracy: ["most often wrong", (j) => facts.components[j].accuracy?.[0] ?? 2],
  error: ["largest error", (j) => -(facts.components[j].error?.[0] ?? -1)],
  association: ["most certain association", (j) => associationsOf(j)[0]?.logP ?? 1],
  name: ["name", (j) => labelOf(j).toLowerCase()],
};

function matchesSearch(j, words) {
  if (!words) return true;
  if (`${labelOf(j)} #${j}`.toLowerCase().includes(words)) return true;
  if (associationsOf(j).some((a) => [a.feature, ...a.same].some((f) => f.toLowerCase().includes(words)))) return true;
  return topFew(j).some((i) => lowered(0)[i].includes(words));
}

function chosenComponents() {
  const { sort, column, value, search, only, group } = overviewState;
  const inGroup = group === "" ? null : new Set(facts.groups[Number(group)][1]);
  const wanted = facts.components
    .map((c) => c.index)
    .filter(
      (j) =>
        matchesSearch(j, search) &&
        (inGroup === null || inGroup.has(j)) &&
        (value === "" || column === null || purity(j, column).code === Number(value)) &&
        (only !== "named" || nameOf(j) !== null) &&
        (only !== "evaluated" || ratioOf(j) !== null) &&
        (only !== "associated" || associationsOf(j).length > 0) &&
        (only !== "shaded" || facts.shading[j] !== undefined) &&
        (only !== "stable" || (facts.components[j].stability ?? 0) >= 0.9),
    );
  const key = SORTS[sort][1],
    keys = new Map(wanted.map((j) => [j, key(j)]));
  return wanted.sort((a, b) => (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : a - b));
}

function card(j) {
  const component = facts.components[j],
    top = topFew(j),
    column = overviewState.column;
  const pure = column === null || !top.length ? null : purity(j, column),
    ratio = ratioText(j);
  const about = [
    labelOf(j),
    `active on ${percent(component.active)} of the examples`,
    pure && `${percent(pure.share)} of its top examples are ${pure.value ?? "without a value"}`,
    component.automatic && `automatic label: ${line(component.automatic, 60)}`,
    ratio !== null && `KL ratio ${ratio}`,
  ]
    .filter(Boolean)
    .join(", ");
  return h(
    "a",
    { class: "card", href: `#/component/${j}`, "aria-label": about },
    h(
      "div",
      { class: "card-head" },
      h("span", { class: "badge" }, `${j}`),
      h("span", { class: nameOf(j) ? "title" : "title unnamed" }, isolated(visible(labelOf(j)))),
      ratio === null
        ? null
        : h("span", { class: "ratio", title: TERMS["KL ratio"] }, `KL ratio ${ratio}`),
    ),
    sparkline(sortedCurve(j), "Its coefficients, sorted"),
    pure === null
      ? null
      : h(
          "div",
          { class: "purity", title: "Share of its top examples" },
          h("span", { class: "meter", "aria-hidden": "true" }, h("span", { style: { width: percent(pure.share) } })),
          h("b", {}, percent(pure.share)),
          " ",
          isolated(pure.value === null ? "no value" : line(pure.value, 40)),
        ),
    component.automatic
      ? h(
          "div",
          { class: "automatic", title: "Automatic: what its examples have more often than the others" },
          h("span", { class: "muted" }, "auto: "),
          isolated(line(component.automatic, 60)),
          associationsOf(j)
            .slice(0, 1)
            .map((a) => h("span", { class: "muted" }, ` ${percent(a.share)}, others ${percent(a.rest)}`)),
        )
      : component.associations
        ? h("div", { class: "automatic muted" }, "auto: nothing in common that is certain enough")
        : null,
    h("div", { class: "snippets" }, top.length ? top.slice(0, 3).map((i) => snippet(i, 90)) : "Active on no example."),
    h(
      "div",
      { class: "card-foot" },
      h("span", {}, h("b", {}, percent(component.active)), " active"),
      component.stability === null ? null : h("span", {}, h("b", {}, number(component.stability, 2)), " stable"),
      component.accuracy ? h("span", {}, h("b", {}, percent(component.accuracy[0])), " right") : null,
    ),
  );
}

/** An example on a line, with what the model predicts for it. */
const snippet = (i, length) =>
  h(
    "span",
    { class: "snippet" },
    isolated(line(lastLine(titleOf(i)), length)),
    predictionOf(i)
      ? [facts.task === "causal-lm" ? " " : " → ", h("em", {}, isolated(line(predictionOf(i), 24) || "␣"))]
      : null,
  );

/** Of prompts with demonstrations, what is asked; other texts as they are. */
function lastLine(text) {
  const lines = text.slice(-400).split("\n");
  return lines.length > 2 && text.length < 2000 ? lines[lines.length - 1] : text;
}

function overview() {
  const columns = categories();
  if (overviewState.column === null && columns.length) {
    const best = ["relation", "label", "labels"].map((name) => columns.find((c) => c.name === name)).find(Boolean);
    overviewState.column = (best ?? columns[0]).at;
  }
  const found = h("p", { class: "found", role: "status" }),
    valueBox = h("span");
  let chosen = chosenComponents();
  const list = virtualList(chosen.length, {
    height: 232,
    minWidth: 250,
    label: "Components",
    render: (at) => card(chosen[at]),
  });
  function refresh() {
    chosen = chosenComponents();
    list.reset(chosen.length);
    found.textContent =
      chosen.length === r ? plural(r, "component") : `${count(chosen.length)} of ${plural(r, "component")}`;
  }
  function values() {
    if (overviewState.column === null) return clear(valueBox);
    const seen = new Map(
      facts.components
        .map((c) => purity(c.index, overviewState.column))
        .map(({ code, value }) => [code, value === null ? "no value" : line(value, 40)]),
    );
    const options = [...seen].sort((a, b) => (a[1] < b[1] ? -1 : 1));
    clear(
      valueBox,
      select("Mostly", [["", "any value"], ...options], overviewState.value, (v) => {
        overviewState.value = v;
        refresh();
      }),
    );
  }
  const evaluated = facts.components.some((c) => ratioOf(c.index) !== null);
  const stable = facts.components.some((c) => c.stability !== null);
  const associated = facts.components.some((c) => associationsOf(c.index).length);
  const sorts = Object.entries(SORTS).filter(
    ([key]) =>
      (key !== "purity" || columns.length) &&
      (key !== "ratio" || evaluated) &&
      (key !== "stability" || stable) &&
      (key !== "accuracy" || facts.components.some((c) => c.accuracy)) &&
      (key !== "error" || facts.components.some((c) => c.error)) &&
      (key !== "association" || associated),
  );
  const filters = [
    ["", "all"],
    ["named", "named"],
    evaluated && ["evaluated", "evaluated"],
    associated && ["associated", "with an association"],
    Object.keys(facts.shading).length && ["shaded", "with shaded tokens"],
    stable && ["stable", "stability ≥ 0.9"],
  ].filter(Boolean);
  values();
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h("h1", {}, "Components"),
      h(
        "p",
        { class: "lead" },
        `What the predictions of ${facts.model ?? "this model"} on ${plural(n, "example")} have in common. ${plural(r, "component")} explain ${percent(facts.explained, 1)} of how they depend on the weights.`,
      ),
      analysed(),
    ),
    highlights(overviewState.column),
    legend(termsHere()),
    h(
      "div",
      { class: "controls" },
      searchField("Search names and top examples", overviewState.search, (words) => {
        overviewState.search = words;
        refresh();
      }),
      select(
        "Sort by",
        sorts.map(([key, [name]]) => [key, name]),
        overviewState.sort,
        (v) => {
          overviewState.sort = v;
          refresh();
        },
      ),
      select("Show", filters, overviewState.only, (v) => {
        overviewState.only = v;
        refresh();
      }),
      facts.groups?.length
        ? select(
            "Sharing",
            [
              ["", "any association"],
              ...facts.groups.map(([feature, numbers], at) => [at, `${line(feature, 40)} (${numbers.length})`]),
            ],
            overviewState.group,
            (v) => {
              overviewState.group = v;
              refresh();
            },
          )
        : null,
      columns.length
        ? select(
            "Purity by",
            columns.map((c) => [c.at, c.name]),
            overviewState.column,
            (v) => {
              overviewState.column = Number(v);
              overviewState.value = "";
              values();
              refresh();
            },
          )
        : null,
      valueBox,
    ),
    found,
    list.element,
  );
  refresh();
}
