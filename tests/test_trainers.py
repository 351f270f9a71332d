"""NPEFFCallback under other people's trainers: TRL's.

Oracle of every test: the same training without the callback, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_npeff import NPEFFCallback
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

pytest.importorskip("trl", reason="TRL's trainers need the package trl")

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

TEXTS = [
    " ".join(WORDS[j] for j in row)
    for row in torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
]
PROBE = [{"text": text} for text in TEXTS[:5]]
KINDS = ("SFT", "SFT packed", "SFT of a LoRA", "DPO", "GRPO")


def words_used(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def trainer_of(kind: str, folder: Path, **settings: Any) -> Any:
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder / "model")  # DPO loads its reference from there
    model = type(tiny_model("llama")).from_pretrained(folder / "model", dtype=torch.float32)
    given = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "seed": 1}
    given |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    given |= {"output_dir": str(folder / "out"), **settings}
    rest: dict[str, Any] = {"processing_class": tiny_tokenizer()}
    if kind == "DPO":
        pairs = {"prompt": TEXTS, "chosen": [f" {text}" for text in TEXTS[::-1]], "rejected": TEXTS[3:] + TEXTS[:3]}
        return DPOTrainer(model, args=DPOConfig(**given), train_dataset=Dataset.from_dict(pairs), **rest)
    if kind == "GRPO":
        config = GRPOConfig(**given, num_generations=2, max_completion_length=4)
        prompts = Dataset.from_dict({"prompt": TEXTS})
        return GRPOTrainer(model, reward_funcs=words_used, args=config, train_dataset=prompts, **rest)
    if kind == "SFT of a LoRA":
        rest["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    config = SFTConfig(**given, max_length=12, packing=kind == "SFT packed")
    return SFTTrainer(model, args=config, train_dataset=Dataset.from_dict({"text": TEXTS}), **rest)


class RandomState(TrainerCallback):  # type: ignore[misc]
    """The random state at the end of training."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.state = torch.get_rng_state()


def trained(kind: str, folder: Path, callback: NPEFFCallback | None) -> tuple[Any, torch.Tensor, list[dict[str, Any]]]:
    """The model, the random state, and what was logged but for our points and times."""
    trainer, random = trainer_of(kind, folder), RandomState()
    trainer.add_callback(random)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "npeff/explained" not in entry]
    timed = ("runtime", "per_second", "time")
    kept = [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in logged]
    return trainer, random.state, kept


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_its_metrics_stay_what_they_are(kind: str, tmp_path: Path) -> None:
    plain, random, logged = trained(kind, tmp_path / "plain", None)
    callback = NPEFFCallback(PROBE, every=1, n_components=2, n_restarts=1)
    followed, random_too, logged_too = trained(kind, tmp_path / "followed", callback)
    assert [point["step"] for point in callback.history] == [1, 2, 3]
    assert callback.decomposition_ is not None and callback.decomposition_.explained > 0
    assert logged_too == logged and sum("loss" in entry for entry in logged) == 3
    parameters = dict(plain.model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in followed.model.named_parameters())
    assert torch.equal(random, random_too)
    ours = [entry for entry in followed.state.log_history if "npeff/explained" in entry]
    assert len(ours) == 3
    assert all(name.startswith("npeff/") or name in ("epoch", "step") for entry in ours for name in entry)


def test_a_checkpoint_holds_the_points_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """Oracle: steps in the history."""
    first = trainer_of("SFT", tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    callback = NPEFFCallback(PROBE, every=1, n_components=2, n_restarts=1).attach(first)
    first.train()
    assert (tmp_path / "out" / "checkpoint-2" / "npeff" / "history.jsonl").is_file()
    again = trainer_of("SFT", tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    resumed = NPEFFCallback(PROBE, every=1, n_components=2, n_restarts=1).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [point["step"] for point in resumed.history] == [1, 2, 3, 4]
    assert resumed.history[:2] == callback.history
