// What a change of the weights did.

function changeView() {
  const change = facts.change,
    about = change.change;
  const mean = change.kl.reduce((sum, x) => sum + x, 0) / change.kl.length;
  const end = about.after ?? (about.adapters ? Object.keys(about.adapters).join(", ") : (about.method ? `a change (${about.method})` : "a change"));
  const cells = (names) => names.map((name) => h("th", { scope: "col" }, name));
  const scroller = (label, header, rows, kind = "plain") =>
    h(
      "div",
      { class: "scroller", tabindex: "0", role: "region", "aria-label": label },
      h("table", { class: kind }, h("thead", {}, h("tr", {}, cells(header))), h("tbody", {}, rows)),
    );
  const range = (pair) => (pair ? `95% interval ${number(pair[0])} to ${number(pair[1])}` : null);
  const labelOfChange = (c) => (c.new ? c.label : labelOf(c.component));
  const common = (change.groups ?? []).filter((group) => group.associations.length);
  const most = largestOf(change.components.map((c) => c.kl ?? 0));
  const components = change.components.map((c) =>
    h(
      "tr",
      { class: "change-component" },
      h(
        "th",
        { scope: "row" },
        c.new
          ? isolated(c.label)
          : h("a", { href: `#/component/${c.component}` }, isolated(line(labelOfChange(c), 40))),
        c.automatic_label
          ? h("span", { class: "block small muted" }, "auto: ", isolated(line(c.automatic_label, 60)))
          : c.new && c.top.length
            ? h("span", { class: "block small muted" }, isolated(line(lastLine(c.top[0]), 60)))
            : null,
      ),
      h(
        "td",
        { title: [range(c.kl_interval), c.kl_left == null ? null : `${number(c.kl_left)} not accounted for by those above`].filter(Boolean).join("; ") || null, class: "number" },
        number(c.kl),
        c.kl === null
          ? null
          : h(
              "span",
              { class: "meter", "aria-hidden": "true" },
              h("span", { style: { width: percent(c.kl / most) } }),
            ),
      ),
      h("td", {}, number(c.kl_over_random)),
      h("td", {}, number(c.p, 2)),
      h("td", { title: `random ${number(c.cosine_random)}, shuffled ${number(c.cosine_shuffled)}` }, number(c.cosine)),
      h("td", { title: range(c.growth_interval) }, c.growth ?? "–"),
      h("td", {}, c.before === null ? "–" : `${number(c.before)} → ${number(c.after)}`),
    ),
  );
  const answers = (rows) =>
    rows.slice(0, 100).map((row) =>
      h(
        "tr",
        {},
        h("td", { class: "number" }, number(row.kl)),
        h("td", {}, h("a", { href: `#/example/${row.index}` }, isolated(line(lastLine(titleOf(row.index)), 80)))),
        h("td", {}, isolated(line(row.before, 40) || "␣")),
        h("td", { class: "after" }, isolated(line(row.after, 40) || "␣")),
        h(
          "td",
          {},
          row.component === null
            ? "–"
            : h("a", { href: `#/component/${row.component}` }, isolated(line(labelOf(row.component), 30))),
        ),
      ),
    );
  const header = ["KL", "example", "before", "after", "component"];
  const groups = [...new Set(change.curve.flatMap((s) => Object.keys(s.accuracy)))];
  const scales = change.curve.map((s) => s.scale);
  const steps = [...change.curve, ...change.without].map((s) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, percent(s.scale)),
      h("td", {}, s.without === null ? "" : isolated(line(labelOf(s.without), 30))),
      h("td", { title: range(s.kl_interval) }, number(s.kl)),
      h("td", {}, percent(s.flips, 1)),
      groups.map((group) => h("td", {}, group in s.accuracy ? percent(s.accuracy[group], 1) : "–")),
    ),
  );
  const modules = Object.entries(change.modules).slice(0, 12);
  const outside = Object.entries(change.outside);
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h("h1", {}, "What changed"),
      h(
        "p",
        { class: "lead" },
        "From ",
        isolated(line(about.model ?? "the model", 60)),
        " to ",
        isolated(line(end, 60)),
        ".",
      ),
      h(
        "div",
        { class: "pills" },
        pill("mean KL", number(mean), range(change.kl_interval)),
        pill(change.changed.length === 1 ? "answer changed" : "answers changed", count(change.changed.length)),
        pill("norm", number(change.norm)),
        change.explained
          ? pill(
              "explained",
              `${percent(change.explained[0])} → ${percent(change.explained[1])}`,
              "What these components explain of the examples before and after",
            )
          : null,
      ),
      change.notes.map((note) => h("p", { class: "small" }, note)),
    ),
    section(
      "Components",
      scroller(
        "Components by how much the change moved their examples",
        ["component", "KL", "over random", "p", "|cosine|", "became", "mean coefficient"],
        components,
      ),
      h(
        "p",
        { class: "small muted" },
        "KL is the mean over a component's examples, weighted by their coefficients. Components are sorted by the KL that those above them do not account for. Over random is the component's share of the KL divided by its share under random changes of the weights. p is the share of random changes that give it at least as much.",
      ),
    ),
    h(
      "div",
      { class: "columns even" },
      h(
        "div",
        {},
        section(
          "From before to after",
          lineChart(
            scales,
            [
              { name: "mean KL, share of the largest", values: shareOfLargest(change.curve.map((s) => s.kl)), colour: OKABE_ITO[0] },
              ...groups.map((group, at) => ({
                name: `right: ${group}`,
                values: change.curve.map((s) => s.accuracy[group] ?? null),
                colour: OKABE_ITO[(at + 1) % OKABE_ITO.length],
                dash: "6 3",
              })),
            ],
            { label: "KL and accuracy along the change", over: "share of the change" },
          ),
          scroller("Steps of the change", ["part", "without", "KL", "answers changed", ...groups], steps),
        ),
        common.length
          ? section(
              "In common",
              common.map((group) =>
                h(
                  "div",
                  {},
                  h("p", { class: "small" }, "Examples ", isolated(line(group.name, 60))),
                  bars(
                    group.associations.slice(0, 5).map((a) => ({
                      label: line(a.feature, 60),
                      share: a.share,
                      base: a.rest,
                      note: `${percent(a.share)} of these ${count(group.examples)} examples, ${percent(a.rest)} of the others; corrected p ${number(a.corrected, 2)}`,
                    })),
                    `What examples ${line(group.name, 60)} have in common`,
                  ),
                ),
              ),
              h("p", { class: "small muted" }, "Found automatically. Each group is a quarter of the examples. The tick is the share of the others."),
            )
          : null,
        section(
          "Where",
          bars(
            modules.map(([name, share]) => ({ label: line(name, 60), share })),
            "Share of the change by parameter",
          ),
          outside.length
            ? h(
                "p",
                { class: "small muted" },
                `Not analysed: ${outside
                  .slice(0, 5)
                  .map(([name, share]) => `${line(name, 60)} (${percent(share)} of the norm)`)
                  .join(", ")}${outside.length > 5 ? ` and ${outside.length - 5} more` : ""}.`,
              )
            : null,
        ),
      ),
      h(
        "div",
        {},
        section(
          "Answers that changed",
          change.changed.length
            ? scroller("Answers that changed", header, answers(change.changed), "plain answers")
            : h("p", { class: "muted" }, "None."),
        ),
        section(
          "Changed, and explained by no component",
          change.unexplained.length
            ? scroller(
                "Changed, and explained by no component",
                [...header.slice(0, 4), "mostly"],
                answers(change.unexplained),
                "plain answers",
              )
            : h("p", { class: "muted" }, "None."),
        ),
      ),
    ),
  );
}

function shareOfLargest(values) {
  const most = largestOf(values);
  return values.map((v) => v / most);
}
