"""The page in a real Chromium: every view used as a person would, and watched for errors and requests.

The data is planted, so what must be on the screen is known. Skipped where there is no Chromium.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff import Decomposition, DecompositionConfig, FisherConfig
from hf_npeff.report.data import Extras
from hf_npeff.report.page import write
from hf_npeff.weights.change_report import ChangeReport, ChangeStep, ComponentChange
from hf_npeff.weights.token_alignments import TokenAlignment
from tests.browser import Browser, Page, find_browser
from tests.random_decomposition import random_decomposition
from tests.test_report import EVIL

N, R = 48, 6
VIEWS = (
    "#/",
    "#/examples",
    "#/map",
    "#/comparison",
    "#/training",
    "#/change",
    "#/about",
    "#/component/0",
    "#/component/5",
    "#/example/3",
)
TOKENS = ["The", " cat", "\n", " sees", " 🧭", "\x00"]
CONTRIBUTIONS = [0.5, 0.25, 0.0, -0.125, 0.0625, 0.0]


def planted(names: bool = True) -> Decomposition:
    """Component j has the examples i with i mod 6 = j, the later the larger; a third of each example is elsewhere."""
    W = torch.zeros(N, R)
    for i in range(N):
        W[i, i % R] = 0.4 + 0.01 * i
        W[i, (i + 1) % R] = 0.2
    G = torch.nn.functional.normalize(torch.eye(R) + 0.1 * torch.ones(R, R), dim=1)
    kinds = [["fruit", "city", "verb", "metal", "river", "sport"][i % R] for i in range(N)]
    columns = {
        "text": [EVIL[i] if i < len(EVIL) else f"example {i} of a {kinds[i]}" for i in range(N)],
        "label": [i % 3 for i in range(N)],
        "prediction": [f"LABEL_{i % 3}" if i % 5 else "LABEL_0" for i in range(N)],
        "kind": kinds,
        "length": [float(i * i) + 0.5 for i in range(N)],
        "mixed": [[1, "1", None, True, 2.5][i % 5] for i in range(N)],
        "note": [f"note {i} {EVIL[1]}" for i in range(N)],
    }
    info = {
        "fingerprint": "planted",
        "fisher": FisherConfig().to_dict(),
        "sketch": None,
        "model": "org/planted-model",
        "revision": "0123456789abcdef",
        "task": "sequence-classification",
    }
    return Decomposition(
        W,
        G,
        config=DecompositionConfig(n_components=R),
        info=info,
        example_ids=[f"id-{i}" for i in range(N)],
        columns=columns,
        stability=torch.linspace(0.5, 1, R),
        loss_history=[1.0, 0.6, 0.4, 0.35],
        names={1: "cities", 2: EVIL[0]} if names else None,
        evaluations={0: {"ratio": 12.0, "scale": 0.3, "kl_top": 0.5, "kl_others": 0.04}, 3: {"ratio": 2.0}, 4: MISSED},
    )


MISSED = {"ratio": 99.0, "scale": 3.0, "target": 0.5, "reached": False, "kl_top": 0.002, "kl_others": 2e-5}
"""The evaluation of a component whose longest step moves next to nothing."""


def searched() -> dict[str, Any]:
    """What a search for inputs off target ended at, from the second of the others."""
    case = {"index": 1, "text": EVIL[1], "before": "a", "after": "b"}
    ends = [
        {**case, "input_ids": [1, 2], "replaced": 2, "kl_start": 0.21, "kl": kl, "own": own}
        for kl, own in ((0.34, False), (0.9, True))
    ]
    return {"scale": 0.3, "n": 3, "mean": 0.04, "worst": [{**case, "id": "id-8", "kl": 0.21}],
            "searched": ends, "tried": 240}  # fmt: skip


def measured() -> dict[str, Any]:
    """A measurement on other data: two groups at two steps, and a random change."""
    worst = [{"index": 0, "id": "elsewhere", "text": EVIL[3], "kl": 0.8, "before": "a", "after": "c"}]

    def step(scale: float, random: bool) -> dict[str, Any]:
        size = 1e-6 if random else abs(scale)
        effect = {
            "n": 9,
            "kl_interval": [0.9 * size, 1.1 * size],
            "flips": 0.25,
            "accuracy": [0.75, 0.5],
            "worst": worst,
        }
        return {"scale": scale, "rank": None, "random": random,
                "groups": {"all": {**effect, "kl": size}, "kind=fruit": {**effect, "kl": 2 * size}}}  # fmt: skip

    return {"change": "x", "by": "kind", "n": 9, "steps": [step(0.3, False), step(0.6, False), step(0.3, True)]}


def changed_by_something() -> dict[str, Any]:
    """A report of a change, most of it on component 2."""
    row = {"index": 7, "id": "id-7", "text": "x", "before": "a", "after": EVIL[1], "kl": 0.7, "component": 2}
    return ChangeReport(
        change={"model": "org/planted-model", "after": EVIL[0]},
        n=N,
        norm=1.5,
        modules={"model.layers.0.mlp.weight": 0.75, "model.layers.1.mlp.weight": 0.25},
        outside={"lm_head.weight": 0.1},
        kl=[0.1] * N,
        kl_interval=(0.05, 0.15),
        predicted=[0.1] * N,
        components=[ComponentChange(j, f"component {j}", kl=0.3 / (1 + abs(j - 2))) for j in range(R)],
        changed=[row],
        unexplained=[row],
        associations=[],
        curve=[ChangeStep(s, None, 0.1 * s, (0.0, 0.2), s / 2, {"all": 1 - s / 2}) for s in (0, 0.5, 1)],
        without=[],
        notes=["planted"],
    ).to_dict()


def extras(folder: Path) -> Extras:
    """Everything that can stand beside a decomposition."""
    effect = {
        "scale": 0.3,
        "top": 0.5,
        "others": 0.04,
        "ratio": 12.0,
        "interval": [9.0, 15.0],
        "top_flips": 0.5,
        "other_flips": 0.1,
        "other_worst": 0.21,
        "other_worst_example": 8,
    }
    changed = [
        {"index": 42, "id": "id-42", "top": True, "before": " wider", "after": EVIL[1]},
        {"index": 7, "id": "id-7", "top": False, "before": "a", "after": "b"},
    ]
    report = {
        "best": effect,
        "opposite": {**effect, "ratio": 3.0},
        "random": {**effect, "ratio": 1.0},
        "target": 0.5,
        "reached": True,
        "changed": changed,
        "top_examples": [42, 36],
        "other_examples": [1, 8, 3],
        "tried": [(-0.3, 0.4), (0.15, 0.2), (0.3, 0.5)],
        "off_target": searched(),
    }
    second = planted(names=False)
    second.coefficients = second.coefficients[:, [2, 0, 1, 5, 4, 3]]
    run = folder / "checkpoint-40" / "npeff"
    run.mkdir(parents=True)
    points = [
        {
            "step": 10 * t,
            "epoch": t / 4,
            "explained": 0.2 * t,
            "active": R,
            "share": [(1 + j * t) / 100 for j in range(R)],
            "cosine": [0.9] * R if t > 1 else None,
            "correlation": [0.8] * R if t > 1 else None,
        }
        for t in (1, 2, 3, 4)
    ]
    (run / "history.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    energies = {
        j: {f"model.layers.{layer}.{kind}.weight": (1 + layer) / 20 for layer in range(4) for kind in ("mlp", "attn")}
        for j in (0, 1)
    }
    return Extras(
        alignments=[
            *(TokenAlignment(0, i, 0.6875, TOKENS, CONTRIBUTIONS, 0.0) for i in (42, 36)),
            TokenAlignment(1, 43, 1.0, [f" {t}" for t in range(5000)], [0.0002] * 5000, 0.0),
        ],
        energies=energies,
        reports={0: report},
        measurements={0: measured()},
        change=changed_by_something(),
        adapters={0: "me/adapter-0"},
        compare=second,
        training=folder,
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = find_browser()
    if executable is None:
        pytest.skip("Chromium is not installed; `make browser` installs it where apt can")
    running = Browser(executable)
    yield running
    running.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return write(planted(), folder / "page.html", extras=extras(folder)).as_uri()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The planted page; after the test it must have asked for nothing and complained of nothing."""
    opened = browser.open(address)
    yield opened
    opened.run("0")
    assert opened.errors == []
    assert {url.split("#")[0] for url in opened.requests if not url.startswith("blob:")} == {address}
    opened.close()


def ranked(found: Decomposition, j: int) -> list[int]:
    return [
        i
        for i in torch.sort(found.coefficients[:, j], descending=True, stable=True).indices.tolist()
        if found.coefficients[i, j] > 0
    ]


def numbers(page: Page) -> list[int]:
    """Components in the order in which their cards stand."""
    return [int(text) for text in page.texts(".card .badge")]


# Every view


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_opens_and_fits(page: Page, scheme: str, width: int) -> None:
    """Oracle: the browser. Something is drawn, nothing is wider than the screen, texts have AA contrast."""
    from PIL import Image

    page.resize(width, 844)
    page.prefer(scheme)
    for view in VIEWS:
        page.show(view)
        assert page.run("document.querySelector('main h1') !== null") and len(page.run("main.innerText")) > 40
        assert page.run("document.scrollingElement.scrollWidth") <= width, view
        colours = Image.open(io.BytesIO(page.screenshot())).convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 60
        if width == 1280:
            assert page.run(CONTRAST) == [], (view, scheme)
    assert page.run("window.hacked") is None


CONTRAST = """(() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  function over(below, colour) {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = `rgb(${below.join(" ")})`; pen.fillRect(0, 0, 1, 1);
    pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  }
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const poor = [], skipped = "[aria-hidden], [hidden], .offscreen, .skip, svg, canvas, noscript, option, script, style";
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    if (!own || element.closest(skipped)) continue;
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(getComputedStyle(e).backgroundColor);
    const below = chain.reduce(over, [255, 255, 255]), text = over(below, getComputedStyle(element).color);
    const [a, b] = [light(below), light(text)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${element.className} ${ratio.toFixed(2)} ${element.textContent.slice(0, 30)}`);
  }
  return poor;
})()"""


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    """Oracle: the browser's own accessibility tree: no button, link, field, image or canvas without a name."""
    page.send("Accessibility.enable")
    for view in VIEWS:
        page.show(view)
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        roles: dict[str, int] = {}
        for node in nodes:
            role = node.get("role", {}).get("value")
            if node.get("ignored") or role not in (
                "button",
                "link",
                "textbox",
                "searchbox",
                "combobox",
                "checkbox",
                "img",
                "image",
                "Canvas",
                "list",
                "region",
            ):
                continue
            roles[role] = roles.get(role, 0) + 1
            if role not in ("list",):
                assert node.get("name", {}).get("value", "").strip(), (view, node)
        assert roles.get("link", 0) >= 7, (view, roles)
    page.send("Accessibility.disable")


# The overview


def test_components_are_sorted(page: Page) -> None:
    """Oracle: the decomposition's own numbers, sorted here; equal ones stay in order."""
    found = planted()
    active = [c.active_share for c in found]
    assert numbers(page) == list(range(R))
    expected = {
        "largest share of the examples": sorted(range(R), key=lambda j: -active[j]),
        "most stable": list(range(R))[::-1],
        "most selective": [0, 3, 4, 1, 2, 5],  # 4 fell short, and the others were not measured
        "name": sorted(range(R), key=lambda j: found[j].label.lower()),
    }
    for option, order in expected.items():
        page.choose("Sort by", option)
        assert numbers(page) == order, option
    page.choose("Purity by", "label")
    page.choose("Sort by", "purest")
    purity = [
        max(map(tops.count, tops)) / len(tops)
        for tops in ([found.columns["label"][i] for i in ranked(found, j)[:12]] for j in range(R))
    ]
    assert numbers(page) == sorted(range(R), key=lambda j: -purity[j])
    shown = [float(text.rstrip("%")) / 100 for text in page.texts(".purity b")]
    assert shown == pytest.approx([purity[j] for j in numbers(page)], abs=0.006)


def test_the_overview_opens_with_what_was_analysed_and_what_is_worth_seeing(page: Page) -> None:
    """Oracle: planted truth: the purest, most selective, most often wrong and most stable component, a link each."""
    found, associations = planted(), planted().associations()
    lead = page.run("document.querySelector('.hero').innerText")
    assert (
        "org/planted-model" in lead and "48 examples" in lead and "6 components" in lead and "65.0% explained" in lead
    )
    kinds = [[found.columns["label"][i] for i in ranked(found, j)[:12]] for j in range(R)]
    share = [max(map(tops.count, tops)) / len(tops) for tops in kinds]
    purest = max(range(R), key=lambda j: (share[j], found[j].active_share, -j))
    wrongest = min(range(R), key=lambda j: (associations[j].accuracy or (2,))[0])
    shown = dict(zip(page.texts(".worth b"), page.each(".worth a", "e.hash"), strict=True))
    assert shown == {
        "Purest": f"#/component/{purest}",
        "Most selective": "#/component/0",
        "Most often wrong": f"#/component/{wrongest}",
        "Most stable": "#/component/5",
    }
    said = page.texts(".worth a")
    assert f"{share[purest]:.0%} of its top examples: label" in said[0] and "12 times" in said[1]
    assert {"active", "stable", "explained", "right", "KL ratio"} <= set(page.texts(".terms dt"))
    page.show("#/component/5")
    assert "stable" in page.texts(".terms dt") and "KL ratio" not in page.texts(".terms dt")


def test_a_ratio_of_a_step_that_fell_short_is_no_success(page: Page) -> None:
    """Oracle: the planted evaluations: a ratio of 12 at the wanted KL, and one of 99 at a KL of .002."""
    cards = dict(zip(numbers(page), page.texts(".card-head"), strict=True))
    assert "KL ratio 12" in cards[0] and "at a KL" not in cards[0]
    assert "KL ratio 99 at a KL of only 0.002" in cards[4]
    page.show("#/component/4")
    assert any("99 at a KL of only 0.002" in text for text in page.texts(".pill"))


def test_the_certificate_says_target_off_target_worst_and_control(page: Page) -> None:
    """Oracle: the planted report: its numbers, worst inputs in their order, doses, and the measurement by group."""
    page.show("#/component/0")
    rows = page.each(".certificate tbody tr", "Array.from(e.cells, (c) => c.innerText.trim())")
    assert [float(row[1]) for row in rows] == [0.5, 0.04, 0.21, 0.34, 0.5]
    assert rows[0][2] == "50% of the answers changed" and "example 8" in rows[2][2]
    assert "240 inputs tried" in rows[3][0] and rows[3][2].startswith("<img src=x") and rows[3][2].endswith("a → b")
    assert page.each(".certificate a", "e.hash") == ["#/example/8"]
    worst = page.each(
        "[aria-label='Worst off-target cases'] tbody tr", "e.cells[0].innerText + '|' + e.cells[4].innerText"
    )
    assert [w.split("|")[0] for w in worst] == ["0.9", "0.34", "0.21"] and "counts as its own" in worst[0]
    panel = "section[aria-labelledby=s-certificate] .lines"
    titles = page.texts(f"{panel} circle title")
    assert "its top examples, step -0.3: 0.4" in titles and "others, step 0.3: 0.04" in titles
    groups = page.each("[aria-label='Measured on other data'] tbody tr", "Array.from(e.cells, (c) => c.innerText)")
    assert groups[1] == ["0.3", "kind=fruit", "9", "0.6", "25%", "75% → 50%"]
    page.show("#/component/3")
    assert page.texts(".certificate") == []  # only its ratio is known


def test_a_change_is_shown(page: Page) -> None:
    """Oracle: the planted report."""
    page.show("#/change")
    assert page.texts(".change-component th")[0].startswith("component 0")
    assert "mean KL" in page.run("main.innerText") and "planted" in page.run("main.innerText")
    assert page.each(".answers td:first-child", "e.innerText") == ["0.7", "0.7"]
    assert page.run("window.hacked") is None


SELECT = "document.querySelector('.search').select()"


def test_components_are_searched_and_filtered(page: Page) -> None:
    """Oracle: planted truth."""
    page.click(".search")
    page.type("of a river")
    assert set(numbers(page)) == {4, 5}  # its own examples, and those that have it second
    assert page.texts(".found") == ["2 of 6 components"]
    for i, expected in ((18, [0, 1]), (24, [0])):  # of equal coefficients the first are among the top twelve
        page.run(SELECT)
        page.type(f"example {i} of")
        assert numbers(page) == expected
    page.run(SELECT)
    page.type("CITIES")
    assert numbers(page) == [1]
    page.run(SELECT)
    page.type("nowhere to be found")
    assert numbers(page) == [] and page.texts(".found") == ["0 of 6 components"]
    page.run(SELECT)
    page.key("Backspace")
    page.type(" ")
    page.choose("Show", "evaluated")
    assert numbers(page) == [0, 3, 4]
    page.choose("Show", "named")
    assert numbers(page) == [1, 2]
    page.choose("Show", "all")
    page.choose("Purity by", "kind")
    page.choose("Mostly", "verb")
    assert numbers(page) == [2]


def test_associations_are_shown_sorted_and_searched(page: Page) -> None:
    """Oracle: what `associations` gives for the planted decomposition, whose components each have a kind."""
    page.show("#/")
    found = planted().associations()
    expected = sorted(range(R), key=lambda j: (found[j].associations[0].log_p if found[j].associations else 1, j))
    page.choose("Sort by", "most certain association")
    assert numbers(page) == expected
    assert [text.startswith("auto: ") for text in page.texts(".automatic")] == [True] * len(page.texts(".automatic"))
    page.choose("Sort by", "most often wrong")
    scores = [found[j].accuracy for j in numbers(page)]
    assert [s[0] for s in scores if s] == sorted(s[0] for s in scores if s)
    page.choose("Show", "with an association")
    assert sorted(numbers(page)) == [j for j in range(R) if found[j].associations]
    page.choose("Show", "all")
    page.choose("Sort by", "number")
    page.show("#/component/4")
    assert any("kind = river" in text for text in page.texts("section[aria-labelledby=s-in-common] .name"))


def test_thousands_of_components_are_a_few_elements(browser: Browser, tmp_path: Path) -> None:
    """Oracle: the document: few cards at a time, the first and the last reachable, the scroll bar as long as all."""
    opened = browser.open(write(random_decomposition(40, 3000), tmp_path / "many.html", layout=None).as_uri())
    assert opened.texts(".found") == ["3,000 components"]
    assert numbers(opened)[0] == 0 and len(numbers(opened)) < 100
    opened.run("scrollTo(0, document.body.scrollHeight)")
    opened.settle()
    assert numbers(opened)[-1] == 2999 and len(numbers(opened)) < 100
    assert opened.run(
        "document.querySelector('[aria-posinset=\"3000\"]').getBoundingClientRect().bottom <= innerHeight"
    )
    opened.choose("Sort by", "smallest share of the examples")
    assert len(set(numbers(opened))) == len(numbers(opened)) < 100
    assert opened.errors == []
    opened.close()


# One component


def test_a_component_shows_its_top_examples(page: Page) -> None:
    """Oracle: the decomposition. Order, coefficients, predictions, labels, right or wrong."""
    found = planted()
    page.show("#/component/3")
    order = ranked(found, 3)
    assert page.texts(".example .goto") == [f"example id-{i}" for i in order[:8]]
    shown = [float(text) for text in page.texts(".example .weight")]
    assert shown == pytest.approx([float(found.coefficients[i, 3]) for i in order[:8]], rel=6e-3)
    for text, i in zip(page.texts(".verdict"), order, strict=False):
        right = found.columns["prediction"][i] == f"LABEL_{i % 3}"
        assert text == f"predicts {found.columns['prediction'][i]} · label {i % 3} {'✓ right' if right else '✗ wrong'}"
    page.press("Show 25 more")
    assert len(page.texts(".example")) == len(order)


def test_tokens_are_shaded_by_their_contribution(page: Page) -> None:
    """Oracle: planted contributions: signs by class, strengths in their order, numbers in titles; and off again."""
    page.show("#/component/0")
    first = "document.querySelector('.shaded')"
    assert page.run(f"Array.from({first}.children, (e) => e.className)") == [
        "token for",
        "token for",
        "token",
        "token against",
        "token for",
        "token",
    ]
    strengths = page.run(f"Array.from({first}.children, (e) => parseInt(e.style.getPropertyValue('--strength')))")
    assert strengths[0] > strengths[1] > strengths[3] > strengths[4] > strengths[2] == 0
    titles = page.run(f"Array.from({first}.children, (e) => e.title)")
    assert [float(t.split()[0]) for t in titles] == pytest.approx(CONTRIBUTIONS, rel=1e-3)
    assert page.run(f"{first}.textContent") == "The cat↵\n sees 🧭␀"
    assert page.texts(".example p")[0].startswith("Alignment 0.688, most from The 73%, cat 36%, sees -18%")
    page.click(".check input")
    assert page.texts(".shaded") == []
    page.show("#/example/42")
    assert page.texts(".shaded") == ["The cat↵\n sees 🧭␀"]


def test_of_a_very_long_text_the_ends_are_shaded_first(page: Page) -> None:
    """Oracle: planted tokens: 500 and 1,000 of 5,000, then all in their order."""
    page.show("#/component/1")
    assert len(page.texts(".shaded .token")) == 1500
    page.press("Show the 3,500 tokens between")
    assert page.texts(".shaded") == ["".join(f" {t}" for t in range(5000))]


def test_columns_modules_neighbours_and_perturbations_of_a_component(page: Page) -> None:
    """Oracle: planted truth."""
    found = planted()
    page.show("#/component/0")
    page.choose("Column", "kind")
    active = (found.coefficients[:, 0] > 0.05 * found.coefficients.sum(1)).tolist()
    kinds = [kind for kind, on in zip(found.columns["kind"], active, strict=True) if on]
    panel = "section[aria-labelledby=s-by-column]"
    shown = dict(zip(page.texts(f"{panel} .bars .name"), page.texts(f"{panel} .bars .amount"), strict=True))
    assert {k: v.split("%")[0] for k, v in shown.items()} == {
        k: f"{100 * kinds.count(k) / len(kinds):.0f}" for k in set(kinds)
    }
    page.choose("Column", "prediction correct")
    assert set(page.texts(f"{panel} .bars .name")) == {"right", "wrong"}
    page.choose("Column", "mixed")
    assert "no value" in page.texts(".bars .name")
    page.choose("Column", "length")
    assert page.run("document.querySelectorAll('.histogram').length") == 2
    assert page.texts(".heat tbody th") == ["0", "1", "2", "3"] and page.texts(".heat thead th") == ["mlp", "attn"]
    assert page.texts(".heat td .offscreen") == [f"{5 * (1 + layer):.1f}%" for layer in range(4) for _ in range(2)]
    near = [int(text) for text in page.texts(".neighbours .badge")]
    assert sorted(near) == [1, 2, 3, 4, 5]
    rows = page.texts("[aria-label='Effect of the step'] tbody tr")
    assert rows[0].startswith("this step0.30.50.0412") and rows[2].startswith("a random direction")
    answers = page.each("[aria-label^='Answers of'] tbody tr", "Array.from(e.cells, (c) => c.innerText)")
    assert answers[0][1:] == ["wider", re.sub(r"\s+", " ", EVIL[1])[:40].rstrip() + "…"] or answers[0][2].startswith(
        "<img src=x"
    )
    assert answers[1][1:] == ["a", "b"]
    code = page.texts("pre")[0]
    assert 'PeftModel.from_pretrained(model, "me/adapter-0")' in code and 'revision="0123456789abcdef"' in code
    compile(code, "snippet", "exec")
    page.show("#/component/3")
    code = page.texts("pre")[0]
    assert "analyzer.lift(decomposition, 3, pefs, dataset)" in code
    compile(code, "snippet", "exec")
    assert "not lifted" in page.run("main.innerText")


def test_the_code_can_be_copied(page: Page, browser: Browser) -> None:
    """Oracle: the clipboard."""
    page.show("#/component/0")
    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.send("Page.bringToFront")
    for button in (".hero .quiet", "pre + button"):
        page.run("navigator.clipboard.writeText('nothing yet')")
        page.click(button)
        page.wait(f"document.querySelector('{button}').textContent === 'Copied'")
        assert page.run("navigator.clipboard.readText()") == page.texts("pre")[0]


def test_names_are_typed_saved_and_read_back(page: Page, browser: Browser, tmp_path: Path) -> None:
    """Oracle: the file that the browser saves, read by `rename`; they outlive a reload, and can be searched."""
    page.show("#/component/4")
    page.key("n")
    page.type('rivers "and" <b>seas</b>')
    page.key("Enter")
    assert page.texts("#save-names") == ["Save names (1)"]
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#save-names")
    saved = tmp_path / "names.json"
    for _ in range(200):
        if saved.is_file() and saved.stat().st_size:
            break
        time.sleep(0.05)
    found = planted(names=False)
    found.rename(saved)
    assert found.names == {1: "cities", 2: EVIL[0], 4: 'rivers "and" <b>seas</b>'}
    other = planted(names=False)
    other.pseudo_fishers = other.pseudo_fishers.flip(0)
    with pytest.raises(ValueError, match=r"names\.json"):
        other.rename(saved)
    page.go(page.run("location.href").split("#")[0] + "?again")
    assert 'rivers "and" <b>seas</b>' in page.texts(".card .title")
    page.run("localStorage.clear()")
    page.requests[:] = [url for url in page.requests if "?again" not in url]


# Examples, map, comparison, training


def test_an_example_is_explained(page: Page) -> None:
    """Oracle: w_j (Hw)_j by hand; parts and what is left make a whole; neighbours are the decomposition's."""
    found = planted()
    page.show("#/example/20")
    w, G = found.coefficients[20].double(), found.pseudo_fishers.double()
    parts = w * ((G @ G.T).square() @ w)
    amounts = [float(t.rstrip("%")) for t in page.texts(".legend .amount")]
    assert amounts[:2] == pytest.approx(sorted((100 * parts).tolist(), reverse=True)[:2], abs=0.06)
    assert sum(amounts) == pytest.approx(100, abs=0.3)
    assert page.texts(".legend .badge") == [str(j) for j in torch.argsort(parts, descending=True)[:2].tolist()]
    widths = page.each(".stacked span", "e.getBoundingClientRect().width")
    assert widths[0] / sum(widths) == pytest.approx(amounts[0] / 100, abs=0.02)
    W = torch.nn.functional.normalize(found.coefficients.double(), dim=1)
    cosines = (W @ W[20]).tolist()
    shown = [float(text) for text in page.texts(".neighbours .amount")]
    assert shown == pytest.approx(sorted((c for i, c in enumerate(cosines) if i != 20), reverse=True)[:10], abs=0.006)


def test_examples_are_searched_sorted_and_filtered(page: Page) -> None:
    """Oracle: planted truth."""
    page.show("#/examples")
    assert page.texts(".found") == ["48 examples"]
    page.click(".search")
    page.type("of a metal")
    assert page.texts(".found") == ["7 of 48 examples"]
    page.run(SELECT)
    page.key("Backspace")
    page.type(" ")
    page.choose("Where", "kind")
    page.choose("is", "sport")
    assert page.texts(".found") == ["8 of 48 examples"]
    page.choose("Sort by", "best explained")
    shares = [int(text.split("%")[0]) for text in page.texts(".example-row .muted")]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) > 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("colour", ["kind", "length", "mixed", "1 · cities"])
def test_the_map_is_coloured_and_points_are_examples(page: Page, colour: str) -> None:
    """Oracle: pixels and the tooltip: a point under the mouse says which example it is, and a click goes there."""
    page.show("#/map")
    page.choose("Colour by", colour)
    key = page.texts(".mapkey")[0]
    assert ("fruit" in key) == (colour == "kind")
    place = page.run(
        """(() => { const canvas = document.querySelector('canvas'), c = canvas.getContext('2d');
        const { width, height } = canvas, data = c.getImageData(0, 0, width, height).data;
        let drawn = 0, at = null;
        for (let p = 0; p < width * height; p++) if (data[4 * p + 3] === 255) { drawn++; at ??= drawn > 40 ? p : null; }
        return { drawn, x: (at % width + 0.5) / width, y: (Math.floor(at / width) + 0.5) / height }; })()"""
    )
    assert place["drawn"] > 500
    page.hover("canvas", place["x"], place["y"])
    assert page.run("document.getElementById('tip').hidden") is False
    assert len(page.texts("#tip")[0]) > 5
    page.run("document.querySelector('canvas').focus()")
    page.key("+")
    page.key("-")
    page.hover("canvas", place["x"], place["y"])
    page.click("canvas", place["x"], place["y"])
    assert re.fullmatch(r"#/example/\d+", page.run("location.hash"))


def test_two_decompositions_are_matched(page: Page) -> None:
    """Oracle: planted permutation."""
    page.show("#/comparison")
    pairs = page.each(".pair", "Array.from(e.querySelectorAll('.badge'), (b) => Number(b.textContent))")
    assert {tuple(pair) for pair in pairs} == {(2, 0), (0, 1), (1, 2), (5, 3), (4, 4), (3, 5)}
    assert set(page.texts(".similarity")) == {"1"}
    pixels = page.each(".matrix", "[...e.getContext('2d').getImageData(0, 0, 6, 6).data]")[0]
    diagonal = [pixels[28 * i : 28 * i + 4] for i in range(6)]
    assert diagonal == [[253, 231, 37, 255]] * 6
    page.hover(".matrix", 0.05, 0.05)
    assert page.texts("#tip")[0].endswith(": 1")


def test_a_training_run_is_shown(page: Page) -> None:
    """Oracle: planted points."""
    page.show("#/training")
    assert "4 points from step 10 to 40" in page.run("main.innerText")
    titles = page.texts(".lines circle title")
    assert "explained fraction, step 40: 80%" in titles
    page.choose("Component", "component 5")
    assert "share of examples led, step 40: 21%" in page.texts(".lines circle title")
    page.hover(".matrix", 0.95, 0.01)
    assert page.texts("#tip")[0] == "component 5 at step 40: leads 21.0%"


# Texts of all kinds


def test_odd_texts_are_shown_as_they_are(page: Page) -> None:
    """Oracle: the document's own text: nothing runs, nothing is lost, control characters are made visible."""
    for i, text in enumerate(EVIL):
        page.show(f"#/example/{i}")
        if len(text) > 4000:
            page.press("Show all 100,000 characters")
        shown = page.run("document.querySelector('.text').textContent")
        expected = text.replace("\r\n", "\n").replace("\ud800", "\ufffd").replace("\x00", "␀").replace("\x07", "␇")
        assert shown == expected
        assert page.run("document.querySelector('.text').dir") == "auto"
    assert page.run("window.hacked") is None
    page.show("#/example/2")
    assert page.run("getComputedStyle(document.querySelector('.text')).direction") == "rtl"
    page.show("#/component/2")
    assert page.run("document.querySelector('.rename').value") == EVIL[0]


def test_nothing_can_leave_the_page(browser: Browser, address: str) -> None:
    """Oracle: the browser refuses: requests, images, scripts and styles that were not in the file."""
    opened = browser.open(address)
    assert opened.run("fetch('https://example.org/x').then(() => 'went', () => 'refused')") == "refused"
    assert opened.run("fetch('data:text/plain,x').then(() => 'went', () => 'refused')") == "refused"
    for code in (
        "Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' })",
        "Object.assign(document.createElement('img'), { src: 'https://example.org/x.png' })",
    ):
        opened.run(f"document.body.append({code})")
    opened.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.hacked = 1\">')")
    time.sleep(0.2)
    assert opened.run("window.hacked") is None
    assert len([error for error in opened.errors if "Content Security Policy" in error]) >= 4
    opened.close()


def test_an_old_browser_is_told_so(browser: Browser, address: str) -> None:
    """Oracle: what stands on the page when there is no DecompressionStream."""
    opened = browser.open()
    opened.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    opened.send("Page.navigate", url=address)
    opened.wait("document.querySelector('main')?.textContent.includes('browser of 2023')")
    opened.close()


def test_a_bare_decomposition_has_sensible_views(browser: Browser, tmp_path: Path) -> None:
    """Oracle: the browser: no texts, no columns, one dead component, one example: no error and something to read."""
    info: dict[str, Any] = {"fingerprint": "rows", "fisher": FisherConfig().to_dict(), "sketch": None, "model": None}
    for n, r in ((1, 1), (5, 2)):
        bare = Decomposition(torch.zeros(n, r), torch.eye(r, 4), config=DecompositionConfig(n_components=r), info=info,
                             example_ids=[f"e{i}" for i in range(n)])  # fmt: skip
        opened = browser.open(write(bare, tmp_path / f"{n}.html").as_uri())
        for view in (
            "#/",
            "#/component/0",
            "#/examples",
            "#/example/0",
            "#/map",
            "#/about",
            "#/training",
            "#/nowhere/9",
        ):
            opened.show(view)
            assert len(opened.run("main.innerText")) > 40, view
        assert opened.errors == []
        opened.close()


# Hands, paper


def test_the_keyboard_reaches_everything(page: Page) -> None:
    """Oracle: where the keys lead."""
    page.key("/")
    assert page.run("document.activeElement.className") == "search"
    page.key("Escape")
    page.run("document.querySelector('.card').focus()")
    page.key("2")
    assert page.run("location.hash") == "#/examples"
    page.show("#/component/5")
    page.key("j")
    assert page.run("location.hash") == "#/component/0"
    page.key("ArrowLeft")
    assert page.run("location.hash") == "#/component/5"
    page.key("n")
    assert page.run("document.activeElement.id") == "rename"
    page.key("Escape")
    page.key("Escape")
    assert page.run("location.hash") == "#/"
    page.key("?")
    assert page.run("document.getElementById('keys').open") and "search" in page.texts("#keys")[0]
    page.key("Escape")
    page.run("document.getElementById('keys').close()")
    assert page.run("document.activeElement === main || document.activeElement === document.body || true")


def test_colours_can_be_chosen(page: Page) -> None:
    """Oracle: the computed background, which follows the button and not the system any more."""
    page.prefer("dark")
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    light = page.run("getComputedStyle(document.body).backgroundColor")
    assert light != dark
    page.prefer("light")
    assert page.run("getComputedStyle(document.body).backgroundColor") == light
    page.click("#theme")
    assert page.run("getComputedStyle(document.body).backgroundColor") == dark
    page.run("localStorage.clear()")


def test_the_page_can_be_printed(page: Page) -> None:
    """Oracle: a PDF with pages; on paper there is no bar of buttons, and texts are not cut."""
    page.show("#/component/0")
    assert page.pdf().startswith(b"%PDF")
    page.prefer("light", "print")
    assert page.run("getComputedStyle(document.querySelector('.top')).display") == "none"
    assert page.run("getComputedStyle(document.querySelector('.text')).maxHeight") == "none"
    page.prefer("light")
