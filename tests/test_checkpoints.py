"""Which class loads a checkpoint, and what its head is: the models of transformers, and adapters of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.models.auto import modeling_auto

from hf_npeff import NPEFFAnalyzer
from hf_npeff.fisher.outputs import traits_of
from hf_npeff.fisher.tasks import loader_of, task_of_class
from hf_npeff.sharing import hub
from tests import reference
from tests.analyses import analyzer_of, in_parameters
from tests.logged import warned_by
from tests.tiny import tiny_batch, tiny_model

TEXT = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
          "patch_size": 4}  # fmt: skip
IMAGE = 19


def decoder_that_sees(family: str) -> Any:
    """A tiny random decoder that takes images."""
    text, vision = {**TEXT, "head_dim": 8}, dict(VISION)
    configs: dict[str, Any] = {
        "Gemma3": {"text_config": {**text, "query_pre_attn_scalar": 8}, "vision_config": vision,
                   "mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_index": 18, "eoi_token_index": 17},
        "Llava": {"text_config": {**text, "model_type": "llama"}, "image_token_id": IMAGE,
                  "vision_config": {**vision, "model_type": "clip_vision_model", "projection_dim": 16}},
        "Mistral3": {"text_config": {**text, "model_type": "mistral"}, "image_token_id": IMAGE,
                     "vision_config": {**vision, "model_type": "pixtral", "head_dim": 8}},
        "Qwen2VL": {
            "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                        "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
                              "patch_size": 4},
            "image_token_id": IMAGE, "video_token_id": 18, "vision_start_token_id": 17, "vision_end_token_id": 16},
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**configs[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("family", ["Gemma3", "Llava", "Mistral3", "Qwen2VL"])
def test_a_decoder_that_sees_is_a_language_model(family: str, tmp_path: Path) -> None:
    """Oracle: the model called directly, and JᵀSJ by autograd, an example at a time."""
    model = decoder_that_sees(family)
    data = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10, 11, 12, 13]}]
    analyzer = analyzer_of(model, rank=20, output_factor="exact")
    pefs = analyzer.compute_pefs(data)
    names = [m.parameter for m in analyzer.maps]
    inside = {n for n, _ in model.get_decoder().named_parameters()}
    assert names and all(any(name.endswith(f".{n}") for n in inside) for name in names)
    assert not any("vision" in name or "visual" in name or name == "lm_head.weight" for name in names)
    for example, rows, log_prob in zip(data, in_parameters(analyzer, pefs), pefs.log_probs, strict=True):
        batch = {"input_ids": torch.tensor([example["input_ids"]])}
        with torch.no_grad():
            assert abs(model(**batch).logits[0, -1].log_softmax(-1).max() - log_prob) < 1e-5
        truth = reference.example_factor(model, batch, names, reference.terms_of("causal-lm"))
        assert reference.relative_error_of_factors(truth, rows) < 1e-4  # norms and rotations are of float32
    vision = "vis"
    assert analyzer_of(model, target_modules=rf".*{vision}.*").maps, "the vision tower's by name"
    model.save_pretrained(tmp_path)
    loaded = NPEFFAnalyzer.from_pretrained(tmp_path)
    assert type(loaded.model) is type(model) and traits_of(loaded.head).task == "causal-lm"


def test_classes_of_transformers_load_with_themselves() -> None:
    """Oracle: transformers' own mappings; every class of the tasks that are known, and of those that see or hear."""
    wrong = []
    for mapping in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "AUDIO_CLASSIFICATION", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM",
                    "MASKED_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION"):  # fmt: skip
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for each in (name,) if isinstance(name, str) else name:
                config = transformers.PretrainedConfig(architectures=[each])
                loader = loader_of(config, None)
                if loader is None or loader[1] != each:
                    wrong.append((each, loader))
    assert not wrong


@pytest.mark.parametrize(
    ("name", "encoder_decoder", "task"),
    [
        ("FlaubertWithLMHeadModel", False, "masked-lm"),
        ("XLMWithLMHeadModel", False, "masked-lm"),
        ("BartForConditionalGeneration", True, "seq2seq-lm"),
        ("MarianMTModel", True, "seq2seq-lm"),
        ("BertGenerationDecoder", False, "causal-lm"),
        ("SeamlessM4TForTextToText", True, "seq2seq-lm"),
        ("WhisperForConditionalGeneration", True, "seq2seq-lm"),
        ("Qwen2AudioForConditionalGeneration", False, "causal-lm"),
        ("GPT2LMHeadModel", False, "causal-lm"),
        ("ASTForAudioClassification", False, "audio-classification"),
        ("MyOwnForCausalLM", None, "causal-lm"),
        ("GPT2Model", False, None),
    ],
)
def test_tasks_of_classes(name: str, encoder_decoder: bool | None, task: str | None) -> None:
    """Oracle: what the documentation of transformers says of these models."""
    assert task_of_class(name, encoder_decoder=encoder_decoder) == task


def test_mobilebert_is_read_at_its_logits(caplog: Any) -> None:
    """Oracle: JᵀSJ by autograd, an example at a time; its output embedding is read without being called."""
    sizes = {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}
    sizes = {k: v for k, v in sizes.items() if k != "num_key_value_heads"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**sizes)).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    data = [{"input_ids": [5, 3, 7, 8], "labels": [-100, 6, -100, -100]}]
    analyzer = analyzer_of(model, rank=20, output_factor="exact")
    pefs = analyzer.compute_pefs(data)
    assert warned_by(caplog, "fisher.heads")
    names = [m.parameter for m in analyzer.maps]
    assert names
    batch = {name: torch.tensor([value]) for name, value in data[0].items()}
    truth = reference.example_factor(model, batch, names, reference.terms_of("masked-lm", "labels"))
    rows = in_parameters(analyzer, pefs)[0]
    assert reference.relative_error_of_factors(truth, rows) < 1e-8


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_folder_of_an_adapter_loads_with_its_base(task: str, tmp_path: Path) -> None:
    """Oracle: PEFT's own loading, called directly; the identity of its weights."""
    base = tiny_model("llama", "causal-lm", dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    config: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if task != "causal-lm":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
        config |= {"modules_to_save": ["score"]}
    model.config.pad_token_id = 0
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS", **config)
    )
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    loaded = NPEFFAnalyzer.from_pretrained(tmp_path / "adapter")
    data = tiny_batch(base, 4, seed=2)
    direct = NPEFFAnalyzer(wrapped)
    assert traits_of(loaded.head).task == task and [m.parameter for m in loaded.maps] == [
        m.parameter for m in direct.maps
    ]
    ids = torch.tensor([data[0]["input_ids"]])
    torch.testing.assert_close(loaded.model(ids).logits, wrapped(ids).logits, atol=0, rtol=0)
    assert loaded.weights() == direct.weights()
    assert loaded.provenance()["model"] == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"adapter'.*base'"):
        NPEFFAnalyzer.from_pretrained(tmp_path / "adapter")


def test_a_checkpoint_that_names_an_attention_without_its_package_is_loaded_with_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the norms of the same model in memory; the log says which attention is taken."""
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash_attention_2 is there")
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "flash_attention_2"}))
    examples = tiny_batch(model, 3, seed=1)
    loaded = NPEFFAnalyzer.from_pretrained(tmp_path, fisher=analyzer_of(model).fisher)
    assert "'sdpa'" in caplog.text
    norms = loaded.compute_pefs(examples).norms
    torch.testing.assert_close(norms, analyzer_of(model).compute_pefs(examples).norms, rtol=1e-4, atol=0)


def test_a_mistyped_path_without_a_network_waits_for_the_hub_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identity: one request without repetition, after which the client, which repeats requests, is not called; a slow
    connection is left to it, once. The error names the missing folder and the one with nearly its name.
    """
    tries: list[Any] = []
    failure = type("ConnectError", (Exception,), {"__module__": "httpx"})

    class Session:
        def head(self, url: str, timeout: float) -> None:
            tries.append(url)
            raise failure("no name")

    def unreachable(*arguments: Any, **options: Any) -> str:
        tries.append(arguments)
        raise LocalEntryNotFoundError("no connection, and not in the cache")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(hub, "get_session", Session)
    with pytest.raises(OSError, match=r"there is no folder my-modle.*my-model.*cannot be reached"):
        NPEFFAnalyzer.from_pretrained("my-modle")
    (url,) = tries
    assert url.endswith("/my-modle/resolve/main/config.json")
    failure = type("ConnectTimeout", (Exception,), {"__module__": "httpx"})
    with pytest.raises(OSError, match=r"my-modle.*my-model.*cannot be reached"):
        NPEFFAnalyzer.from_pretrained("my-modle")
    assert tries == [url, url, ("my-modle", "config.json")]
