"""Compiled models, torch.inference_mode and several threads: right rows, or an error that names it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from hf_npeff import NPEFFAnalyzer, UnsupportedModelError
from tests.analyses import analyzer_of
from tests.tiny import tiny_batch, tiny_model


def layers(model: Any) -> Any:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def forward_alone(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("compiled", [whole, in_place, forward_alone, layers])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_compiled_model_has_the_rows_of_the_model(compiled: Any, used_before: bool) -> None:
    """Oracle: the same model without torch.compile, bit for bit; afterwards it is compiled as it was."""
    plain = tiny_model("llama")
    model = compiled(copy.deepcopy(plain))
    data = tiny_batch(plain, 4, seed=1)
    expected = analyzer_of(plain).compute_pefs(data)
    ids = torch.tensor([data[0]["input_ids"]])
    if used_before:  # code that was compiled before hooks were there does not call them
        model(ids)
    analyzer = analyzer_of(model)
    ours = analyzer.compute_pefs(data)
    assert ours.fingerprint == expected.fingerprint and torch.equal(ours.factors, expected.factors)
    assert ours.info["weights"] == expected.info["weights"]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_inference_mode_is_lifted_or_named() -> None:
    """Oracle: the rows outside of it; weights that were made in it have no gradients to give."""
    model = tiny_model("bert")
    data = tiny_batch(model, 4, seed=1)
    expected = analyzer_of(model).compute_pefs(data)
    with torch.inference_mode():
        ours = analyzer_of(model).compute_pefs(data)
        made = tiny_model("bert")
    assert torch.equal(ours.factors, expected.factors)
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        analyzer_of(made).compute_pefs(data)


def test_two_threads_on_one_model_wait_for_one_another_and_predictions_go_on() -> None:
    """Oracle: one thread alone, bit for bit; what a third thread predicts meanwhile; the model is as it came."""
    model = tiny_model("llama").train()
    batches = [tiny_batch(model, 6, seed=seed) for seed in (1, 2)]
    expected = [analyzer_of(model).compute_pefs(data).factors for data in batches]
    ids = torch.tensor([batches[0][0]["input_ids"]])
    with torch.no_grad():
        alone = model(ids).logits
    found: dict[int, Any] = {}
    wrong: list[BaseException] = []
    stop = threading.Event()

    def analyse(number: int) -> None:
        try:
            found[number] = analyzer_of(model).compute_pefs(batches[number]).factors
        except BaseException as error:
            wrong.append(error)

    def predict() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.allclose(model(ids).logits, alone):
                    wrong.append(AssertionError("another thread's prediction changed"))

    threads = [threading.Thread(target=analyse, args=(number,)) for number in range(2)]
    watcher = threading.Thread(target=predict)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert not wrong
    for number in range(2):
        assert torch.equal(found[number], expected[number])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert isinstance(NPEFFAnalyzer(model).model, type(model))
