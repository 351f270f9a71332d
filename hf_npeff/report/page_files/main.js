// Which view is shown, keys, colours, and the start.

const main = document.getElementById("main");
let viewController = new AbortController();
/** Ends when the view changes: listeners of a view hang on it. */
const viewSignal = () => viewController.signal;

const setTitle = (title) => {
  document.title = `${visible(title)} · ${pageTitle}`;
};
const pageTitle = document.title;

const VIEWS = [
  { path: "", name: "Components", show: overview, there: () => true },
  { path: "examples", name: "Examples", show: examplesView, there: () => true },
  { path: "map", name: "Map", show: mapView, there: () => arrays.xy !== undefined },
  { path: "comparison", name: "Comparison", show: comparisonView, there: () => facts.comparison !== undefined },
  { path: "training", name: "Training", show: trainingView, there: () => facts.training !== undefined },
  { path: "change", name: "Change", show: changeView, there: () => facts.change !== undefined },
  { path: "about", name: "About", show: aboutView, there: () => true },
];

const scrolls = new Map();
let current = null;

function route() {
  if (current !== null) scrolls.set(current, scrollY);
  const [, path = "", argument] = location.hash.match(/^#\/(\w*)(?:\/(\d+))?$/) ?? [];
  const number_ = argument === undefined ? null : Number(argument);
  viewController.abort();
  viewController = new AbortController();
  hideTip();
  const view = VIEWS.find((v) => v.path === path && v.there());
  const owner = path === "component" ? "" : path === "example" ? "examples" : (view?.path ?? "");
  for (const link of document.querySelectorAll("#tabs a")) {
    if (link.hash === `#/${owner}`) {
      link.setAttribute("aria-current", "page");
      link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 40; // where not all tabs fit
    }
    else link.removeAttribute("aria-current");
  }
  const before = current;
  current = location.hash;
  if (path === "component" && number_ !== null && number_ < r) componentView(number_);
  else if (path === "example" && number_ !== null && number_ < n) exampleView(number_);
  else {
    const shown = view ?? VIEWS[0];
    document.title = shown.path ? `${shown.name} · ${pageTitle}` : pageTitle;
    shown.show();
  }
  scrollTo(0, argument === undefined ? (scrolls.get(current) ?? 0) : 0);
  if (before !== null) main.focus({ preventScroll: true });
  document.documentElement.dataset.view = path || "overview";
}

const SHORTCUTS = [
  ["/", "search"],
  ["← or k", "previous component or example"],
  ["→ or j", "next component or example"],
  ["n", "name this component"],
  ["Esc", "back to the list, or leave a field"],
  ["1 – 7", "the views"],
  ["+ − and arrows", "on the map: zoom and move (also Ctrl and the wheel)"],
  ["?", "this list"],
];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  const [, path = "", argument] = location.hash.match(/^#\/(\w*)(?:\/(\d+))?$/) ?? [];
  if (event.key === "Escape") {
    if (document.getElementById("keys").open) return;
    if (typing) event.target.blur();
    else if (argument !== undefined) location.hash = path === "component" ? "#/" : "#/examples";
    return;
  }
  if (typing || event.target.closest(".scroller, pre, dialog")) return; // arrows scroll there
  const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
  const tabs = document.querySelectorAll("#tabs a");
  if (step !== undefined && argument !== undefined) {
    const size = path === "component" ? r : n;
    location.hash = `#/${path}/${(Number(argument) + step + size) % size}`;
  } else if (event.key === "/") document.querySelector(".search")?.focus();
  else if (event.key === "n" && path === "component") document.getElementById("rename").focus();
  else if (event.key === "?") showKeys();
  else if (/^[1-9]$/.test(event.key) && tabs[Number(event.key) - 1]) location.hash = tabs[Number(event.key) - 1].hash;
  else return;
  event.preventDefault();
}

function showKeys() {
  const dialog = document.getElementById("keys");
  clear(
    dialog,
    h("h2", { id: "keys-title" }, "Keys"),
    h(
      "dl",
      { class: "shortcuts" },
      SHORTCUTS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)]),
    ),
    h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close"),
  );
  dialog.showModal();
}

function setUpTheme() {
  const order = ["system", "light", "dark"],
    button = document.getElementById("theme");
  let chosen = "system";
  try {
    chosen = localStorage.getItem("hf_npeff/theme") ?? "system";
  } catch {
    /* no storage here */
  }
  function apply() {
    document.documentElement.dataset.theme = chosen;
    button.setAttribute("aria-label", `Colours: ${chosen === "system" ? "as the system" : chosen}`);
    button.title = button.getAttribute("aria-label");
    button.firstElementChild.textContent = { system: "◐", light: "☀", dark: "☾" }[chosen];
    try {
      localStorage.setItem("hf_npeff/theme", chosen);
    } catch {
      /* as above */
    }
  }
  button.addEventListener("click", () => {
    chosen = order[(order.indexOf(chosen) + 1) % order.length];
    apply();
    if (location.hash === "#/map") route(); // canvases hold colours
  });
  apply();
}

async function start() {
  setUpTheme();
  if (typeof DecompressionStream === "undefined")
    throw new Error("this page needs a browser of 2023 or later (DecompressionStream)");
  await loadData();
  loadNames();
  clear(
    document.getElementById("tabs"),
    VIEWS.filter((view) => view.there()).map((view) => h("a", { href: `#/${view.path}` }, view.name)),
  );
  document.getElementById("help").addEventListener("click", showKeys);
  document.getElementById("skip").addEventListener("click", () => main.focus());
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  route();
  performance.mark("ready");
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  clear(main, h("p", { class: "wait" }, `The page could not be shown: ${error.message}`));
  throw error;
});
