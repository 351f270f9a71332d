"""A page of 10,000 examples and 256 components: how large it is, and how soon a person can use it.

    python -m tests.benchmarks.page [--examples 10000] [--components 256] [--layout tsne]

The coefficients are dense, the worst case for size; texts are 200 random words' worth of characters. The time goes from
the start of the navigation to the frame after the first cards are drawn, in Chromium without a screen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from hf_npeff.report.page import write
from tests.browser import Browser, find_browser
from tests.random_decomposition import random_decomposition


def main() -> None:
    """Write the page, open it a few times, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--components", type=int, default=256)
    parser.add_argument("--layout", choices=("tsne", "pca", "none"), default="tsne")
    parser.add_argument("--keep", type=Path, help="Keep the page here.")
    given = parser.parse_args()
    decomposition = random_decomposition(given.examples, given.components)
    with tempfile.TemporaryDirectory() as folder:
        path = given.keep or Path(folder) / "page.html"
        started = time.perf_counter()
        write(decomposition, path, layout=None if given.layout == "none" else given.layout, force=True)
        print(f"written in {time.perf_counter() - started:.1f} s: {path.stat().st_size / 1e6:.2f} MB")
        executable = find_browser()
        if executable is None:
            print("no Chromium here: the time to interactive was not measured")
            return
        browser = Browser(executable)
        try:
            for _ in range(3):
                page = browser.open(path.resolve().as_uri())
                page.wait("document.querySelectorAll('.card').length > 3")
                page.settle()
                ready = page.run("performance.getEntriesByName('ready')[0].startTime")
                drawn = page.run("performance.now()")
                print(f"ready after {ready / 1000:.2f} s, cards drawn by {drawn / 1000:.2f} s, errors {page.errors}")
                for name, expression in ACTIONS.items():
                    print(f"   {name}: {page.run(TIMED % expression):.0f} ms")
                page.close()
        finally:
            browser.close()


TIMED = """(async () => {
  const started = performance.now();
  %s;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - started;
})()"""
ACTIONS = {
    "sort by purity": """const list = [...document.querySelectorAll("select")].find((s) => s.value === "number");
  list.value = "purity"; list.dispatchEvent(new Event("change"))""",
    "a component": "location.hash = '#/component/7'",
    "an example": "location.hash = '#/example/7'",
    "the map": "location.hash = '#/map'",
    "all examples": "location.hash = '#/examples'",
}


if __name__ == "__main__":
    main()
