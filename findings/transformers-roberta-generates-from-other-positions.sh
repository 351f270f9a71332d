#!/usr/bin/env bash
# transformers 5.23.0: RoBERTa and its family (XLM-R, CamemBERT, data2vec, X-MOD, XLM-R XL) as causal language models:
# `generate` predicts each token from other logits than the model itself gives for the same text, with and without a
# cache. Called directly, the model counts positions from pad_token_id + 1, so from 2, as RoBERTa is trained; `generate`
# counts them from 0 and passes them on. Positions 0 and 1 are rows of the table that no training has seen: row 1 is
# the row of padding, which is zero. No warning. BERT, which counts from 0, is not concerned; nor is RoBERTa as the
# decoder of an EncoderDecoderModel, which gets no positions.
# Expected: the logits that chose a token are those of the model for the text before it.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 torch==2.13.0
cat > "$folder/generated.py" <<'PYTHON'
import sys

import torch
import transformers

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, is_decoder=True,
)
families = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Data2VecText", "XLMRobertaXL", "Xmod"]
print("transformers", transformers.__version__)
good = True
for family in families:
    torch.manual_seed(0)
    language = dict(languages=["en_XX"], default_language="en_XX") if family == "Xmod" else {}
    config = getattr(transformers, f"{family}Config")(**sizes, **language)
    model = getattr(transformers, "BertLMHeadModel" if family == "Bert" else f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    positions = []
    table = next(m for name, m in model.named_modules() if name.endswith("embeddings.position_embeddings"))
    table.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].flatten().tolist()))
    prompt = torch.randint(5, 64, (1, 8))
    for cache in (True, False):
        with torch.no_grad():
            generated = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False, use_cache=cache,
                return_dict_in_generate=True, output_logits=True,
            )
            first = positions[0]
            positions.clear()
            own = model(generated.sequences[:, :-1], use_cache=False).logits[0, 7:]
        theirs = torch.cat(generated.logits)
        far = float((theirs - own[: len(theirs)]).abs().max())
        print(
            f"{family:13} cache {'on ' if cache else 'off'}: generate counts from {first[0]}, the model from "
            f"{positions[0][0]}; largest difference of a logit {far:.1e}"
        )
        good = good and (far < 1e-4 if family == "Bert" else far > 0.1 and (first[0], positions[0][0]) == (0, 2))
        positions.clear()
sys.exit(0 if good else 1)
PYTHON
"$folder/venv/bin/python" "$folder/generated.py" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
