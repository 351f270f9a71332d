"""Optional libraries: imported by the functions that need them, with an error that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_EXTRAS = {
    "gguf": ("gguf", "gguf"),
    "krippendorff": ("krippendorff", "eval"),
    "matplotlib": ("matplotlib", "eval"),
    "plotly": ("plotly", "viz"),
    "scipy": ("scipy", "eval"),
    "sklearn": ("scikit-learn", "eval"),
}
"""{library: (its name on PyPI, the extra that installs it)}."""


def load(module: str, needed_by: str, *, extra: str | None = None, instead: str = "") -> Any:
    """Import a library of an extra, or one of its modules.

    Args:
        module: the module to import, such as "sklearn.cluster".
        needed_by: what needs it; the subject of the error's sentence, in the singular.
        extra: another extra that installs the library too.
        instead: an alternative, added at the end of the error's sentence.

    Raises:
        ModuleNotFoundError: if it is not installed; the message says what to install.
    """
    require(needed_by, module.partition(".")[0], extra=extra, instead=instead)
    return import_module(module)


def require(needed_by: str, *libraries: str, extra: str | None = None, instead: str = "") -> None:
    """Check that libraries of an extra are installed, without importing them; see `load`.

    Raises:
        ModuleNotFoundError: if one is not.
    """
    for library in libraries:
        name, usual = _EXTRAS[library]
        if not _is_installed(library):
            raise ModuleNotFoundError(
                f"{needed_by} needs {name}, which is not installed: pip install 'hf-npeff[{extra or usual}]'{instead}",
                name=library,
            )


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ValueError:  # already imported, and taken out again
        return False
