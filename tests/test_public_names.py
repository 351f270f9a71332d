"""Every public name has an example in its docstring, the examples run, and a test mentions the name.

An example is doctest's: lines after `>>>`, with what they print. All run on one tiny world, made by `world`: a `model`
with its `tokenizer`, a `dataset` of texts, an `analyzer`, its `pefs`, their `decomposition`, a `direction` of it, and a
rating `study`. The model is also a folder of the name org/any-model, as the Hub's repositories are after a download.
"""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import inspect
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer, NPEFFCallback
from hf_npeff.baselines import MethodResult
from hf_npeff.sharing.pretrained import Publishable, Readable
from hf_npeff.studies import RatingStudy
from hf_npeff.studies.settings import RatingsConfig
from hf_npeff.weights.adapters import Adapter
from tests.tiny import tiny_model, tiny_tokenizer

PACKAGES = ("hf_npeff", "hf_npeff.baselines", "hf_npeff.studies")
FACADE = ("NPEFFAnalyzer", "PEFs", "NPEFF", "Decomposition", "Component", "ParameterDirection", "NPEFFCallback")
"""Classes whose public methods need an example too: one of their own, or a call in an example of the class."""
SKIPPED = {"Publishable.push_to_hub", "list_decompositions", "load_published", "InferenceChat", "run_minimal_pairs"}
"""Names with an example that cannot run here, since it needs a network, a large model or minutes: marked +SKIP."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public_names() -> dict[str, Any]:
    """{name: class or function} of what a user imports."""
    modules = [importlib.import_module(package) for package in PACKAGES]
    return {name: getattr(module, name) for module in modules for name in module.__all__}


PUBLIC = {**public_names(), "Adapter": Adapter}
ALSO = {"Publishable.push_to_hub": Publishable.push_to_hub, "Readable.from_pretrained": Readable.from_pretrained}
"""Methods that several of the classes inherit: their example stands in the base class."""


def methods_of(cls: type) -> dict[str, Any]:
    """{name: method} that a user calls; neither properties, nor what transformers calls, nor the analyzer's insides."""
    found: dict[str, Any] = {}
    for base in (Publishable, Readable, cls):
        if issubclass(cls, base):
            found |= {n: getattr(cls, n) for n, v in vars(base).items() if not n.startswith("_") and is_method(v)}
    if cls is NPEFFAnalyzer:
        found["from_pretrained"] = cls.from_pretrained
    return {name: method for name, method in found.items() if not hasattr(TrainerCallback, name)}


def is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))


FACADE_METHODS = [f"{name}.{method}" for name in (*FACADE, "Adapter") for method in methods_of(PUBLIC[name])]


def examples_of(value: Any) -> str:
    """The code of a docstring's examples."""
    return "".join(each.source for each in doctest.DocTestParser().get_examples(own_docstring(value)))


def own_docstring(value: Any) -> str:
    """The docstring as it is written; `inspect.getdoc` would take a base's where there is none."""
    return inspect.cleandoc(value.__doc__ or "")


def calls(code: str) -> set[str]:
    """Names that are called in some code, of functions and of methods."""
    found = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {name for f in found if (name := getattr(f, "attr", getattr(f, "id", None)))}


def documented() -> Iterator[tuple[str, Any]]:
    """Everything that has an example, with its full name."""
    for name, value in PUBLIC.items():
        if examples_of(value):
            yield name, value
        for method, function in methods_of(value).items() if inspect.isclass(value) else ():
            if examples_of(function) and f"{name}.{method}" not in ALSO and not shared(method):
                yield f"{name}.{method}", function
    yield from ALSO.items()


def shared(method: str) -> bool:
    return method in {name.split(".")[1] for name in ALSO}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    """Oracle: the docstring, in a section of Google's style."""
    assert "Example:\n    >>> " in own_docstring(PUBLIC[name])


@pytest.mark.parametrize("name", FACADE_METHODS)
def test_every_method_of_the_facade_is_called_in_an_example(name: str) -> None:
    """Oracle: the syntax tree of the examples of the method, the class, and the base that brings the method."""
    cls, method = name.split(".")
    function = methods_of(PUBLIC[cls])[method]
    assert method in calls(examples_of(PUBLIC[cls])) | calls(examples_of(function))


def test_every_public_name_is_mentioned_by_a_test() -> None:
    """Oracle: the text of the other test modules."""
    here = Path(__file__)
    text = "\n".join(path.read_text(encoding="utf-8") for path in here.parent.glob("test_*.py") if path != here)
    words = set(re.findall(r"\w+", text))
    called = set(re.findall(r"\.(\w+)\(", text))
    missing = set(public_names()) - words
    missing |= {name for name in FACADE_METHODS if name.split(".")[1] not in called}
    assert not missing


def test_few_examples_are_skipped_and_all_of_them_are_known() -> None:
    """Oracle: the list in this file."""
    parser = doctest.DocTestParser()
    skipped = {
        name
        for name, value in documented()
        if any(each.options.get(doctest.SKIP) for each in parser.get_examples(own_docstring(value)))
    }
    assert skipped == SKIPPED and len(skipped) <= 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that examples may use without making them."""
    model, tokenizer = tiny_model("gpt2", dtype=torch.float32, n_positions=512), tiny_tokenizer()
    home = tmp_path_factory.mktemp("home")
    model.save_pretrained(home / "org" / "any-model")
    tokenizer.save_pretrained(home / "org" / "any-model")
    subjects = ("cat", "dog", "bird", "king", "queen", "france")
    dataset = [
        {"text": f"the {subject} {verb} the {thing}", "animal": subject in subjects[:3]}
        for subject, verb, thing in itertools.product(subjects, ("sees", "ate"), ("fish", "big"))
    ]
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=2))
    pefs = analyzer.compute_pefs(dataset)
    decomposition = analyzer.decompose(pefs, n_components=3, n_restarts=2)
    texts = [row["text"] for row in dataset]
    config = RatingsConfig(features=2, shown=3, members=2, distractors=2)
    study = RatingStudy.make([MethodResult.of_decomposition(decomposition)], texts, config)
    objects = {
        "model": model,
        "tokenizer": tokenizer,
        "dataset": dataset,
        "analyzer": analyzer,
        "pefs": pefs,
        "decomposition": decomposition,
        "direction": analyzer.lift(decomposition, 0, pefs, dataset),
        "study": study,
        "home": home,
    }
    return objects


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=n) for n, v in documented()])
def test_the_example_runs(
    name: str, value: Any, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: what the example says it prints. Each starts from a copy of the same world."""
    caplog.set_level(logging.ERROR)
    objects = copy.deepcopy({key: world[key] for key in world if key != "home"})
    monkeypatch.chdir(world["home"])
    torch.manual_seed(0)
    space = {**PUBLIC, "Path": Path, "torch": torch, **objects}
    test = doctest.DocTestParser().get_doctest(own_docstring(value), space, name, None, None)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


def test_everything_public_is_a_short_line_in_a_terminal(world: dict[str, Any]) -> None:
    """Oracle: the length and the lines of each repr, of every kind of object that a user is handed."""
    objects = copy.deepcopy({key: world[key] for key in world if key != "home"})
    analyzer, data, pefs = objects["analyzer"], objects["dataset"], objects["pefs"]
    found, direction = objects["decomposition"], objects["direction"]
    found.info["model"] = f"/{'long/' * 60}model"  # as temporary folders are
    report = analyzer.evaluate_direction(direction, found, 0, data, n_top=3, n_others=4, search_rounds=1)
    measured = analyzer.measure(direction, data, by="animal", scales=(0.1, 0.2))
    change = analyzer.explain_change(found, pefs, data, 0.3 * direction, growth=False)
    associations, top = found.associations(shuffles=19), found[0].top_examples(20)
    with analyzer.forward_pass() as forward:
        outputs = forward.outputs([analyzer.read(data)[0]])
    shown = {
        "Associations": associations,
        "ComponentAssociations": associations[0],
        "FisherConfig": FisherConfig(rank=2, target_modules=("a", "b"), sketch="two-stage", sketch_dim=256, seed=3),
        "DecompositionConfig": found.config,
        "NPEFFAnalyzer": analyzer,
        "Outputs": outputs,
        "PEFs": pefs,
        "NPEFF": NPEFF(3, n_restarts=2),
        "Decomposition": found,
        "Component": found[0],
        "TopExamples": top,
        "ParameterDirection": direction,
        "Adapter": direction.to_adapter(rank=2),
        "PerturbationReport": report,
        "Effect": report.best,
        "Measurement": measured,
        "Step": measured.steps[0],
        "GroupEffect": measured.at(0.1)["all"],
        "OffTarget": report.off_target,
        "ChangeReport": change,
        "ComponentChange": change.components[0],
        "ChangeStep": change.curve[0],
        "NPEFFCallback": NPEFFCallback(data, every="epoch", n_components=3),
        "Estimate": analyzer.estimate(data),
        "TokenAlignment": analyzer.token_alignments(found, pefs, data, [0], n_top=1)[0],
    }
    assert {name: type(value).__name__ for name, value in shown.items()} == {name: name for name in shown}
    for name, value in shown.items():
        assert repr(value).startswith(name) and len(repr(value)) < 200 and "\n" not in repr(value), repr(value)
    classes = {name for name, value in PUBLIC.items() if inspect.isclass(value) and not issubclass(value, Exception)}
    kept = {name for name in classes if PUBLIC[name].__module__.split(".")[1] not in ("baselines", "studies")}
    assert kept - {"OutputHead"} <= set(shown)
    tables = ("Associations", "Decomposition", "Component", "TopExamples", "PerturbationReport", "Measurement",
              "OffTarget", "ChangeReport", "Estimate")  # fmt: skip
    assert all("<table>" in shown[name]._repr_html_() for name in tables)
