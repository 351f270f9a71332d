#!/usr/bin/env bash
# transformers 5.23.0: T5GemmaForSequenceClassification, given token ids and the attention mask, classifies a text by
# one position of its decoder where the text is the longest of its batch, or alone, and by the next one where it is
# padded: its logits depend on what lies beside it. The decoder reads the ids shifted by one, so that the last token is
# at position n; the pooled position is min(n, width - 1), which is n - 1 without padding: there the decoder has not
# read the last token. Attention and the mask are not to blame: states at the same position are the same.
# Expected: the logits of a text do not depend on padding that the mask marks, as in BertForSequenceClassification.
# Downloads about 300 MB with a CPU build of torch; Python 3.11. Exits 0 while transformers behaves as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/pooled.py" <<'PYTHON'
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5GemmaConfig,
    T5GemmaForSequenceClassification,
    T5GemmaModuleConfig,
)

TEXT, LONGER = [5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17]


def t5gemma():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=64, initializer_range=0.2,
    )  # fmt: skip
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**sizes), decoder=T5GemmaModuleConfig(**sizes), vocab_size=64, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, num_labels=3,
    )  # fmt: skip
    return T5GemmaForSequenceClassification(config).double().eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            pad_token_id=0, num_labels=3, initializer_range=0.2,
        )
    ).double().eval()  # fmt: skip


@torch.no_grad()
def outputs(model, rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True)


model = t5gemma()
alone, beside = outputs(model, [TEXT]), outputs(model, [TEXT, LONGER])
n = len(TEXT)
states = (alone.hidden_states[-1][0] - beside.hidden_states[-1][0, :n]).abs().max()
positions = model.score(beside.hidden_states[-1][0]).detach()
before, last = positions[n - 1], positions[n]
print("transformers", transformers.__version__)
print("decoder states of the text's first", n, "positions, alone and beside a longer text, differ by", f"{float(states):.1e}")
print("logits alone                      ", [round(x, 4) for x in alone.logits[0].tolist()])
print("logits beside a longer text       ", [round(x, 4) for x in beside.logits[0].tolist()])
print("the head at the last but one token", [round(x, 4) for x in before.tolist()])
print("the head at the last token        ", [round(x, 4) for x in last.tolist()])
other = bert()
change = (outputs(other, [TEXT]).logits[0] - outputs(other, [TEXT, LONGER]).logits[0]).abs().max()
print("BERT's logits, alone and beside a longer text, differ by", f"{float(change):.1e}")
close = lambda a, b: bool((a - b).abs().max() < 1e-6)  # noqa: E731
as_described = (
    float(states) < 1e-6
    and close(alone.logits[0], before)
    and close(beside.logits[0], last)
    and not close(before, last)
    and float(change) < 1e-6
)
raise SystemExit(0 if as_described else "transformers no longer behaves as described")
PYTHON
"$folder/venv/bin/python" "$folder/pooled.py"
