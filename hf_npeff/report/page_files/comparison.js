// This decomposition beside another.

function comparisonView() {
  const { pairs, components, measure, model, revision, explained } = facts.comparison,
    others = components.length;
  const similarity = (i, j) => arrays.similarity[i * others + j] / 127;
  // Matched pairs go along the diagonal, what found no partner after them.
  const rows = [...pairs.map(([i]) => i)],
    columns = [...pairs.map(([, j]) => j)];
  for (let i = 0; i < r; i++) if (!rows.includes(i)) rows.push(i);
  for (let j = 0; j < others; j++) if (!columns.includes(j)) columns.push(j);
  const canvas = heatCanvas(
    others,
    r,
    (x, y) => viridis(Math.max(0, similarity(rows[y], columns[x]))),
    `Similarity of ${r} components with ${others}, matched pairs along the diagonal`,
  );
  const otherLabel = (j) => components[j].label;
  const say = (i, j) => [
    h("b", {}, isolated(line(labelOf(i), 50))),
    " and ",
    h("b", {}, isolated(line(otherLabel(j), 50))),
    `: ${number(similarity(i, j), 2)}`,
  ];
  canvas.addEventListener("pointermove", (event) => {
    const { x, y } = cellAt(canvas, event);
    showTip(event, ...say(rows[y], columns[x]));
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => {
    hideTip();
    location.hash = `#/component/${rows[cellAt(canvas, event).y]}`;
  });
  const mean = pairs.reduce((sum, [, , s]) => sum + s, 0) / Math.max(pairs.length, 1),
    close = pairs.filter(([, , s]) => s > 0.9).length;
  const list = virtualList(pairs.length, {
    height: 98,
    minWidth: 420,
    label: "Matched components",
    render: (at) => {
      const [i, j, s] = pairs[at];
      return h(
        "div",
        { class: "card pair" },
        h(
          "a",
          { href: `#/component/${i}` },
          h("span", { class: "badge" }, `${i}`),
          isolated(line(labelOf(i), 36)),
          h(
            "span",
            { class: "snippet" },
            topFew(i)
              .slice(0, 2)
              .map((e) => isolated(line(lastLine(titleOf(e)), 60), { class: "block" })),
          ),
        ),
        h(
          "span",
          { class: "similarity", title: measure },
          number(s, 2),
          h(
            "span",
            { class: "meter", "aria-hidden": "true" },
            h("span", { style: { width: percent(Math.max(0, s)) } }),
          ),
        ),
        h(
          "div",
          {},
          h("span", { class: "badge other" }, `${j}`),
          isolated(line(otherLabel(j), 36)),
          h(
            "span",
            { class: "snippet" },
            components[j].top.slice(0, 2).map(([text]) => isolated(line(lastLine(text), 60), { class: "block" })),
          ),
        ),
      );
    },
  });
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h("h1", {}, "Comparison"),
      h(
        "p",
        { class: "lead" },
        `${plural(r, "component")} here (${percent(facts.explained, 1)} explained) and ${plural(others, "component")} of `,
        isolated(model ?? "another decomposition"),
        revision ? ` at ${revision.slice(0, 7)}` : "",
        ` (${percent(explained, 1)} explained), by ${measure}.`,
      ),
      h(
        "div",
        { class: "pills" },
        pill("mean of the matched pairs", number(mean, 2)),
        pill(`of ${pairs.length} above 0.9`, String(close)),
      ),
    ),
    h(
      "div",
      { class: "columns even" },
      section(
        "Matrix",
        canvas,
        viridisKey("0", "1"),
        h(
          "p",
          { class: "small muted" },
          "Rows are the components of this decomposition, columns those of the other. Matched pairs lie on the diagonal, the most similar first.",
        ),
      ),
      section("Matched pairs", list.element),
    ),
  );
}
