"""Imports run one way: a module may import from its own folder, and from the floors above it in the table below.

The oracle is the source itself, read with ``ast``; nothing is executed. Two claims. Against the floors counts every
import, those inside functions included, but for those under ``if TYPE_CHECKING:``. And no modules import each other in
a circle, where those under ``if TYPE_CHECKING:`` count too. A new module in a folder needs no line; a new folder does.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "hf_npeff"

# Floors, each after everything that it may import: a folder with all that is in it, or a module at the top.
FLOORS = (
    "errors",
    "extras",  # libraries that only some functions need
    "config",
    "processes",  # which of several this is
    "progress",  # what is going on, for people
    "encoding",  # which columns are read, and how
    "padding",  # taken off examples, put on batches
    "images",  # whose they are, in a batch of texts with images
    "records",
    "data",
    # Low, because all that is kept has its methods from sharing/pretrained.py and is written with sharing/files.py.
    # What cards say of higher floors' objects they read through sharing/protocols.py.
    "sharing",
    "pefs",
    "fisher",  # examples -> PEFs
    "decomposition",  # PEFs -> components
    "weights",  # components -> directions and adapters
    "models",  # the model under analysis, a class a stage
    "analyzer",
    # what it is compared with, and studied on
    "baselines",
    "studies",
    # what people see
    "report",
    # the ways in
    "callback",
    "demo",
    "commands",
    "cli",
    "__init__",
    "__main__",
)

# Imports against the floors that we allow, each with its reason: a method on an early object that opens a late stage,
# such as Decomposition.to_html. Only inside a function, and only while the code really does it.
DOORWAYS: dict[tuple[str, str], str] = {
    ("decomposition.decomposition", "report"): "the folder of the next two",
    ("decomposition.decomposition", "report.page"): "Decomposition.to_html",
    ("decomposition.decomposition", "report.notebook"): "what Jupyter shows of a Decomposition",
    ("decomposition.associations", "report"): "the folder of the next",
    ("decomposition.associations", "report.notebook"): "what Jupyter shows of Associations",
    ("decomposition.component", "report"): "the folder of the next",
    ("decomposition.component", "report.notebook"): "what Jupyter shows of a Component",
    ("weights.change_report", "report"): "the folder of the next",
    ("weights.change_report", "report.change"): "what Jupyter shows of a ChangeReport",
    ("weights.directions", "models"): "the folder of the next",
    ("weights.directions", "models.change_ends"): "ParameterDirection.between and from_adapter load models",
    ("weights.measurement", "report"): "the folder of the next two",
    ("weights.measurement", "report.notebook"): "what Jupyter shows of a Measurement",
    ("weights.measurement", "report.plots"): "Measurement.plot",
    ("fisher.cost", "report"): "the folder of the next",
    ("fisher.cost", "report.notebook"): "what Jupyter shows of an Estimate",
    ("analyzer", "report"): "the folder of the next",
    ("analyzer", "report.notebook"): "what Jupyter shows of an NPEFFAnalyzer",
    ("config.kept", "report"): "the folder of the next",
    ("config.kept", "report.notebook"): "what Jupyter shows of a config",
    ("pefs.store", "report"): "the folder of the next",
    ("pefs.store", "report.notebook"): "what Jupyter shows of PEFs",
    ("weights.adapters", "report"): "the folder of the next",
    ("weights.adapters", "report.notebook"): "what Jupyter shows of an Adapter",
    ("weights.off_target", "report"): "the folder of the next",
    ("weights.off_target", "report.notebook"): "what Jupyter shows of an OffTarget",
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
    for_types: bool
    """Under ``if TYPE_CHECKING:``."""


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
    imports: list[Import] = []
    is_folder = modules[name].name == "__init__.py"
    position = ([] if name == "__init__" else name.split(".")) if is_folder else name.split(".")[:-1]

    def add(target: list[str], line: int, in_function: bool, for_types: bool) -> None:
        """`target` is a path below the package; what follows the module in it (a class, a function) is cut off."""
        while target and ".".join(target) not in modules:
            target = target[:-1]
        runs = [".".join(target[: i + 1]) for i in range(len(target))] or ["__init__"]
        own_folders = {".".join(position[: i + 1]) for i in range(len(position))}
        for module in runs:
            named = module == runs[-1]
            if module in modules and module != name and (named or module not in own_folders):
                imports.append(Import(name, module, line, in_function, for_types))

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, in_function, True)
            for child in node.orelse:
                visit(child, in_function, for_types)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    add(alias.name.split(".")[1:], node.lineno, in_function, for_types)
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
                    add(target, node.lineno, in_function, for_types)
        enters = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or enters, for_types)

    visit(ast.parse(modules[name].read_text(encoding="utf-8")), False, False)
    return imports


def violations(package: Path, floors: tuple[str, ...], doorways: dict[tuple[str, str], str]) -> list[str]:
    """What is wrong with the package's imports, a sentence each."""
    rank = {floor: height for height, floor in enumerate(floors)}
    modules = modules_of(package)
    floor_of = {name: name.split(".")[0] for name in modules}
    homeless = sorted({floor for floor in floor_of.values() if floor not in rank})
    wrong = [
        f"{floor} has no place: put it into FLOORS in tests/test_imports.py, after what it imports"
        for floor in homeless
    ]
    used = set()
    for name in modules:
        for edge in imports_of(name, modules):
            importer, imported = floor_of[edge.importer], floor_of[edge.imported]
            if edge.in_function and edge[:2] in doorways:
                used.add(edge[:2])
            elif not edge.for_types and not {importer, imported} & {*homeless} and rank[imported] > rank[importer]:
                wrong.append(f"{edge.importer}:{edge.line} imports {edge.imported}, whose floor comes later in FLOORS")
    wrong += [f"DOORWAYS still lists {edge}, which the code no longer uses" for edge in doorways.keys() - used]
    return wrong


def circles(package: Path, doorways: dict[tuple[str, str], str]) -> list[list[str]]:
    """Sets of modules that import each other, directly or by way of others; type checking counts, doorways do not."""
    modules = modules_of(package)
    below: dict[str, set[str]] = {name: set() for name in modules}
    for name in modules:
        for edge in imports_of(name, modules):
            if not (edge.in_function and edge[:2] in doorways):
                below[name].add(edge.imported)

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(below[name])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += below[other]
        return seen

    reach = {name: reached(name) for name in modules}
    groups = {tuple(sorted(o for o in reach[name] if name in reach[o])) for name in modules if name in reach[name]}
    return [list(group) for group in sorted(groups)]


def test_the_table_names_each_floor_once_and_each_exists():
    """Oracle: identity with the files."""
    assert len(set(FLOORS)) == len(FLOORS)
    assert set(FLOORS) == {name.split(".")[0] for name in modules_of(REPOSITORY / PACKAGE)}


def test_imports_run_one_way():
    """Oracle: the import graph of the source, against FLOORS."""
    wrong = violations(REPOSITORY / PACKAGE, FLOORS, DOORWAYS)
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    """Oracle: the import graph of the source, with what type checkers and functions import."""
    assert circles(REPOSITORY / PACKAGE, DOORWAYS) == []


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


PLANTED_FLOORS = ("low", "folder", "high", "__init__")


def planted_package(tmp_path: Path, **sources: str) -> Path:
    """A package of empty modules, but for those whose source is given by path."""
    package = tmp_path / PACKAGE
    (package / "folder").mkdir(parents=True)
    for name in ("__init__", "low", "high", "folder/__init__", "folder/first", "folder/second"):
        (package / f"{name}.py").write_text("")
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    return package


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
        ("folder/first", "from .second import x", None),
        ("folder/second", "from .first import x", None),
        ("folder/second", "def f():\n    import hf_npeff.high", "folder.second:2 imports high"),
        ("folder/__init__", "from .first import x", None),
        ("folder/__init__", "from ..high import x", "folder:1 imports high"),
        ("__init__", "from .high import x\nfrom hf_npeff.folder import second", None),
        ("stray", "", "stray has no place"),
        ("stray", "import hf_npeff.high", "stray has no place"),
    ],
)
def test_the_check_itself_finds_a_planted_import(tmp_path, module, source, expected):
    """Oracle: planted truth."""
    wrong = violations(planted_package(tmp_path, **{module: source}), PLANTED_FLOORS, {})
    if expected is None:
        assert wrong == []
    else:
        assert wrong and expected in wrong[0]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"folder/first": "from .second import x"}, []),
        (
            {"folder/first": "from .second import x", "folder/second": "from .first import x"},
            [["folder.first", "folder.second"]],
        ),
        (
            {"folder/first": "from .second import x", "folder/second": "if TYPE_CHECKING:\n    from .first import x"},
            [["folder.first", "folder.second"]],
        ),
        (
            {"low": "def f():\n    import hf_npeff.high", "high": "import hf_npeff.folder.first"}
            | {"folder/first": "from hf_npeff.low import x"},
            [["folder.first", "high", "low"]],
        ),
        (
            {"folder/__init__": "from .first import x", "folder/first": "import hf_npeff.low"}
            | {"low": "from hf_npeff.folder import second"},
            [["folder", "folder.first", "low"]],
        ),
    ],
)
def test_the_check_itself_finds_a_planted_circle(tmp_path, sources, expected):
    """Oracle: planted truth."""
    assert circles(planted_package(tmp_path, **sources), {}) == expected


def test_a_doorway_opens_inside_functions_only_and_must_be_used(tmp_path):
    """Oracle: planted truth."""
    doorways = {("low", "high"): "a reason"}
    inside = "def f():\n    from hf_npeff import high"
    package = planted_package(tmp_path, low=inside, high="import hf_npeff.low")
    assert violations(package, PLANTED_FLOORS, doorways) == [] and circles(package, doorways) == []
    assert circles(package, {}) == [["high", "low"]]
    (package / "low.py").write_text("from hf_npeff import high")
    assert any("low:1 imports high" in wrong for wrong in violations(package, PLANTED_FLOORS, doorways))
    assert circles(package, doorways) == [["high", "low"]]
    (package / "low.py").write_text("")
    assert any("no longer uses" in wrong for wrong in violations(package, PLANTED_FLOORS, doorways))
