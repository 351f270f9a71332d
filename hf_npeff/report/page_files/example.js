// Examples: a list of all, and one of them.

const exampleState = { search: "", sort: "order", column: "", value: "" };

const EXAMPLE_SORTS = {
  order: ["as analysed", (i) => i],
  best: ["best explained", (i) => -arrays.explained[i]],
  worst: ["least explained", (i) => arrays.explained[i]],
};

function examplesView() {
  const columns = categories(),
    found = h("p", { class: "found", role: "status" }),
    valueBox = h("span");
  let order = [];
  const list = virtualList(0, {
    height: 66,
    minWidth: 460,
    gap: 8,
    label: "Examples",
    render: (at) => exampleRow(order[at]),
  });
  function refresh() {
    const { search, sort, column, value } = exampleState,
      key = EXAMPLE_SORTS[sort][1];
    order = [];
    for (let i = 0; i < n; i++) {
      if (
        (!search || lowered(0)[i].includes(search)) &&
        (value === "" || arrays[`column/${column}`][i] === Number(value))
      )
        order.push(i);
    }
    order.sort((a, b) => key(a) - key(b) || a - b);
    list.reset(order.length);
    found.textContent = order.length === n ? plural(n, "example") : `${count(order.length)} of ${plural(n, "example")}`;
  }
  function values() {
    if (exampleState.column === "") return clear(valueBox);
    const options = facts.columns[Number(exampleState.column)].values.map((v, code) => [
      code,
      v === null ? "no value" : line(v, 40) || "␣",
    ]);
    clear(
      valueBox,
      select("is", [["", "anything"], ...options], exampleState.value, (v) => {
        exampleState.value = v;
        refresh();
      }),
    );
  }
  values();
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h("h1", {}, "Examples"),
      h("p", { class: "lead" }, "Every example and how much of it the components explain."),
    ),
    h(
      "div",
      { class: "controls" },
      searchField("Search texts and predictions", exampleState.search, (words) => {
        exampleState.search = words;
        refresh();
      }),
      select(
        "Sort by",
        Object.entries(EXAMPLE_SORTS).map(([key, [name]]) => [key, name]),
        exampleState.sort,
        (v) => {
          exampleState.sort = v;
          refresh();
        },
      ),
      columns.length
        ? select("Where", [["", "no filter"], ...columns.map((c) => [c.at, c.name])], exampleState.column, (v) => {
            exampleState.column = v;
            exampleState.value = "";
            values();
            refresh();
          })
        : null,
      valueBox,
    ),
    found,
    list.element,
  );
  refresh();
}

function exampleRow(i) {
  const { parts, total } = explanation(i);
  return h(
    "a",
    { class: "card example-row", href: `#/example/${i}` },
    snippet(i, 120),
    h(
      "span",
      { class: "small muted" },
      h(
        "span",
        { class: "meter", "aria-hidden": "true" },
        h("span", { style: { width: percent(Math.min(1, total)) } }),
      ),
      ` ${percent(total)} explained`,
      parts.length ? ` · ${line(labelOf(parts[0].component), 40)}` : "",
    ),
  );
}

function exampleView(i) {
  const { parts, total, others, left } = explanation(i);
  const coloured = parts.map((part, at) => ({
    ...part,
    label: labelOf(part.component),
    colour: OKABE_ITO[at % OKABE_ITO.length],
  }));
  const segments = [
    ...coloured,
    { share: others, label: "other components", colour: OTHERS },
    { share: left, label: "not explained", pattern: "left" },
  ];
  const shadings = parts.map((part) => part.component).filter((j) => shadingOf(j, i)),
    textBox = h("div");
  let shown = shadings[0] ?? null;
  function drawText() {
    const shading = shown === null ? null : shadingOf(shown, i);
    clear(
      textBox,
      shading
        ? [shadedText(shading), h("p", { class: "small muted" }, shadingSentence(shading))]
        : foldedText(titleOf(i), 4000),
    );
  }
  drawText();
  const near = nearestExamples(i, 10);
  const facts_ = facts.columns.map((column, at) => [column.name, valueOf(at, i)]).filter(([, value]) => value !== null);
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h(
        "div",
        { class: "crumbs" },
        h("a", { href: "#/examples" }, "All examples"),
        h("span", { class: "spacer" }),
        h("a", { href: `#/example/${(i + n - 1) % n}`, "aria-label": "Previous example" }, "←"),
        h("a", { href: `#/example/${(i + 1) % n}`, "aria-label": "Next example" }, "→"),
      ),
      h("h1", {}, "Example ", isolated(line(facts.ids[i], 60))),
      h("div", { class: "pills" }, verdict(i)),
    ),
    h(
      "div",
      { class: "columns" },
      h(
        "div",
        {},
        section(
          "Text",
          shadings.length
            ? select("Shaded for", [...shadings.map((j) => [j, labelOf(j)]), ["", "nothing"]], shown, (v) => {
                shown = v === "" ? null : Number(v);
                drawText();
              })
            : null,
          textBox,
        ),
        section(
          "What explains it",
          h(
            "p",
            {},
            h("b", {}, percent(total, 1)),
            " of this example's Fisher is explained; ",
            h("b", {}, percent(left, 1)),
            " is left.",
          ),
          stacked(
            segments,
            `Explained ${percent(total)}: ${coloured.map((p) => `${p.label} ${percent(p.share)}`).join(", ")}`,
          ),
          h(
            "ul",
            { class: "legend" },
            segments
              .filter((s) => s.share > 0.0005)
              .map((segment) =>
                h(
                  "li",
                  {},
                  h("i", {
                    class: segment.pattern ?? null,
                    style: segment.colour ? { background: segment.colour } : {},
                  }),
                  segment.component === undefined
                    ? h("span", {}, segment.label)
                    : h(
                        "a",
                        { href: `#/component/${segment.component}` },
                        h("span", { class: "badge" }, `${segment.component}`),
                        isolated(line(segment.label, 50)),
                      ),
                  h("span", { class: "amount" }, percent(segment.share, 1)),
                ),
              ),
          ),
        ),
      ),
      h(
        "div",
        {},
        facts_.length
          ? section(
              "Columns",
              h(
                "dl",
                {},
                facts_.map(([name, value]) => [
                  h("dt", {}, isolated(name)),
                  h("dd", {}, isolated(line(value, 300) || "␣")),
                ]),
              ),
            )
          : null,
        section(
          "Nearest examples",
          near.length
            ? h(
                "ul",
                { class: "neighbours" },
                near.map(({ example, cosine }) =>
                  h(
                    "li",
                    {},
                    h("a", { href: `#/example/${example}` }, snippet(example, 60)),
                    h("span", { class: "amount" }, cosine.toFixed(2)),
                  ),
                ),
              )
            : h("p", { class: "muted" }, "No other example shares a component with it."),
          h("p", { class: "small muted" }, "By cosine of their coefficients."),
        ),
      ),
    ),
  );
  setTitle(`Example ${line(facts.ids[i], 40)}`);
}
