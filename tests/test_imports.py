"""Imports run one way, down the table below: a module may import only what stands above it.

The oracle is the source itself, read with ``ast``; nothing is executed. An import inside a function counts like any
other, one under ``if TYPE_CHECKING:`` does not. To add a module, give it a line in ``ORDER``.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "hf_npeff"

# Each module after everything that it may import. A folder's name stands for its __init__.py: whoever imports one of
# a folder's modules from outside runs that file too, so it stands with the folder's lowest users, not its highest.
# Lines need not exist yet: the table is also the plan.
ORDER = (
    # bottom: no arithmetic, no models
    "errors",
    "extras",  # libraries that only some functions need
    "config",
    "sharing",
    "sharing.parquet_footer",
    "sharing.files",
    "sharing.hub",  # folders to and from the Hub; knows nothing of what is in them
    "sharing.pretrained",  # the methods of everything that is kept in a folder and published
    "sharing.markdown",  # values that are shown as the text that they are
    "sharing.cards",  # what README.md says of objects that it is handed
    "sharing.direction_cards",
    "data",
    # examples -> PEFs
    "fisher",
    "fisher.distributions",
    "fisher.fsdp",  # weights in pieces over processes
    "fisher.heads",
    "fisher.factors",
    "pefs",
    "pefs.sketches",
    "fisher.parameters",  # by autograd, what hooks do not see
    "fisher.gradients",
    "fisher.metric",  # which rows are the best ones
    "fisher.cost",
    "fisher.selftest",
    "pefs.manifest",  # what a store says of itself, checked
    "pefs.shards",
    "pefs.store",
    "fisher.passes",
    "fisher.compute",  # writes stores
    # PEFs -> decomposition -> components
    "decomposition",
    "decomposition.objective",
    "decomposition.solvers",
    "decomposition.starts",
    "decomposition.distributed",
    "decomposition.weighting",
    "decomposition.folder",
    "decomposition.component",
    "decomposition.decomposition",
    "decomposition.matching",
    "decomposition.drift",
    "decomposition.chunks",
    "decomposition.held_out",
    "decomposition.estimator",  # fit returns a Decomposition
    # components -> directions and adapters
    "weights",
    "weights.adapters",  # files of plain weight deltas
    "weights.lora",
    "weights.directions",  # a ParameterDirection knows how to become an adapter
    "weights.compressed_sensing",
    "weights.exact_lifting",
    "weights.lifting",
    "weights.token_alignments",  # by the same replay of cotangents
    "fisher.predictions",
    "weights.perturbation",
    "fisher.limits",  # what examples must keep to
    "analysed_model",
    "analyzer",
    # what it is compared with, and studied on
    "baselines",  # its names are imported when they are first asked for
    "baselines.method",
    "baselines.activations",
    "baselines.gradient_clustering",
    "baselines.sparse_autoencoder",
    "studies",
    "studies.word_relations",
    "studies.settings",  # of all of them; the command line reads it, so nothing heavy
    "studies.measures",
    "studies.attributes",
    "studies.result",
    "studies.factors",
    "studies.selectivity",
    "studies.overview",  # tables over several results
    "studies.probes",  # why a method finds or misses
    "studies.comparison",
    "studies.planted",
    "studies.ratings",
    "studies.detection",
    "studies.raters",
    "studies.datasets",
    "studies.prompted",
    "studies.in_context",
    "studies.ablations",
    # what people see
    "report",
    "report.columns",
    "report.examples",
    "report.modules",
    "report.training",
    "report.pack",
    "report.data",
    "report.plots",
    "report.notebook",
    "report.page",
    # the ways in
    "callback",
    "demo",
    "commands.options",  # what the commands have in common
    "commands",
    "commands.making",
    "commands.looking",
    "commands.acting",
    "commands.studying",
    "commands.reporting",
    "cli",
    "__init__",
    "__main__",
)

# Imports against the order that we allow, each with its reason: a method on an early object that opens a late stage,
# such as Decomposition.to_html. Only inside a function, and only while the code really does it.
DOORWAYS: dict[tuple[str, str], str] = {
    ("decomposition.decomposition", "report"): "the folder of the next two",
    ("decomposition.decomposition", "report.page"): "Decomposition.to_html",
    ("decomposition.decomposition", "report.notebook"): "what Jupyter shows of a Decomposition",
    ("decomposition.component", "report"): "the folder of the next",
    ("decomposition.component", "report.notebook"): "what Jupyter shows of a Component",
    ("weights.perturbation", "report"): "the folder of the next",
    ("weights.perturbation", "report.notebook"): "what Jupyter shows of a PerturbationReport",
}

VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
HEAVY = {"gensim", "krippendorff", "peft", "plotly", "sklearn", "tensorboard", "torch", "transformers", "typer"}


class Import(NamedTuple):
    """One import of a module of the package by another."""

    importer: str
    imported: str
    line: int
    in_function: bool


def modules_of(package: Path) -> dict[str, Path]:
    """Each module's name without the package's ("fisher.compute", "fisher" for the folder's __init__), and its file."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        modules[".".join(parts)] = path
    return modules


def imports_of(name: str, modules: dict[str, Path]) -> list[Import]:
    """Every import of the package's own modules in one module, the folders' __init__ files that it runs included."""
    found: list[Import] = []
    is_folder = modules[name].name == "__init__.py"
    position = ([] if name == "__init__" else name.split(".")) if is_folder else name.split(".")[:-1]

    def add(target: list[str], line: int, in_function: bool) -> None:
        """`target` is a path below the package; what follows the module in it (a class, a function) is cut off."""
        while target and ".".join(target) not in modules:
            target = target[:-1]
        runs = [".".join(target[: i + 1]) for i in range(len(target))] or ["__init__"]
        own_folders = {".".join(position[: i + 1]) for i in range(len(position))}
        for module in runs:
            named = module == runs[-1]
            if module in modules and module != name and (named or module not in own_folders):
                found.append(Import(name, module, line, in_function))

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child, in_function)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    add(alias.name.split(".")[1:], node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = position[: len(position) - (node.level - 1)]
            elif (node.module or "").split(".")[0] == PACKAGE:
                base = []
            else:
                return
            below = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
            for alias in node.names:
                target = [part for part in [*base, *below, alias.name] if part]
                if target != ["__version__"]:  # the one name that every module may take from the top
                    add(target, node.lineno, in_function)
        enters = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or enters)

    visit(ast.parse(modules[name].read_text(encoding="utf-8")), False)
    return found


def violations(package: Path, order: tuple[str, ...], doorways: dict[tuple[str, str], str]) -> list[str]:
    """What is wrong with the package's imports, a sentence each."""
    rank = {name: position for position, name in enumerate(order)}
    modules = modules_of(package)
    wrong = [
        f"{name} ({path.name}) has no place: put it into ORDER in tests/test_imports.py, below what it imports"
        for name, path in modules.items()
        if name not in rank
    ]
    used = set()
    for name in modules:
        for found in imports_of(name, modules):
            edge = (found.importer, found.imported)
            if found.in_function and edge in doorways:
                used.add(edge)
            elif found.importer in rank and found.imported in rank and rank[found.imported] >= rank[found.importer]:
                wrong.append(f"{found.importer}:{found.line} imports {found.imported}, which comes after it in ORDER")
    wrong += [f"DOORWAYS still lists {edge}, which the code no longer uses" for edge in doorways.keys() - used]
    return wrong


def test_the_table_names_each_module_once():
    """Oracle: identity."""
    assert len(set(ORDER)) == len(ORDER)


def test_imports_run_one_way():
    """Oracle: the import graph of the source, against ORDER."""
    wrong = violations(REPOSITORY / PACKAGE, ORDER, DOORWAYS)
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_module_has_a_vague_name():
    """Oracle: identity. A function belongs to the noun that it acts on."""
    vague = [name for name in modules_of(REPOSITORY / PACKAGE) if VAGUE_NAMES & set(name.split("."))]
    assert not vague, f"rename after the noun they act on: {vague}"


def test_the_slow_references_never_import_the_package():
    """Oracle: identity. A reference that called the code under test would agree with its mistakes."""
    path = REPOSITORY / "tests" / "reference.py"
    if not path.exists():
        pytest.skip("tests/reference.py is not written yet")
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in (PACKAGE, "")]


def _modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after some code."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize(("module", "allowed"), [(PACKAGE, set()), (f"{PACKAGE}.cli", {"typer"})])
def test_importing_the_package_or_its_commands_loads_nothing_heavy(module: str, allowed: set[str]):
    """Oracle: sys.modules of a fresh interpreter. What `--help` and tab completion import is what they wait for."""
    loaded = _modules_after(f"import {module}") & HEAVY - allowed
    assert not loaded, f"import {module} also imports {loaded}"


def test_the_main_stages_load_no_extra():
    """Oracle: sys.modules of a fresh interpreter. (transformers.TrainerCallback alone brings peft: load it late.)"""
    loaded = _modules_after(f"from {PACKAGE} import NPEFFAnalyzer") & HEAVY - {"torch", "transformers"}
    assert not loaded, f"NPEFFAnalyzer also imports {loaded}"


def test_every_public_name_is_there_for_people_and_for_type_checkers():
    """Oracle: identity of __all__ with the table of modules, the TYPE_CHECKING block, dir(), and what is found."""
    import hf_npeff

    tree = ast.parse((REPOSITORY / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    shown = {
        alias.name: node.module.removeprefix(f"{PACKAGE}.")
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert shown == hf_npeff._MODULE_OF
    assert sorted(hf_npeff.__all__) == sorted(shown) and set(shown) <= set(dir(hf_npeff))
    for name in hf_npeff.__all__:
        assert getattr(hf_npeff, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = hf_npeff.Nothing


PLANTED_ORDER = ("low", "folder", "folder.first", "folder.second", "high", "__init__")


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("low", "from hf_npeff.high import x", "low:1 imports high"),
        ("low", "import hf_npeff.high", "low:1 imports high"),
        ("low", "from . import high", "low:1 imports high"),
        ("low", "from .high import x", "low:1 imports high"),
        ("low", "from hf_npeff import x", "low:1 imports __init__"),
        ("low", "def f():\n    from hf_npeff import high", "low:2 imports high"),
        ("low", "import typing\nif typing.TYPE_CHECKING:\n    from hf_npeff import high", None),
        ("low", "if TYPE_CHECKING:\n    pass\nelse:\n    import hf_npeff.high", "low:4 imports high"),
        ("low", "from hf_npeff import __version__", None),
        ("low", "from hf_npeff.folder.first import x", "low:1 imports folder,"),
        ("high", "from hf_npeff.low import x\nfrom .folder import second", None),
        ("folder/first", "from ..low import x", None),
        ("folder/first", "from ..high import x", "folder.first:1 imports high"),
        ("folder/first", "from .second import x", "folder.first:1 imports folder.second"),
        ("folder/second", "from .first import x", None),
        ("folder/__init__", "from .first import x", "folder:1 imports folder.first"),
        ("__init__", "from .high import x\nfrom hf_npeff.folder import second", None),
        ("stray", "", "stray (stray.py) has no place"),
    ],
)
def test_the_check_itself_finds_a_planted_import(tmp_path, module, source, expected):
    """Oracle: planted truth."""
    package = tmp_path / PACKAGE
    (package / "folder").mkdir(parents=True)
    for name in ("__init__", "low", "high", "folder/__init__", "folder/first", "folder/second"):
        (package / f"{name}.py").write_text("")
    (package / f"{module}.py").write_text(source)
    wrong = violations(package, PLANTED_ORDER, {})
    if expected is None:
        assert wrong == []
    else:
        assert wrong and expected in wrong[0]


def test_a_doorway_opens_inside_functions_only_and_must_be_used(tmp_path):
    """Oracle: planted truth."""
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "high.py").write_text("")
    doorways = {("low", "high"): "a reason"}
    (package / "low.py").write_text("def f():\n    from hf_npeff import high")
    assert violations(package, PLANTED_ORDER, doorways) == []
    (package / "low.py").write_text("from hf_npeff import high")
    assert any("low:1 imports high" in wrong for wrong in violations(package, PLANTED_ORDER, doorways))
    (package / "low.py").write_text("")
    assert any("no longer uses" in wrong for wrong in violations(package, PLANTED_ORDER, doorways))
