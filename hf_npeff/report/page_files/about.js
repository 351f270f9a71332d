// What this page is about and how to read it.

function aboutView() {
  const settings = (values) =>
    h(
      "dl",
      {},
      Object.entries(values).map(([name, value]) => [
        h("dt", {}, name.replaceAll("_", " ")),
        h("dd", {}, isolated(typeof value === "object" ? JSON.stringify(value) : String(value))),
      ]),
    );
  clear(
    main,
    h("div", { class: "hero" }, h("h1", {}, "About this page")),
    h(
      "div",
      { class: "columns even" },
      h(
        "div",
        {},
        section(
          "How to read it",
          h(
            "p",
            {},
            "NPEFF looks at how each prediction depends on the weights (the Fisher information of the example), and writes these dependencies as non-negative mixtures of components that examples share. A component is a direction in the weights: its top examples are those whose predictions depend most on it.",
          ),
          h(
            "p",
            {},
            "Purity is the share of the most common value among a component's top ",
            String(TOP),
            " examples.",
          ),
          legend(Object.keys(TERMS)),
          h("p", {}, "Coefficients are rounded to 16 bits of each component's largest."),
        ),
        facts.notes.length
          ? section(
              "What is not here",
              h(
                "ul",
                {},
                facts.notes.map((note) => h("li", {}, note)),
              ),
            )
          : null,
        section(
          "Names",
          h(
            "p",
            {},
            "Names that you give stay in this browser. Save them as a file, which hf-npeff can read: ",
            h("code", {}, "hf-npeff components DIR --names names.json"),
          ),
          h(
            "div",
            { class: "row" },
            h(
              "button",
              { type: "button", class: "quiet", onclick: () => download("names.json", namesFile()) },
              "Save names",
            ),
            h(
              "button",
              {
                type: "button",
                class: "quiet",
                onclick: () => {
                  given.clear();
                  try {
                    localStorage.removeItem(NAMES_KEY());
                  } catch {
                    /* none */
                  }
                  showNamesButton();
                },
              },
              "Forget mine",
            ),
          ),
        ),
      ),
      h(
        "div",
        {},
        section(
          "Decomposition",
          settings({
            model: facts.model ?? "rows not made by hf_npeff",
            revision: facts.revision ?? "–",
            architecture: facts.architecture ?? "–",
            task: facts.task ?? "–",
            examples: count(n),
            components: count(r),
            explained: percent(facts.explained, 1),
            converged: facts.converged ? "yes" : "no",
            "sketch error": number(facts.sketch_error),
            "made with": `hf_npeff ${facts.version}`,
          }),
        ),
        facts.losses.length > 1
          ? section(
              "Loss",
              lineChart(
                facts.losses.map((_, i) => i),
                [{ name: "relative loss", values: facts.losses, colour: OKABE_ITO[0] }],
                {
                  label: "Relative loss over the iterations",
                  over: "iterations",
                  low: smallestOf(facts.losses) * 0.95,
                  high: largestOf(facts.losses),
                  format: (y) => number(y),
                },
              ),
            )
          : null,
        section("Settings", settings(facts.settings)),
        section("Fisher settings", settings(facts.fisher)),
      ),
    ),
  );
}
