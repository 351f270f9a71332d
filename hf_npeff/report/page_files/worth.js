// What is worth a look first, and what the words on the page mean.

const TERMS = {
  active: "the share of the examples on which the component has more than 5% of the sum of coefficients",
  stable: "how closely other random starts find the same component: 1 means exactly the same, low values mean chance",
  explained: "how much of the examples' Fisher matrices all components together reproduce; a Fisher matrix says how a prediction depends on the weights",
  right: "the share of right predictions on the component's examples",
  "mean error": "the mean distance between prediction and label on the component's examples",
  "KL ratio": "how far a step along the component moves the predictions of its own top examples, divided by how far it moves others; a KL beside it means that no step moved them as far as wanted, so that the ratio says little",
  auto: "an automatic label: what the component's examples have more often than the others",
};

/** The meaning of some of the words, where they stand. */
const legend = (names) =>
  h(
    "details",
    { class: "meanings small", open: innerWidth > 640 },
    h("summary", {}, "What the words mean"),
    h(
      "dl",
      { class: "terms" },
      names.map((name) => h("div", {}, h("dt", {}, name), h("dd", {}, TERMS[name]))),
    ),
  );

/** Which of the words this page uses for its components. */
const termsHere = () => {
  const some = (has) => facts.components.some(has);
  return [
    "active",
    some((c) => c.stability !== null) && "stable",
    facts.explained !== null && "explained",
    some((c) => c.accuracy) && "right",
    some((c) => c.error) && "mean error",
    some((c) => ratioOf(c.index) !== null) && "KL ratio",
    some((c) => c.automatic) && "auto",
  ].filter(Boolean);
};

/** The components that stand out, a link each; what is not known of any component is left out. */
function highlights(column) {
  const alive = facts.components.filter((c) => c.active > 0);
  const first = (score) => {
    let best = null;
    for (const c of alive) {
      const value = score(c);
      if (value !== null && value !== undefined && (best === null || value > best.value)) best = { c, value };
    }
    return best?.c ?? null;
  };
  const found = [];
  const add = (title, c, says) => c && found.push({ title, j: c.index, says: says(c) });
  if (column !== null)
    // of equally pure ones the one with more examples
    add("Purest", first((c) => purity(c.index, column).share + 1e-6 * c.active), (c) => {
      const { share, value } = purity(c.index, column);
      return `${percent(share)} of its top examples: ${facts.columns[column].name} ${value === null ? "not given" : line(value, 40)}`;
    });
  add("Most selective", first((c) => (missedOf(c.index) === null ? ratioOf(c.index) : null)), (c) =>
    `a step along it moves its own examples ${number(ratioOf(c.index), 2)} times as far as others`,
  );
  add("Most often wrong", first((c) => (c.accuracy && c.accuracy[0] < 1 ? 1 - c.accuracy[0] : null)), (c) =>
    `right on ${percent(c.accuracy[0])} of its examples, and on ${percent(c.accuracy[1])} of the others`,
  );
  add("Largest error", first((c) => c.error?.[0]), (c) =>
    `off by ${number(c.error[0])} on its examples, and by ${number(c.error[1])} on the others`,
  );
  add("Most stable", first((c) => c.stability), (c) => `other random starts find it again, with a cosine of ${number(c.stability, 2)}`);
  if (!found.length) return null;
  return section(
    "Worth seeing",
    h(
      "ul",
      { class: "worth" },
      found.map(({ title, j, says }) =>
        h(
          "li",
          {},
          h(
            "a",
            { href: `#/component/${j}` },
            h("b", {}, title),
            h("span", { class: "who" }, h("span", { class: "badge" }, `${j}`), isolated(line(calledOf(j), 60))),
            h("span", { class: "small muted" }, isolated(says)),
          ),
        ),
      ),
    ),
  );
}

/** What was analysed, in a few numbers. */
const analysed = () =>
  h(
    "div",
    { class: "pills" },
    pill(n === 1 ? "example" : "examples", count(n), facts.read),
    pill(r === 1 ? "component" : "components", count(r)),
    pill("explained", percent(facts.explained, 1), TERMS.explained),
    facts.coverage === null ? null : pill("of the weights analysed", percent(facts.coverage)),
    facts.sketch_error === null
      ? null
      : pill("sketch error", number(facts.sketch_error, 2), "Relative error of inner products of PEFs, measured"),
  );
