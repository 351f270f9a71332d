"""A page of 10,000 examples and 256 components: how large it is, and how soon a person can use it.

    python -m tests.benchmarks.page [--examples 10000] [--components 256] [--layout tsne]

The coefficients are dense, the worst case for size; texts are 200 random words' worth of characters. The time goes from
the start of the navigation to the frame after the first cards are drawn, in Chromium without a screen.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from hf_npeff import Decomposition, DecompositionConfig, FisherConfig
from hf_npeff.report.page import write
from tests.browser import Browser, find_browser

WORDS = "the of a model answers weight moves city state verb plural past tense question because river".split()


def made(n: int, r: int, seed: int = 0, *, dense: bool = True) -> Decomposition:
    """A random decomposition with texts, a label, a prediction and a number."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    W = torch.rand(n, r, generator=generator) ** 8
    if not dense:
        W = torch.where(W > 0.2, W, 0.0)
    G = torch.nn.functional.normalize(torch.randn(r, 64, generator=generator), dim=1)
    texts = [" ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(30)) for _ in range(n)]
    labels = [rng.randrange(6) for _ in range(n)]
    columns = {
        "text": texts,
        "label": labels,
        "prediction": [str(x if rng.random() < 0.8 else rng.randrange(6)) for x in labels],
        "length": [len(text) + rng.random() for text in texts],
    }
    info = {"fingerprint": "random", "fisher": FisherConfig().to_dict(), "sketch": None, "model": None}
    return Decomposition(
        W,
        G,
        config=DecompositionConfig(n_components=r),
        info=info,
        example_ids=[str(i) for i in range(n)],
        columns=columns,
        stability=torch.rand(r, generator=generator),
        loss_history=[1.0, 0.5, 0.3],
    )


def main() -> None:
    """Write the page, open it a few times, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--components", type=int, default=256)
    parser.add_argument("--layout", choices=("tsne", "pca", "none"), default="tsne")
    parser.add_argument("--keep", type=Path, help="Keep the page here.")
    given = parser.parse_args()
    decomposition = made(given.examples, given.components)
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
