"""Model cards of directions in the weights, and of adapters that are made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_npeff.sharing.cards import CITATION, HERE, fact_rows, fill, metadata, model_link
from hf_npeff.sharing.hub import LIBRARY
from hf_npeff.sharing.markdown import TITLE, escaped, literal, number, percent, plain


@dataclass(frozen=True)
class DirectionFacts:
    """The facts on a direction in the weights, or an adapter made from it, for its card.

    Attributes:
        base_model: the model's id or folder.
        component: the component's number in the decomposition, or None for another direction.
        revision: the model's commit.
        name: the name that a person gave the component.
        top_examples: a line for each example; texts only if they may be published.
        lift: how it was lifted to the weights, in words.
        scale: the step along the unit direction.
        measured_scale: the step at which the effects were measured.
        target_missed: the KL that the measured step should have reached on the top examples, if it did not.
        kl_top: mean KL(original ‖ perturbed) on its top examples, in nats.
        kl_others: the same for other examples.
        kl_worst: the largest KL on one of the other examples.
        kl_searched: the largest KL on an input, found by a search, that is not the component's.
        kl_random: mean KL on its top examples for a random direction of the same size.
        ratio: kl_top / kl_others.
        weights: hash of the base model's weights, and of the active adapters.
        top_flips: share of its top examples whose answer changes; None for regression.
        other_flips: the same for other examples.
        worst: the other example with the largest KL, in a line.
        measured: what was measured: the whole direction, or the adapter.
        stability: mean of the component's best |cosine| in other starts.
        coverage: share of the parameters that were analysed.
        sketch_error: relative error of inner products of PEFs in the sketch.
    """

    base_model: str
    component: int | None = None
    revision: str | None = None
    name: str | None = None
    top_examples: Sequence[str] = ()
    lift: str | None = None
    scale: float | None = None
    measured_scale: float | None = None
    target_missed: float | None = None
    kl_top: float | None = None
    kl_others: float | None = None
    kl_worst: float | None = None
    kl_searched: float | None = None
    kl_random: float | None = None
    ratio: float | None = None
    weights: str | None = None
    top_flips: float | None = None
    other_flips: float | None = None
    worst: str | None = None
    measured: str | None = None
    stability: float | None = None
    coverage: float | None = None
    sketch_error: float | None = None

    @property
    def effects(self) -> list[tuple[str, object]]:
        """The measured effects, for a table."""
        worst = None if self.kl_worst is None else number(self.kl_worst) + (f": {self.worst}" if self.worst else "")
        measured, step = self.measured_scale, self.scale
        same = measured is None or step is None or abs(measured - step) <= _SAME_STEP * abs(step)
        other = None if same else f"{_digits(measured)}, which is not the step of these weights"
        return [
            ("What was measured", self.measured),
            ("Step", _digits(self.scale)),
            ("Step of this measurement", other),
            ("KL that this step should have reached on its top examples", _digits(self.target_missed)),
            ("Effect: KL on its top examples", _with_flips(self.kl_top, self.top_flips)),
            ("Off target: KL on other examples", _with_flips(self.kl_others, self.other_flips)),
            ("Off target: KL on the worst of the other examples", worst),
            ("Off target: KL on the worst input found by a search that replaces tokens", _digits(self.kl_searched)),
            ("Control: KL of a random direction of the same size on its top examples", _digits(self.kl_random)),
            ("Ratio of effect to off target", _digits(self.ratio)),
        ]

    @property
    def origin(self) -> list[tuple[str, object]]:
        """The origin, for a table."""
        return [
            ("Commit of the base model", self.revision),
            ("Hash of the weights it was made and tested with", self.weights),
            ("Lifted by", self.lift),
            ("Stability of the component", _digits(self.stability)),
            ("Share of the parameters analysed", None if self.coverage is None else percent(self.coverage)),
            ("Error of the sketch", _digits(self.sketch_error)),
        ]

    def label(self, what: str) -> str:
        """The kind of object, with the component's name."""
        return what if self.name is None else f"{what} ({plain(self.name, TITLE)})"


def _digits(value: float | None) -> str | None:
    return None if value is None or number(value) == "–" else number(value)


def _with_flips(kl: float | None, flips: float | None) -> str | None:
    return None if kl is None else number(kl) + ("" if flips is None else f"; {flips:.0%} of the answers change")


def _effect_table(about: DirectionFacts) -> str:
    """The measured effects as a table, or a sentence that there are none."""
    rows = fact_rows(about.effects)
    head = "| | |\n|---|---|"
    return f"{head}\n{rows}\n\n{_EFFECT_NOTE}" if rows else "Nothing was measured."


_SAME_STEP = 1e-6
"""The relative difference up to which two steps are the same: what rounding leaves of a product."""
_EFFECT_NOTE = """\
KL is how far the predictions move from the original ones, in nats, on average over the examples; for numbers and
embeddings it is half their squared distance. A ratio far above 1 means that the change is confined to the component's
own examples."""


def adapter_card(
    about: DirectionFacts,
    *,
    kind: str = "LoRA",
    rank: int | None = None,
    retained_energy: float | None = None,
    is_estimate: bool = False,
    loads_in: str | None = None,
    auto_class: str = "AutoModel",
    repo_id: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a direction saved as an adapter.

    Args:
        about: the direction.
        kind: "LoRA" or "SHiRA", which PEFT loads, or "dense", which `ParameterDirection.from_pretrained` does.
        rank: the rank of the adapter's matrices.
        retained_energy: share of the direction's squared norm that the adapter keeps.
        is_estimate: whether this share is an estimate.
        loads_in: the programs that load it; see `runtimes.where_it_loads`.
        auto_class: the class that loads the model: a class of transformers, or "SentenceTransformer".
        repo_id: the repository of the adapter; None for a folder, in which the card's code runs.
        datasets: ids of the data sets of the examples.
        license: an identifier of the Hub.

    Raises:
        ValueError: if the license, a data set's id or `auto_class` is malformed.
    """
    if not auto_class.isidentifier():
        raise ValueError(f"auto_class must be the name of a class of transformers, but it is {auto_class!r}")
    about_energy = f"{'about ' if is_estimate else ''}{percent(retained_energy)}"
    table_rows = [
        *about.origin,
        ("Kind", kind),
        ("Rank", rank),
        ("Energy of the direction that it keeps", None if retained_energy is None else about_energy),
        ("Loads in", loads_in),
    ]
    what = "direction" if about.component is None else f"component {about.component}"
    label = about.label(what)
    library = LIBRARY if kind == "dense" else "peft"
    return fill(
        "adapter",
        front_matter=metadata("npeff-adapter", about.base_model, datasets, license, library),
        title=escaped(f"NPEFF {label} as an adapter"),
        what=escaped(label[0].upper() + label[1:]),
        kind=f"a {escaped(kind)} adapter",
        model=model_link(about.base_model, about.revision),
        examples=_example_lines(about.top_examples),
        effects=_effect_table(about),
        facts=fact_rows(table_rows),
        load_code="\n".join(_adapter_code(about, kind, auto_class, HERE if repo_id is None else repo_id)),
        further="" if kind == "dense" else _FURTHER,
        citation=CITATION,
    )


_FURTHER = """These ways are exact, except for norms, of which PEFT stores the new values:

- the opposite change: `lora_alpha` in adapter_config.json with a minus sign, or `-Adapter.from_pretrained(...)` of
  hf_npeff;
- together with other components: `Adapter.sum([...])` of hf_npeff, whose rank is the sum of the ranks, or all active at
  once, `model.base_model.set_adapter(["a", "b"])`. PEFT's `add_weighted_adapter` truncates the sum to the largest rank
  unless you set `combination_type="cat"`;
- on a quantised base model: as an adapter beside it. Merging it into weights of 4 bits rounds a part of it away.

"""


EMBEDDING_CLASS = "SentenceTransformer"


def loading_into_embeddings(base_model: str, pinned: str, place: str) -> list[str]:
    """Lines that load an embedding model and the adapter at `place` into it.

    Args:
        base_model: its id or folder.
        pinned: further arguments for it.
        place: arguments for the adapter.
    """
    return [
        f"from sentence_transformers import {EMBEDDING_CLASS}",
        "",
        f"model = {EMBEDDING_CLASS}({literal(base_model)}{pinned})",
        f"model.load_adapter({place})",
    ]


def _adapter_code(about: DirectionFacts, kind: str, auto_class: str, where: str) -> list[str]:
    """Lines that load the base model with the adapter."""
    pinned = "" if about.revision is None else f", revision={literal(about.revision)}"
    model = f"model = {auto_class}.from_pretrained({literal(about.base_model)}{pinned})"
    if auto_class == EMBEDDING_CLASS and kind != "dense":
        return loading_into_embeddings(about.base_model, pinned, literal(where))
    if kind != "dense":
        return [
            "from peft import PeftModel",
            f"from transformers import {auto_class}",
            "",
            model,
            f"model = PeftModel.from_pretrained(model, {literal(where)})",
            "with model.disable_adapter():",
            "    ...  # the base model as it was",
        ]
    library = "transformers"
    if auto_class == EMBEDDING_CLASS:
        library, model = "sentence_transformers", f"model = {auto_class}({literal(about.base_model)}{pinned})"
    return [
        f"from {library} import {auto_class}",
        "",
        "from hf_npeff import ParameterDirection",
        "",
        model,
        f"direction = ParameterDirection.from_pretrained({literal(where)})",
        'with direction.applied_to(model, direction.info["scale"]):',
        "    ...  # the model as this adapter makes it",
    ]


def direction_card(
    about: DirectionFacts,
    *,
    repo_id: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """README.md of a direction in weight space.

    Args:
        about: the direction.
        repo_id: where it will be found; None for a folder, whose code runs in that folder.
        datasets: ids of the data sets that the examples are from.
        license: an identifier of the Hub.

    Raises:
        ValueError: if the license or a data set's id is malformed.
    """
    code = [
        "from hf_npeff import ParameterDirection",
        "",
        f"direction = ParameterDirection.from_pretrained({literal(HERE if repo_id is None else repo_id)})",
    ]
    label = about.label("direction" if about.component is None else f"component {about.component}")
    return fill(
        "direction",
        front_matter=metadata("npeff-direction", about.base_model, datasets, license),
        title=escaped(f"NPEFF {label} in the weights"),
        what=escaped(label[0].upper() + label[1:]),
        model=model_link(about.base_model, about.revision),
        examples=_example_lines(about.top_examples),
        effects=_effect_table(about),
        facts=fact_rows(about.origin),
        load_code="\n".join(code),
        citation=CITATION,
    )


def _example_lines(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(line) or '–'}" for line in lines[:20]) or "No examples are published with it."
