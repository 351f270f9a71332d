// One component.

const FIRST = 8; // top examples before "show more"
const componentState = { shade: true, column: null };

function verdict(i) {
  const correct = correctOf(i),
    truth = truthOf(i),
    predicted = predictionOf(i);
  if (predicted === null && truth === null) return null;
  const cut = (text) => line(text.replace(/\n/g, "↵"), 60) || "␣";
  return h(
    "span",
    { class: "verdict" },
    predicted === null ? null : [h("span", { class: "muted" }, "predicts "), h("b", {}, isolated(cut(predicted)))],
    truth === null
      ? null
      : [
          h("span", { class: "muted" }, `${predicted === null ? "" : " · "}${facts.columns[truthColumn()].name} `),
          isolated(cut(truth)),
        ],
    correct === null ? null : h("span", { class: `mark-${correct}` }, correct === "right" ? " ✓ right" : " ✗ wrong"),
  );
}

function topExample(j, i, largest) {
  const shading = componentState.shade ? shadingOf(j, i) : null;
  return h(
    "li",
    { class: "example" },
    h(
      "div",
      { class: "example-head" },
      h(
        "span",
        { class: "weight", title: "Coefficient" },
        h(
          "span",
          { class: "meter", "aria-hidden": "true" },
          h("span", { style: { width: percent(coefficient(j, i) / largest) } }),
        ),
        number(coefficient(j, i)),
      ),
      verdict(i),
      h("a", { href: `#/example/${i}`, class: "goto" }, "example ", isolated(line(facts.ids[i], 40))),
    ),
    shading ? shadedText(shading) : foldedText(titleOf(i), 600),
    shading ? h("p", { class: "small muted" }, shadingSentence(shading)) : null,
  );
}

function topExamples(j) {
  const order = ranked(j),
    items = h("ol", { class: "examples" }),
    largest = order.length ? coefficient(j, order[0]) : 1;
  let shown = 0;
  const more = h("button", { type: "button", class: "quiet", onclick: () => add(25) }, "Show 25 more");
  function add(amount) {
    items.append(...order.slice(shown, shown + amount).map((i) => topExample(j, i, largest)));
    shown = Math.min(order.length, shown + amount);
    more.hidden = shown >= order.length;
  }
  add(FIRST);
  const anyShading = facts.shading[j] !== undefined;
  return section(
    "Top examples",
    anyShading
      ? h(
          "div",
          { class: "row" },
          checkbox("Shade tokens", componentState.shade, (on) => {
            componentState.shade = on;
            clear(items);
            shown = 0;
            add(FIRST);
          }),
          h(
            "span",
            { class: "small key" },
            h("span", {}, h("i", { class: "for" }), "adds to the alignment"),
            h("span", {}, h("i", { class: "against" }), "takes from it"),
          ),
        )
      : null,
    order.length ? [items, more] : h("p", { class: "muted" }, "Not active on any example."),
  );
}

function componentView(j) {
  const component = facts.components[j],
    previous = (j + r - 1) % r,
    next = (j + 1) % r,
    ratio = ratioText(j);
  const field = h("input", {
    class: "rename",
    id: "rename",
    value: nameOf(j) ?? "",
    placeholder: `component ${j} – give it a name`,
    maxlength: 200,
    "aria-label": `Name of component ${j}`,
    dir: "auto",
    onchange: (event) => {
      rename(j, event.target.value);
      setTitle(labelOf(j));
    },
    onkeydown: (event) => {
      if (event.key === "Enter") event.target.blur();
    },
  });
  const values = stored(j),
    nonzero = [];
  for (let i = 0; i < n; i++) if (values[i]) nonzero.push(values[i] * scaleOf(j));
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h(
        "div",
        { class: "crumbs" },
        h("a", { href: "#/" }, "All components"),
        h("span", { class: "spacer" }),
        h(
          "a",
          { href: `#/component/${previous}`, "aria-label": "Previous component" },
          "← ",
          h("span", { class: "badge" }, `${previous}`),
        ),
        h(
          "a",
          { href: `#/component/${next}`, "aria-label": "Next component" },
          h("span", { class: "badge" }, `${next}`),
          " →",
        ),
      ),
      h("h1", { class: "offscreen" }, `Component ${j}`),
      h("div", { class: "naming" }, h("span", { class: "badge large", "aria-hidden": "true" }, `${j}`), field),
      h(
        "div",
        { class: "pills" },
        pill("active", percent(component.active, 1), TERMS.active),
        component.stability === null
          ? null
          : pill("stable", number(component.stability, 2), TERMS.stable),
        pillInAndOut("right", component.accuracy, percent),
        pillInAndOut("mean error", component.error, number),
        ratio === null ? null : pill("KL ratio", ratio, TERMS["KL ratio"]),
        categories()
          .slice(0, 3)
          .map((c) => {
            const { value, share } = purity(j, c.at);
            return share >= 0.3
              ? pill(
                  `${c.name}: ${line(value ?? "no value", 30)}`,
                  percent(share),
                  `Of its top ${topFew(j).length} examples`,
                )
              : null;
          }),
        component.automatic
          ? h("span", { class: "pill", title: TERMS.auto }, "auto: ", isolated(line(component.automatic, 60)))
          : null,
        copyCodeButton(j),
      ),
      legend(
        ["active", component.stability !== null && "stable", component.accuracy && "right", component.error && "mean error",
          ratio !== null && "KL ratio", component.automatic && "auto"].filter(Boolean),
      ),
    ),
    h(
      "div",
      { class: "columns" },
      h("div", {}, topExamples(j), certificatePanel(j), effectPanel(j), measurementPanel(j)),
      h(
        "div",
        {},
        section(
          "Coefficients",
          histogram(nonzero, { label: `Histogram of its ${plural(nonzero.length, "coefficient")} above zero` }),
          h(
            "p",
            { class: "small muted" },
            `${plural(nonzero.length, "example")} above zero, ${count(n - nonzero.length)} at zero`,
          ),
        ),
        associationsPanel(j),
        columnPanel(j),
        modulesPanel(j),
        neighboursPanel(j),
        codePanel(j),
      ),
    ),
  );
  setTitle(labelOf(j));
}

/** A number on a component's examples, and in words that on the others; nothing where it is not known. */
function pillInAndOut(name, pair, shown) {
  return pair ? pill(name, shown(pair[0]), `On its examples; on the others ${shown(pair[1])}`) : null;
}
