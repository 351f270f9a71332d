"""The pictures of the page in docs/figures, from the page that the demo writes.

    python -m tests.benchmarks.screenshots runs/demo/components.html

Needs Chromium and Pillow. Look at every picture before it is committed: overlaps, cut words, unexplained numbers.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from hf_npeff.report.data import PageData
from hf_npeff.report.page import render
from tests.browser import Browser, find_browser
from tests.test_report import read

FIGURES = Path(__file__).resolve().parent.parent.parent / "docs" / "figures"
PICTURES: dict[str, tuple[int, int, str, str | None]] = {
    "page": (1280, 860, "light", None),
    "page-overview-light": (1400, 1000, "light", None),
    "page-overview-phone-dark": (500, 1000, "dark", None),
    "page-component-dark": (1400, 1000, "dark", "Certificate"),
    "page-certificate-phone-light": (500, 1000, "light", "Certificate"),
}
"""{file: width, height, colours, heading of a component's view to scroll to; None shows the overview}."""
_COLOURS = 200
"""Colours of a picture. Chosen: no difference can be seen, and files are a third as large."""


def rendered(page: Path, folder: Path) -> tuple[Path, int]:
    """The page with the present script, as if it were in runs/demo; and its most selective component."""
    facts, arrays = read(page)
    facts["adapters"] = dict.fromkeys(facts["adapters"], "runs/demo/adapter")
    target = folder / "components.html"
    target.write_text(render(PageData(facts, arrays), "SmolLM2-135M-Instruct"), encoding="utf-8")
    reports: dict[str, Any] = facts["reports"]
    return target, int(max(reports, key=lambda j: reports[j]["best"]["ratio"]))


def main() -> None:
    """Take every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="components.html of the demo")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder for the pictures")
    arguments = parser.parse_args()
    executable = find_browser()
    if executable is None:
        raise SystemExit("no Chromium was found; make browser installs one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    page, component = rendered(arguments.page, arguments.output)
    browser = Browser(executable)
    try:
        for name, (width, height, scheme, heading) in PICTURES.items():
            tab = browser.open(page.resolve().as_uri(), width=width, height=height)
            tab.prefer(scheme)
            tab.show("#/" if heading is None else f"#/component/{component}")
            if heading is not None:
                tab.run(
                    f"""(() => {{
                      const headings = [...document.querySelectorAll("h2")];
                      const shown = headings.find((h) => h.textContent === {json.dumps(heading)});
                      const bar = document.getElementById("top").getBoundingClientRect().height;
                      scrollTo(0, shown.getBoundingClientRect().top + scrollY - bar - 20);
                    }})()"""
                )
                tab.settle()
            picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
            small = picture.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            small.save(arguments.output / f"{name}.png", optimize=True)
            assert not tab.errors, tab.errors
    finally:
        browser.close()
        page.unlink()


if __name__ == "__main__":
    main()
