// What a step along a component does, and the code that loads its adapter.

function effectPanel(j) {
  const report = facts.reports[j],
    kept = facts.components[j].evaluation;
  if (!report && !(kept && "ratio" in kept)) return null;
  const rows = report
    ? [
        ["this step", report.best],
        ["the other sign", report.opposite],
        ["a random direction", report.random],
      ]
        .filter(([, e]) => e)
        .map(([name, e]) => [name, e.scale, e.top, e.others, e.ratio, e.top_flips, e.other_flips, e.interval])
    : [
        ["this step", kept.scale, kept.kl_top, kept.kl_others, kept.ratio, kept.top_flips, kept.other_flips],
        ["a random direction", Math.abs(kept.scale), kept.kl_random, null, kept.ratio_random, null, null],
      ];
  const table = h(
    "div",
    { class: "scroller", tabindex: "0", role: "region", "aria-label": "Effect of the step" },
    h(
      "table",
      { class: "plain" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["", "step", "KL on top", "on others", "ratio", "answers changed: top", "others"].map((t) =>
            h("th", { scope: "col" }, t),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map(([name, scale, top, others, ratio, flips, otherFlips, interval]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, name),
            h("td", { class: "number" }, number(scale)),
            h("td", { class: "number" }, number(top)),
            h("td", { class: "number" }, number(others)),
            h(
              "td",
              { class: "number", title: interval ? `95% interval ${number(interval[0])} to ${number(interval[1])}` : null },
              h("b", {}, number(ratio)),
            ),
            h("td", {}, percent(flips)),
            h("td", {}, percent(otherFlips)),
          ),
        ),
      ),
    ),
  );
  const changed = report?.changed ?? [];
  const answers = (rows_, title) =>
    rows_.length
      ? h(
          "div",
          {},
          h("h3", {}, title),
          h(
            "div",
            { class: "scroller", tabindex: "0", role: "region", "aria-label": title },
            h(
              "table",
              { class: "plain answers" },
              h(
                "thead",
                {},
                h(
                  "tr",
                  {},
                  ["example", "before", "after"].map((t) => h("th", { scope: "col" }, t)),
                ),
              ),
              h(
                "tbody",
                {},
                rows_.map((row) =>
                  h(
                    "tr",
                    {},
                    h(
                      "td",
                      {},
                      h("a", { href: `#/example/${row.index}` }, isolated(line(lastLine(titleOf(row.index)), 80))),
                    ),
                    h("td", {}, isolated(line(row.before, 40) || "␣")),
                    h("td", { class: "after" }, isolated(line(row.after, 40) || "␣")),
                  ),
                ),
              ),
            ),
          ),
        )
      : null;
  return section(
    "When the weights move along this component",
    h(
      "p",
      { class: "small muted" },
      "KL says how far predictions move, in nats; for numbers and embeddings it is half the squared distance. A selective component moves its own examples and hardly moves others. The control is a random direction of equal length.",
    ),
    table,
    report && !changed.length ? h("p", { class: "muted" }, "No answer changed.") : null,
    answers(
      changed.filter((row) => row.top),
      `Answers of its top examples (${changed.filter((row) => row.top).length} of ${report?.n_top} changed)`,
    ),
    answers(
      changed.filter((row) => !row.top),
      `Answers of others (${changed.filter((row) => !row.top).length} of ${report?.n_others} changed)`,
    ),
  );
}

function loadingCode(j) {
  const quote = (text) =>
    JSON.stringify(text).replace(/[^\0-\x7f]/gu, (c) => `\\U${c.codePointAt(0).toString(16).padStart(8, "0")}`);
  const model = quote(facts.model ?? "the/model"),
    revision = facts.revision ? `, revision=${quote(facts.revision)}` : "";
  const auto =
    {
      "causal-lm": "AutoModelForCausalLM",
      "seq2seq-lm": "AutoModelForSeq2SeqLM",
      "masked-lm": "AutoModelForMaskedLM",
      "sequence-classification": "AutoModelForSequenceClassification",
      "token-classification": "AutoModelForTokenClassification",
      "question-answering": "AutoModelForQuestionAnswering",
      "multiple-choice": "AutoModelForMultipleChoice",
      "image-classification": "AutoModelForImageClassification",
    }[facts.task] ?? "AutoModel";
  const where = facts.adapters[j],
    scale = facts.reports[j]?.best?.scale ?? facts.components[j].evaluation?.scale ?? null;
  const load = (folder) =>
    `from peft import PeftModel\nfrom transformers import ${auto}\n\nmodel = ${auto}.from_pretrained(${model}${revision})\nmodel = PeftModel.from_pretrained(model, ${folder})`;
  if (where) return load(quote(where));
  return `# Lift component ${j} into an adapter; decomposition, pefs and dataset are those of this page.
from hf_npeff import NPEFFAnalyzer

analyzer = NPEFFAnalyzer.from_pretrained(${model}${revision}, fisher=decomposition.fisher_config)
direction = analyzer.lift(decomposition, ${j}, pefs, dataset)
direction.to_adapter(rank=1, scale=${scale ?? 0.1}).save_pretrained("component-${j}")

# Then it loads like any other:
${load(quote(`component-${j}`))}`;
}

function copyCodeButton(j) {
  const words = facts.adapters[j] ? "Copy the code that loads its adapter" : "Copy the code that makes its adapter";
  const button = h("button", { type: "button", class: "quiet" }, words);
  button.addEventListener("click", () => copyText(loadingCode(j), button));
  return button;
}

const codePanel = (j) =>
  section(
    "Its adapter",
    h("pre", { tabindex: "0", "aria-label": "Code" }, h("code", {}, loadingCode(j))),
    copyCodeButton(j),
  );
