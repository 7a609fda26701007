#!/usr/bin/env bash
# A folder of model type qwen2 loses the pre-tokenizer of its own tokenizer.json.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3 (from PyPI, without torch).
# Input: one tokenizer.json, trained here with a byte-level pre-tokenizer that keeps digits together, and a tokenizer_config.json
#   that names PreTrainedTokenizerFast. Two folders hold the same two files; their config.json says model_type llama and qwen2.
# Guess beforehand: AutoTokenizer takes the class that tokenizer_config.json names, so both folders give the ids of tokenizer.json.
# Seen: llama gives them. For qwen2, AutoTokenizer takes Qwen2Tokenizer, which keeps the vocabulary and puts its own
#   pre-tokenizer in the place of the stored one: digits are split, and the same text has 20 tokens instead of 7. No warning.
#   With "tokenizer_class": "TokenizersBackend" it is the same.
# So: a model of the Qwen2 architecture that was trained with a tokenizer of its own is evaluated on other tokens than those
#   it was trained on, and a copy of it with another model_type tokenises differently from the original.
# Related: transformers issue 45920 (other model types, where the class that the hub names was the wrong one).
# Exits with 1 if what is seen changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3

cat > "$work/try.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

TEXT = "in 2024 and 2025, 12345 apples"
stored = Tokenizer(models.BPE())
stored.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
stored.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
)
stored.train_from_iterator(["in 2024 and 2025, 12345 apples; the year 2024"] * 50, trainer)

seen = {"tokenizer.json": stored.encode(TEXT).tokens}
for model_type in ("llama", "qwen2"):
    for named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        folder = Path(sys.argv[1]) / f"{model_type}-{named}"
        folder.mkdir()
        stored.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        about = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        seen[folder.name] = tokenizer.tokenize(TEXT)
        print(folder.name, type(tokenizer).__name__, seen[folder.name])

same = {name for name, tokens in seen.items() if tokens == seen["tokenizer.json"]}
assert same == {"tokenizer.json", "llama-PreTrainedTokenizerFast", "llama-TokenizersBackend"}, same
assert len(seen["tokenizer.json"]) == 7 and len(seen["qwen2-PreTrainedTokenizerFast"]) == 20
PYTHON

HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/try.py" "$work" && echo "as written above"
