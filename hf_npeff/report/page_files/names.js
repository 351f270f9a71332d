// Names that the person gives to components; the file goes to `hf-npeff components DIR --names names.json`.

const given = new Map(); // component → name, "" where one was taken away
const NAMES_KEY = () => `hf_npeff/${facts.key}`;

function loadNames() {
  try {
    for (const [j, name] of Object.entries(JSON.parse(localStorage.getItem(NAMES_KEY()) ?? "{}"))) {
      if (Number(j) < r && typeof name === "string") given.set(Number(j), name);
    }
  } catch {
    /* no storage here: names last as long as the page */
  }
  showNamesButton();
}

const nameOf = (j) => (given.has(j) ? given.get(j) || null : facts.components[j].name);
const labelOf = (j) => nameOf(j) ?? `component ${j}`;
/** Its name, else what its examples have in common, said to be automatic. */
const calledOf = (j) => nameOf(j) ?? (facts.components[j].automatic ? `auto: ${facts.components[j].automatic}` : labelOf(j));

function rename(j, name) {
  const clean = name.trim();
  if (clean === (facts.components[j].name ?? "")) given.delete(j);
  else given.set(j, clean);
  try {
    localStorage.setItem(NAMES_KEY(), JSON.stringify(Object.fromEntries(given)));
  } catch {
    /* as above */
  }
  showNamesButton();
}

function namesFile() {
  const names = {};
  for (let j = 0; j < r; j++) if (nameOf(j)) names[j] = nameOf(j);
  return `${JSON.stringify({ format_version: 1, library_name: "hf_npeff", kind: "component names", decomposition: facts.key, names }, null, 2)}\n`;
}

function showNamesButton() {
  const button = document.getElementById("save-names");
  button.hidden = given.size === 0;
  button.textContent = `Save names (${given.size})`;
  button.onclick = () => download("names.json", namesFile());
}
