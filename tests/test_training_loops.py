"""Training loops of one's own around Accelerate, and probes that are streamed.

Oracle of every loop: the same loop without a look at the components, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from hf_npeff import NPEFF, FisherConfig, NPEFFAnalyzer, NPEFFCallback
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

TEXTS = [
    " ".join(WORDS[j] for j in row)
    for row in torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
]
PROBE = TEXTS[:6]


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """Accelerate keeps one precision for a whole process: none is left over, before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def looped(*, follow: bool, precision: str, given: bool) -> tuple[list[float], list[torch.Tensor], torch.Tensor, Any]:
    """Four batches, a step for every two of them; losses, weights, random state, and the decompositions."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, tokenizer = tiny_model("llama", dtype=torch.float32, attention_dropout=0.1), tiny_tokenizer()
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(TEXTS, batch_size=2, shuffle=True)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    losses, points = [], []
    for texts in loader:
        with accelerator.accumulate(model):
            batch = tokenizer(texts, return_tensors="pt")
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
        if follow and accelerator.sync_gradients:
            settings = {"accelerator": accelerator} if given else {}
            fisher = FisherConfig(rank=2, sketch="kronecker", sketch_dim=8)
            analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher, **settings)
            pefs = analyzer.compute_pefs(PROBE, like=points[0] if points else None)
            if points:
                estimator = NPEFF.from_config(points[-1].config)
                estimator.decomposition_ = points[-1]
                points.append(estimator.refit(pefs))
            else:
                points.append(NPEFF(2, n_restarts=1).fit(pefs))
    return losses, [p.detach().clone() for p in model.parameters()], torch.get_rng_state(), points


@pytest.mark.parametrize("given", [False, True], ids=["no accelerator", "the loop's accelerator"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_of_accelerates_stays_what_it_is(precision: str, given: bool) -> None:
    """Dropout, shuffling, mixed precision and accumulated gradients: all would show a disturbance."""
    plain, weights, random, _ = looped(follow=False, precision=precision, given=given)
    losses, weights_too, random_too, points = looped(follow=True, precision=precision, given=given)
    assert losses == plain and len(points) == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_too, strict=True))
    assert torch.equal(random, random_too)
    assert points[1].explained > 0 and not torch.equal(points[0].pseudo_fishers, points[1].pseudo_fishers)


def test_a_streamed_probe_is_followed(tmp_path: Path) -> None:
    """Oracle: the same points from the probe as a list; the stream is mapped, and longer than what is taken of it."""
    histories = []
    for number in range(2):
        torch.manual_seed(0)
        model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
        stream = datasets.Dataset.from_dict({"words": TEXTS}).to_iterable_dataset(num_shards=2)
        stream = stream.map(lambda row: {"text": row["words"]}, remove_columns=["words"])
        probe: Any = stream if number else [{"text": text} for text in PROBE]
        arguments = TrainingArguments(
            str(tmp_path / str(number)), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        encoded = [{"input_ids": ids, "labels": ids} for ids in tokenizer(TEXTS)["input_ids"]]
        trainer = Trainer(model, arguments, train_dataset=encoded, processing_class=tokenizer)
        fisher = FisherConfig(rank=2)
        callback = NPEFFCallback(probe, every=1, n_components=2, n_restarts=1, fisher=fisher, max_examples=6)
        callback.attach(trainer)
        trainer.train()
        histories.append(callback.history)
    assert histories[0] == histories[1] and len(histories[0]) == 2


def test_components_of_a_stream_are_lifted(tmp_path: Path) -> None:
    """Oracle: the direction that a list gives; a stream is read again from its beginning."""
    model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=2))
    stream = datasets.Dataset.from_dict({"text": PROBE}).to_iterable_dataset()
    pefs = analyzer.compute_pefs(stream, tmp_path / "pefs", max_examples=6)
    decomposition = analyzer.decompose(pefs, n_components=2)
    listed = analyzer.lift(decomposition, 0, pefs, PROBE, selective=False)
    with pytest.raises(ValueError, match=r"list\(dataset.take\(n\)\)"):
        analyzer.lift(decomposition, 0, pefs, stream)
    streamed = analyzer.lift(decomposition, 0, pefs, list(stream.take(6)), selective=False)
    assert all(torch.equal(streamed[name], value) for name, value in listed.items())
