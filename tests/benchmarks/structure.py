"""The shape of the package at two revisions, side by side: `python -m tests.benchmarks.structure 250ad38 main`.

Lines, modules, circles of imports, the largest file and function. And where a value goes: a data set from
`compute_pefs`, and a component's number from `lift`, followed through calls, loops and constructors by the names that
they go by. Only the syntax tree is read: a function is known where it is imported or defined by name, a method where
the package has one of that name.
"""

from __future__ import annotations

import ast
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.test_imports import PACKAGE, REPOSITORY, imports_of, modules_of

FOLLOWED = (
    ("a data set", "compute_pefs", "dataset"),
    ("a component's number", "lift", "components"),
    ("a component's number", "evaluate_direction", "component"),
)
"""What is followed: (what it is, the analyzer's method, its parameter)."""
LATER = set("pefs decomposition direction directions lifted report reports analyzer self plans".split())
LATER |= set("mixtures rows coefficients shares chosen indices limits kept facts".split())
"""Names of what is made from a value at a later stage: there it is followed no more."""
OWN = ("analysed_model", "edited_model", "fisher_model", "lifted_model", "measured_model", "movable_model")
"""Modules of the classes that the analyzer is made of."""
DEEP = 12
"""Calls within calls that are followed. Chosen: more than any path of the package is long."""


class Function(NamedTuple):
    """One function of the package."""

    place: str
    node: ast.FunctionDef
    imported: dict[str, str]
    """{name: module} of what its module imports from the package."""

    @property
    def module(self) -> str:
        """The module that it stands in."""
        return self.place.split(":")[0]

    @property
    def lines(self) -> int:
        """Lines of the function, those of its docstring left out."""
        first = self.node.body[0]
        has_docstring = ast.get_docstring(self.node) is not None
        docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
        return (self.node.end_lineno or 0) - self.node.lineno + 1 - docstring

    @property
    def parameters(self) -> list[str]:
        """Names in order, without self."""
        args = self.node.args
        return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg not in ("self", "cls")]


def checkout(revision: str, folder: Path) -> Path:
    """The package as it is at a revision."""
    packed = subprocess.run(["git", "archive", revision, PACKAGE], cwd=REPOSITORY, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / PACKAGE


def functions_of(package: Path) -> list[Function]:
    """Every function and method; a class's constructor goes by the name of the class."""
    found = []

    def visit(node: ast.AST, prefix: str, imported: dict[str, str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.", imported)
            elif isinstance(child, ast.FunctionDef):
                found.append(Function(prefix + child.name, child, imported))
                visit(child, f"{prefix}{child.name}.", imported)

    for name, path in modules_of(package).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = [node for node in statements if (node.module or "").startswith(f"{PACKAGE}.")]
        imported = {a.name: str(node.module).removeprefix(f"{PACKAGE}.") for node in own for a in node.names}
        visit(tree, f"{name}:", imported)
    return found


def circles(package: Path) -> list[list[str]]:
    """Sets of modules that import each other at the level of modules, type checking included."""
    modules = modules_of(package)
    below = {name: {e.imported for e in imports_of(name, modules) if not e.in_function} for name in modules}

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(below[name])
        while waiting:
            if (other := waiting.pop()) not in seen:
                seen.add(other)
                waiting += below[other]
        return seen

    reach = {name: reached(name) for name in modules}
    return [list(g) for g in {tuple(sorted(o for o in reach[n] if n in reach[o])) for n in modules if n in reach[n]}]


def _called(node: ast.Call, caller: Function, known: dict[str, list[Function]]) -> Function | None:
    """The function of the package that a call means, where that can be told."""
    if isinstance(node.func, ast.Name):
        name = node.func.id
        module = caller.imported.get(name, caller.module)
        places = {f"{module}:{name}", f"{module}:{name}.__init__"}
        return next((f for f in known.get(name, []) if f.place in places), None)
    methods = known.get(getattr(node.func, "attr", ""), [])
    if len(methods) > 1:  # of several, the one that the module of the call knows
        near = {caller.module, *caller.imported.values()}
        if ast.unparse(node.func).split(".")[0] in ("self", "analyzer"):  # its own, or of the class that it is made of
            near = {caller.module, *(method.module for method in methods if method.module.split(".")[-1] in OWN)}
        methods = [method for method in methods if method.module in near]
    return methods[0] if len(methods) == 1 else None


def _holds(node: ast.AST, name: str) -> bool:
    """Whether an argument is the value itself, starred or in a list."""
    if isinstance(node, ast.Starred):
        return _holds(node.value, name)
    if isinstance(node, ast.List | ast.Tuple):
        return any(_holds(one, name) for one in node.elts)
    return isinstance(node, ast.Name) and node.id == name


def _names(target: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def goes_on(function: Function, name: str, by_name: dict[str, list[Function]]) -> Iterator[tuple[Function, str]]:
    """Where a value goes from a function that knows it as `name`: (function, the name there)."""
    for node in ast.walk(function.node):
        if isinstance(node, ast.For | ast.comprehension) and _holds(node.iter, name):
            yield from ((function, other) for other in _names(node.target))
        made = node.value.args[:2] if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) else []
        if isinstance(node, ast.Assign) and any(_holds(argument, name) for argument in made):
            yield from ((function, other) for target in node.targets for other in _names(target))
        if isinstance(node, ast.Call) and (callee := _called(node, function, by_name)) is not None:
            given = [*zip(callee.parameters, node.args, strict=False), *((k.arg, k.value) for k in node.keywords)]
            yield from ((callee, parameter) for parameter, value in given if parameter and _holds(value, name))


def followed(package: Path, start: str, parameter: str) -> list[tuple[str, str]]:
    """(function, name) of every place that a value reaches, from the analyzer's method `start`, nearest first."""
    functions = functions_of(package)
    by_name: dict[str, list[Function]] = {}
    for function in functions:
        *_, owner, name = ("", *function.place.split(":")[1].split("."))
        by_name.setdefault(owner if name == "__init__" else name, []).append(function)
    classes = {f"{module}:" for module in ("analyzer", *(f"models.{own}" for own in OWN))}
    first = next(f for f in functions if f.place.endswith(f".{start}") and f.module + ":" in classes)
    places: dict[tuple[str, str], None] = {}
    waiting = deque([(first, parameter, 0)])
    while waiting:
        function, name, depth = waiting.popleft()
        if name in LATER or (function.place, name) in places or depth > DEEP:
            continue
        places[function.place, name] = None
        waiting += [(other, other_name, depth + 1) for other, other_name in goes_on(function, name, by_name)]
    return list(places)


def facts(package: Path) -> dict[str, str]:
    """What is compared, row by row."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules_of(package).items()}
    functions = functions_of(package)
    lengths = {f.place: f.lines for f in functions}
    largest_file, largest_function = max(lines, key=lines.__getitem__), max(lengths, key=lengths.__getitem__)
    rings = sorted((len(ring) for ring in circles(package)), reverse=True)
    top = [path for path in package.glob("*.py") if not path.name.startswith("__")]
    folders = [path for path in package.iterdir() if (path / "__init__.py").is_file()]
    return {
        "lines": f"{sum(lines.values()):,}",
        "files": str(len(lines)),
        "modules at the top": str(len(top)),
        "folders": str(len(folders)),
        "circles (files in each)": str(rings or "none"),
        "largest file": f"{largest_file}, {lines[largest_file]}",
        "files over 400 lines": str(sum(count > 400 for count in lines.values())),
        "largest function, without docstring": f"{largest_function}, {lengths[largest_function]}",
        "functions over 50 lines": str(sum(length > 50 for length in lengths.values())),
        "function, median lines": f"{statistics.median(lengths.values()):.0f}",
    }


def main(*revisions: str) -> None:
    """Print the table, then the places."""
    columns: dict[str, dict[str, str]] = {}
    paths: dict[str, list[str]] = {}
    for revision in revisions:
        with tempfile.TemporaryDirectory() as folder:
            package = checkout(revision, Path(folder))
            columns[revision] = facts(package)
            for title, start, parameter in FOLLOWED:
                places = followed(package, start, parameter)
                names = list(dict.fromkeys(name for _, name in places))
                row = f"{title} from {start}: places, names"
                columns[revision][row] = f"{len(places)}, {len(names)}"
                lines = [f"    {place}  {name}" for place, name in places]
                paths.setdefault(row, []).extend([f"  {revision}: {', '.join(names)}", *lines])
    print(f"| | {' | '.join(revisions)} |\n|---|{'---|' * len(revisions)}")
    for row in columns[revisions[0]]:
        print(f"| {row} | {' | '.join(columns[revision][row] for revision in revisions)} |")
    for row, lines in paths.items():
        print(f"\n{row}", *lines, sep="\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["250ad38", "HEAD"]))
