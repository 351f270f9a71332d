"""Models with a batch and cotangents that stay the same, for every script that times rows.

BERT-like (3 classes) and GPT-2-like (vocabulary 8,192) have 4 layers and hidden size 256, and see 8 sequences of 64
tokens, c = 8; SmolLM2 sees 4 word-relation prompts, c = 4. All linear maps but the output embedding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.frozen import frozen
from hf_npeff.fisher.gradients import backward_passes
from hf_npeff.fisher.linear_maps import LinearMap
from hf_npeff.fisher.preparation import prepare
from hf_npeff.fisher.rows import RowMaker
from hf_npeff.fisher.selftest import Captured, KnownCotangents, off_diagonal_error, pef_inner_products
from hf_npeff.fisher.sketch_choice import known_cotangents
from hf_npeff.pefs.sketches import Sketch

LENGTH, BATCH, ROWS, VOCABULARY, DIM = 64, 8, 8, 8192, 4096
MODELS = ("BERT-like", "GPT-2-like", "SmolLM2")
SKETCHES: dict[str, tuple[Any, int | None]] = {
    "kronecker 16": ("kronecker", 16), "auto": ("auto", None), f"countsketch {DIM}": ("countsketch", DIM),
}  # fmt: skip


@dataclass
class Case:
    """A frozen model on one batch, with cotangents that stay the same.

    Attributes:
        name: of the model.
        model: frozen.
        examples: of the batch.
        makers: what makes rows with each sketch, by its label.
        known: the cotangents (B, c, t, s).
    """

    name: str
    model: Any
    examples: Any
    makers: dict[str, RowMaker]
    known: KnownCotangents

    @property
    def chosen(self) -> str:
        """What `auto` took."""
        taken = self.makers["auto"].sketch
        return f"{taken.kind} {taken.setting}"

    @property
    def maps(self) -> Sequence[LinearMap]:
        """The linear maps under analysis."""
        return next(iter(self.makers.values())).forward.maps

    def run(self) -> tuple[Tensor, Tensor]:
        """A forward pass: the source (B, t, s), and the cotangents."""
        forward = next(iter(self.makers.values())).forward
        return forward.outputs(self.examples).source, self.known.values

    @functools.cached_property
    def grams(self) -> dict[tuple[str, bool], Tensor]:
        """{(parameter, whether its bias is counted): inner products (B·c, B·c) of unsketched rows}."""
        captured = Captured()
        values = list(self.known.values.unbind(1))
        backward_passes(
            self.model, self.maps, captured, len(self.examples), lambda: self.run()[0], lambda source: values
        )
        found = {}
        modules = dict(self.model.named_modules())
        for m in self.maps:
            pair = captured.tensors(m.parameter)
            assert pair is not None
            found[m.parameter, False] = found[m.parameter, True] = pair.gram()
            if getattr(modules[m.modules[0]], "bias", None) is not None:
                total = pair.delta.sum(2).flatten(0, 1).double()
                found[m.parameter, True] = found[m.parameter, False] + total @ total.T
        return found

    def error(self, rows: Tensor, parameters: Sequence[str] | None = None, bias: bool = False) -> float:
        """Of the inner products of PEFs with these rows (B, c, d), over all parameters, or over those given."""
        parameters = [m.parameter for m in self.maps] if parameters is None else parameters
        exact = torch.stack([self.grams[name, bias] for name in parameters]).sum(0)
        flat = rows.flatten(0, 1).double()
        return off_diagonal_error(pef_inner_products(flat @ flat.T, len(rows)), pef_inner_products(exact, len(rows)))


def small_models() -> dict[str, tuple[Any, str]]:
    """{name: (model, output factor)}."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        num_labels=3,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return {
        "BERT-like": (transformers.BertForSequenceClassification(bert), "projection"),
        "GPT-2-like": (transformers.GPT2LMHeadModel(gpt2), "spectral"),
    }


@functools.cache
def smollm2() -> tuple[Any, Any]:
    """The model and its tokenizer, loaded once a process."""
    from hf_npeff.demo import load_model

    return load_model()


@contextlib.contextmanager
def case(name: str, labels: Sequence[str] = tuple(SKETCHES)) -> Iterator[Case]:
    """The model, its batch and its cotangents, with these sketches."""
    tokenizer = None
    if name == "SmolLM2":
        from hf_npeff.studies.word_relations import word_relation_prompts

        (model, tokenizer), factor, c = smollm2(), "spectral", 4
        examples = Examples(word_relation_prompts(1), tokenizer)[:4]
    else:
        (model, factor), c = small_models()[name], ROWS
        ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        examples = Examples({"input_ids": ids})[:]
    with frozen(model.eval()), contextlib.ExitStack() as stack:
        makers = {}
        for label in labels:
            kind, dim = SKETCHES[label]
            fisher = FisherConfig(rank=c, output_factor=factor, sketch=kind, sketch_dim=dim, sketch_tolerance=0.1)  # type: ignore[arg-type]
            forward = stack.enter_context(NPEFFAnalyzer(model, tokenizer, fisher=fisher).forward_pass())
            if label == "auto":
                makers[label] = prepare(forward, fisher, examples)
            else:
                makers[label] = RowMaker(forward, fisher, Sketch(forward.shapes, kind, dim, 0))
        first = next(iter(makers.values()))
        yield Case(name, model, examples, makers, known_cotangents(first.forward, first.config, first.metric, examples))
