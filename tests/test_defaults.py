"""A setting and its default stand in one dataclass of `hf_npeff.config`; methods and commands follow it.

The oracle is the dataclass itself. Whoever adds a field learns here which signature or command has no way to it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hf_npeff import NPEFF, Decomposition, DecompositionConfig, FisherConfig, NPEFFAnalyzer
from hf_npeff.commands.acting import perturb
from hf_npeff.commands.editing import edit
from hf_npeff.commands.inputs import DataOptions
from hf_npeff.commands.making import compute, decompose, demo
from hf_npeff.commands.options import option_fields
from hf_npeff.config import (
    AssociationRequest,
    ComputeRequest,
    EditRequest,
    LiftRequest,
    MeasureRequest,
    OffTargetRequest,
    PerturbationRequest,
    SpareRequest,
)
from hf_npeff.encoding.record import Reading
from hf_npeff.studies.settings import DemoConfig

METHODS: list[tuple[type, Callable[..., Any], dict[str, str]]] = [
    (ComputeRequest, NPEFFAnalyzer.compute_pefs, {"progress": "None there asks the environment"}),
    (LiftRequest, NPEFFAnalyzer.lift, {}),
    (PerturbationRequest, NPEFFAnalyzer.evaluate_direction, {}),
    (EditRequest, NPEFFAnalyzer.edit, {}),
    (SpareRequest, NPEFFAnalyzer.spare, {}),
    (MeasureRequest, NPEFFAnalyzer.measure, {}),
    (OffTargetRequest, NPEFFAnalyzer.off_target, {}),
    (Reading, NPEFFAnalyzer.compute_pefs, {}),
    (AssociationRequest, Decomposition.associations, {}),
    (DecompositionConfig, NPEFF.__init__, {}),
]
"""(settings, the method that takes each as an argument, {argument with a default of its own: why})."""

COMMANDS: list[tuple[type, Callable[..., Any], dict[str, str]]] = [
    (FisherConfig, compute, {}),
    (
        ComputeRequest,
        compute,
        {"output_dir": "--output", "progress": "always shown, but for HF_HUB_DISABLE_PROGRESS_BARS"},
    ),
    (LiftRequest, perturb, {"keep": "--keep, a folder"}),
    (PerturbationRequest, perturb, {}),
    (DecompositionConfig, decompose, {}),
    (DemoConfig, demo, {}),
    (Reading, compute, {}),
    (DataOptions, compute, {}),
    (EditRequest, edit, {name: f"--{name}, an option of the command" for name in ("change", "outcome", "keep")}),
]
"""(settings, the command with an option for each, {setting without an option: the other way to it})."""

WIDER = ("output_dir", "scales", "ranks", "rank", "quantise")
"""Settings that a method takes as any kind of path or sequence, and keeps as one kind."""

VALUES = {
    "method": "adjoint",
    "form": "plain",
    "solver": "fista",
    "on_error": "skip",
    "output_dir": Path("nowhere"),
    "balance": "module",
    "precision": "bfloat16",
    "selective": True,
    "ridge": 0.5,
}
"""Values other than the defaults, where a number is none."""

COMPANIONS: dict[str, dict[str, Any]] = {"ridge": {"selective": True}}
"""{setting: others that it is allowed with only}."""


def names(rows: list[tuple[type, Callable[..., Any], dict[str, str]]]) -> list[str]:
    return [f"{settings.__name__}-{function.__name__}" for settings, function, _ in rows]


@pytest.mark.parametrize(("settings", "method", "own"), METHODS, ids=names(METHODS))
def test_a_method_takes_every_setting_with_its_default(settings: type, method: Any, own: dict[str, str]) -> None:
    """Oracle: the dataclass, field by field: names, types and defaults."""
    parameters, hints = inspect.signature(method).parameters, get_type_hints(method)
    declared = get_type_hints(settings)
    for field in fields(settings):
        assert field.name in parameters, f"{method.__qualname__} does not take {field.name}"
        assert f"{field.name}:" in (inspect.getdoc(method) or "") + (inspect.getdoc(NPEFF) or "")
        if field.name not in own:
            assert parameters[field.name].default == field.default, field.name
            assert field.name in WIDER or hints[field.name] == declared[field.name], field.name
    assert set(own) <= {field.name for field in fields(settings)}


class SeenError(Exception):
    """Carries what a request was made with."""


@pytest.mark.parametrize(("settings", "method", "own"), METHODS[:-1], ids=names(METHODS[:-1]))
def test_a_method_hands_every_setting_on(settings: type, method: Any, own: dict[str, str], monkeypatch: Any) -> None:
    """Oracle: identity with objects that nothing else makes."""
    given = {field.name: object() for field in fields(settings)} | {
        field.name: Path("nowhere") if field.name == "output_dir" else (object(),)
        for field in fields(settings)
        if field.name in WIDER
    }

    def seen(**values: Any) -> None:
        raise SeenError(values)

    monkeypatch.setattr(sys.modules[method.__module__], settings.__name__, seen)
    parameters = inspect.signature(method).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    with pytest.raises(SeenError) as caught:
        method(*(object() for _ in required), **given)
    assert caught.value.args[0] == given


def test_the_estimator_keeps_every_setting() -> None:
    """Oracle: identity with values other than the defaults."""
    values = {field.name: other_value(field) for field in fields(DecompositionConfig)} | {"solver": "block_power"}
    assert NPEFF(**values).config == DecompositionConfig(**values)


@pytest.mark.parametrize(("settings", "command", "elsewhere"), COMMANDS, ids=names(COMMANDS))
def test_a_command_has_an_option_for_every_setting_with_its_default(
    settings: type, command: Any, elsewhere: dict[str, str]
) -> None:
    """Oracle: the dataclass. What is no option on purpose is named with the other way to it."""
    options = inspect.signature(command).parameters
    assert set(elsewhere) == {field.name for field in fields(settings)} - {f.name for f in option_fields(settings)}
    for field in option_fields(settings):
        assert field.default is not MISSING
        default = options[field.name].default
        assert default == field.default or default == [field.default], field.name


@pytest.mark.parametrize(("settings", "command", "elsewhere"), COMMANDS[2:4], ids=names(COMMANDS[2:4]))
def test_perturb_hands_every_setting_on(
    settings: type, command: Any, elsewhere: dict[str, str], monkeypatch: Any
) -> None:
    """Oracle: identity of what the analyzer is called with and the options."""
    calls: dict[str, Any] = {}

    class Recorder:
        model = None

        def lift(self, *_: Any, **values: Any) -> Any:
            calls.update(values)
            return self

        def evaluate_direction(self, *_: Any, **values: Any) -> Any:
            calls.update(values)
            raise SeenError

    decomposition = type("Found", (), {"index_of": lambda self, j: j})()
    monkeypatch.setattr("hf_npeff.commands.acting.read_decomposition", lambda name: decomposition)
    monkeypatch.setattr("hf_npeff.commands.acting.analyzer_for", lambda *_: Recorder())
    monkeypatch.setattr("hf_npeff.commands.acting.read_data", lambda *_: [])
    monkeypatch.setattr("hf_npeff.pefs.store.PEFs.from_pretrained", lambda name: None)
    options = inspect.signature(command).parameters
    values = {name: None if p.default is inspect.Parameter.empty else p.default for name, p in options.items()}
    values |= {"component": 0, "output": Path("nowhere")}
    for field in option_fields(settings):
        given = {field.name: other_value(field)} | COMPANIONS.get(field.name, {})
        with pytest.raises(SeenError):
            command(**values | given)
        assert {name: calls[name] for name in given} == given


def other_value(field: Any) -> Any:
    """A value that is allowed, and not the default."""
    if field.name in VALUES:
        return VALUES[field.name]
    if isinstance(field.default, bool):
        return not field.default
    if field.name == "power":
        return 0.5
    return 3 if field.default is None else field.default * 2 + (not field.default)
