// Tokens of an example, shaded by what they contribute to its alignment with a component.

const TOKENS_AT_ONCE = 1500; // of a longer text its beginning and its end are shown first

/** Orange for, blue (and underlined) against. */
function shadedText(shading) {
  const most = largestOf(shading.contributions.map(Math.abs)),
    length = shading.tokens.length;
  const spans = (from, to) =>
    shading.tokens
      .slice(from, to)
      .map((token, at) => shadedToken(token, shading.contributions[from + at], most, shading));
  if (length <= TOKENS_AT_ONCE) return h("div", { class: "text shaded", dir: "auto" }, spans(0, length));
  const from = TOKENS_AT_ONCE / 3,
    to = length - (2 * TOKENS_AT_ONCE) / 3;
  const between = h(
    "button",
    { type: "button", class: "quiet", onclick: () => between.replaceWith(...spans(from, to)) },
    `Show the ${count(to - from)} tokens between`,
  );
  return h("div", { class: "text shaded", dir: "auto" }, spans(0, from), between, spans(to, length));
}

function shadedToken(token, contribution, most, shading) {
  const share = contribution / most,
    strength = Math.sqrt(Math.abs(share));
  return h(
    "span",
    {
      class: strength < 0.12 ? "token" : share > 0 ? "token for" : "token against",
      style: { "--strength": (100 * strength * 0.8).toFixed(0) + "%" },
      title: `${number(contribution)} of ${number(shading.alignment)}`,
    },
    visible(token)
      .split(/(?=\n)/)
      .map((piece) =>
        piece.startsWith("\n") ? [h("span", { class: "newline", "aria-hidden": "true" }, "↵"), piece] : piece,
      ),
  );
}

/** The same in words, for those who do not see colours. */
function shadingSentence(shading) {
  const order = [...shading.contributions.keys()]
    .sort((a, b) => Math.abs(shading.contributions[b]) - Math.abs(shading.contributions[a]))
    .slice(0, 3);
  const rest =
    Math.abs(shading.unplaced) > 1e-3 * shading.alignment
      ? `; ${percent(shading.unplaced / shading.alignment)} at no single token`
      : "";
  return [
    `Alignment ${number(shading.alignment)}, most from `,
    order.map((t, at) => [
      at ? ", " : "",
      h("q", {}, isolated(line(shading.tokens[t], 24) || "␣")),
      ` ${percent(shading.contributions[t] / shading.alignment)}`,
    ]),
    rest,
  ];
}
