"""What a user gets: the wheel and the sdist are built, installed in an empty environment, and the README is run there.

    make release-check      (some minutes; downloads the dependencies)

Each step prints a line, and the first that fails ends in an exit code of 1. `PIP_FLAGS` goes to pip, as in the
Makefile. Nothing is written into the repository.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PIP = [*shlex.split(os.environ.get("PIP_FLAGS", "")), "--constraint", str(REPOSITORY / "constraints.txt")]
FILES = ("py.typed", "sharing/templates/decomposition.md", "report/page_files/page.html", "studies/grid.yaml",
         "studies/prompts/pick.txt", "studies/task_files/sst2.yaml", "studies/templates/rating.html")  # fmt: skip
"""Some of what is no module."""

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The README's model; here the name of a folder."""

WORLD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.tiny import tiny_model, tiny_tokenizer
tiny_model("llama", dtype=torch.float32).save_pretrained(sys.argv[3])
words = sys.argv[2].split()
tiny_tokenizer(words=words).save_pretrained(sys.argv[3])
"""
"""A tiny model in a folder named as the README's model, which knows the README's words. The package is not imported."""

QUICK_START = """
{block}
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("{model}")
PeftModel.from_pretrained(base, "runs/component-0")
"""

PAGE = """
import torch
from hf_npeff import NPEFF, PEFs
found = NPEFF(2, n_restarts=1).fit(PEFs.from_factors(torch.randn(20, 1, 6)))
found.to_html("plain.html", layout=None)
found.to_html("map.html")
"""


class ReleaseError(Exception):
    """A step that fails; the message says which."""


def step(claim: str, holds: bool = True, why: object = "") -> None:
    """Print a step that holds.

    Raises:
        ReleaseError: if it does not.
    """
    if not holds:
        raise ReleaseError(f"{claim}: {why}")
    print(f"  {claim}", flush=True)


def run(*words: str | Path, folder: Path, fails: bool = False) -> str:
    """What a command says, run with a clean environment.

    Raises:
        ReleaseError: if it fails, or does not where it should.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "120"}
    done = subprocess.run([str(w) for w in words], cwd=folder, env=keep | offline, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if (done.returncode != 0) is not fails:
        raise ReleaseError(f"{' '.join(str(w) for w in words)[:200]} ended in {done.returncode}:\n{said[-3000:]}")
    return said


def environment(folder: Path, *packages: str | Path) -> Path:
    """The Python of a fresh environment that has these packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *PIP, *packages, folder=folder)
    return python


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel that is made from the sdist, and the sdist; the wheel made from the tree is the same."""
    tools = environment(folder / "tools", "build", "twine")
    run(tools, "-m", "build", "--outdir", folder / "dist", REPOSITORY, folder=folder)
    run(tools, "-m", "build", "--wheel", "--outdir", folder / "direct", REPOSITORY, folder=folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    (direct,) = (folder / "direct").glob("*.whl")
    step("the sdist builds the wheel that the tree builds", contents(wheel) == contents(direct), wheel)
    run(tools, "-m", "twine", "check", "--strict", wheel, sdist, folder=folder)
    step("twine finds nothing wrong with the metadata")
    return wheel, sdist


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def inspect(wheel: Path, sdist: Path) -> None:
    """What is in the two."""
    inside = contents(wheel)
    source = {
        str(path.relative_to(REPOSITORY)): path.read_bytes()
        for path in (REPOSITORY / "hf_npeff").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    package = {name: content for name, content in inside.items() if ".dist-info/" not in name}
    step(f"the wheel is the package, {len(package)} files", package == source, set(package) ^ set(source))
    missing = [name for name in FILES if f"hf_npeff/{name}" not in package]
    step("templates, prompts, tasks and py.typed are inside", not missing, missing)
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    strange = [n for n in names if re.search(r"__pycache__|\.pyc$|^runs/|^\.venv|_cache/|^build/|^dist/", n)]
    step(f"the sdist has no caches and no runs, {len(names)} files", not strange, strange[:5])


def use(python: Path, folder: Path, block: str) -> None:
    """What a new user does first, in an empty folder."""
    bin_ = python.parent
    where = run(python, "-c", "import hf_npeff; print(hf_npeff.__file__)", folder=folder)
    step("import hf_npeff", "site-packages" in where, where)
    for words in ([], ["compute"], ["study"], ["demo"]):
        run(bin_ / "hf-npeff", *words, "--help", folder=folder)
    step("hf-npeff --help")
    run(python, "-c", QUICK_START.format(block=block, model=MODEL), folder=folder)
    step("the README's Python, and PEFT loads the adapter", (folder / "runs" / "component-0").is_dir())


def words_of(block: str) -> list[str]:
    """The words of the README's data set."""
    texts = re.findall(r'"([^"]*)"', block.split("analyzer")[0])
    return sorted(set(re.findall(r"[A-Za-z]+|->", " ".join(texts).replace("\\n", " "))))


def main() -> None:
    """Every step."""
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        print("build")
        wheel, sdist = build(folder)
        inspect(wheel, sdist)
        print("the wheel, with its plain dependencies")
        python, home = environment(folder / "user", wheel), folder / "home"
        home.mkdir()
        run(python, "-m", "pip", "check", folder=home)
        run(python, "-c", WORLD, REPOSITORY, " ".join(words_of(block)), MODEL, folder=home)
        use(python, home, block)
        for words, extra in (
            ([python, "-c", PAGE], "viz"),
            ([python, "-c", "from hf_npeff.report import plots; plots._plotly()"], "viz"),
            ([python.parent / "hf-npeff", "study", "planted"], "eval"),
            ([python.parent / "hf-npeff", "demo"], "demo"),
        ):
            said = run(*words, folder=home, fails=True)
            step(f"without the extra {extra} its name is said", f"pip install 'hf-npeff[{extra}]'" in said, said[-500:])
        print("the wheel, with the extra that the message names")
        run(python, "-m", "pip", "install", "--quiet", *PIP, f"{wheel}[viz]", folder=home)
        (home / "plain.html").unlink()
        run(python, "-c", PAGE, folder=home)
        step("the page with its map", (home / "map.html").is_file())
        print("the sdist")
        run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", sdist, folder=home)
        again = folder / "again"
        again.mkdir()
        (home / MODEL).parent.rename((again / MODEL).parent)
        use(python, again, block)
    print("a release can be made")


if __name__ == "__main__":
    try:
        main()
    except ReleaseError as error:
        sys.exit(f"error: {error}")
