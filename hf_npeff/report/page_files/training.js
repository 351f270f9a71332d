// A training run: components over the steps.

const trainingState = { component: 0 };

function trainingView() {
  const { steps, explained, active } = facts.training,
    T = steps.length,
    share = arrays["training/share"];
  const at = (name, j) => Array.from({ length: T }, (_, t) => arrays[`training/${name}`][t * r + j]);
  const detail = h("div"),
    picker = h("div");
  const leading = facts.components
    .map((c) => c.index)
    .sort((a, b) => share[(T - 1) * r + b] - share[(T - 1) * r + a] || a - b);
  const most = largestOf(share);
  const canvas = heatCanvas(
    T,
    r,
    (x, y) => viridis(share[x * r + leading[y]] / most),
    `Share of the examples that each of ${r} components leads, over ${T} points`,
  );
  canvas.style.setProperty("aspect-ratio", `${Math.max(T, 12)} / ${Math.max(6, Math.min(r, 40))}`);
  canvas.addEventListener("pointermove", (event) => {
    const { x, y } = cellAt(canvas, event);
    showTip(
      event,
      isolated(labelOf(leading[y])),
      ` at step ${count(steps[x])}: leads ${percent(share[x * r + leading[y]], 1)}`,
    );
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => choose(leading[cellAt(canvas, event).y]));
  function choose(j) {
    trainingState.component = j;
    clear(
      picker,
      select(
        "Component",
        leading.map((l) => [l, labelOf(l)]),
        j,
        (v) => choose(Number(v)),
      ),
    );
    clear(
      detail,
      lineChart(
        steps,
        [
          { name: "share of examples led", values: at("share", j), colour: OKABE_ITO[0] },
          { name: "|cosine| with the point before", values: at("cosine", j), colour: OKABE_ITO[5], dash: "6 3" },
          {
            name: "correlation with the point before",
            values: at("correlation", j),
            colour: OKABE_ITO[2],
            dash: "2 3",
          },
          ...[
            ["accuracy", "right on its examples", OKABE_ITO[3]],
            ["associated", "its examples with what they have in common", OKABE_ITO[4]],
          ]
            .map(([key, name, colour]) => ({ name, values: at(key, j), colour, dash: "4 2" }))
            .filter((l) => l.values.some((v) => !Number.isNaN(v))),
        ],
        { label: `Component ${j} over the steps` },
      ),
      facts.training.association[j]
        ? h("p", { class: "small muted" }, "In common at the last point (automatic): ", isolated(line(facts.training.association[j], 80)))
        : null,
      h("p", {}, h("a", { href: `#/component/${j}` }, "Open this component")),
    );
  }
  choose(trainingState.component);
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h("h1", {}, "Training run"),
      h("p", { class: "lead" }, `${plural(T, "point")} from step ${count(steps[0])} to ${count(steps[T - 1])}.`),
    ),
    h(
      "div",
      { class: "columns even" },
      h(
        "div",
        {},
        section(
          "Explained",
          lineChart(
            steps,
            [
              { name: "explained fraction", values: explained, colour: OKABE_ITO[0] },
              {
                name: "components in use",
                values: active.map((a) => (a === null ? null : a / r)),
                colour: OKABE_ITO[1],
                dash: "6 3",
              },
            ],
            { label: "Explained fraction and share of components in use over the steps" },
          ),
        ),
        section("One component", picker, detail),
      ),
      section(
        "All components",
        h(
          "div",
          { class: "labelled" },
          h(
            "div",
            { class: "rows", "aria-hidden": "true" },
            leading.map((j, y) => h("span", {}, r <= 40 || y % Math.ceil(r / 40) === 0 ? isolated(line(labelOf(j), 18)) : "")),
          ),
          canvas,
          h(
            "div",
            { class: "steps", "aria-hidden": "true" },
            steps.map((step, x) => h("span", {}, T <= 8 || x % Math.ceil(T / 8) === 0 ? count(step) : "")),
          ),
        ),
        h("p", { class: "small muted" }, "Rows: components. Columns: optimizer steps."),
        viridisKey("0", percent(most)),
        h(
          "p",
          { class: "small muted" },
          "Each row is a component. The one that leads most examples at the end is at the top. Steps run from left to right. Click a row to select it.",
        ),
      ),
    ),
  );
}
