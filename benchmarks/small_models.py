"""Train small models of other families and widths on the built-in text, for what needs more than one model to be
believed.

    python benchmarks/small_models.py --out runs/small            # opt, phi and two LLaMAs, about 10 minutes each on
    one core python benchmarks/small_models.py --out runs/small --only opt

They use the tokenizer of the bundled model and the train part of the built-in text. Prints a table and ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.models.load import bundled_folder
from secateur.text.builtin import documents

SEQLEN, BATCH, PEAK, WARMUP = 256, 16, 3e-3, 60
COMMON = {
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
MODELS = {
    "opt": {
        "hidden_size": 128,
        "word_embed_proj_dim": 128,
        "ffn_dim": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "dropout": 0.0,
    },
    "phi": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "resid_pdrop": 0.0,
    },
    "llama-wide": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "llama-deep": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def train(name: str, steps: int, out: Path) -> dict[str, float]:
    """Train one model: AdamW, cosine to a tenth, gradients clipped at 1."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
    ids = torch.tensor([i for d in documents("train") for i in tokenizer(d.text)["input_ids"]])
    config = CONFIG_MAPPING[name.split("-")[0]](**COMMON, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config).train()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / WARMUP, 0.55 + 0.45 * math.cos(math.pi * max(0, step - WARMUP) / max(1, steps - WARMUP))
        ),
    )
    generator, started, smooth = torch.Generator().manual_seed(0), time.perf_counter(), 8.0
    for step in range(steps):
        starts = torch.randint(0, len(ids) - SEQLEN - 1, (BATCH,), generator=generator)
        batch = torch.stack([ids[s : s + SEQLEN + 1] for s in starts])
        loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth += 0.05 * (loss.item() - smooth)
        if (step + 1) % 50 == 0:
            print(
                f"{name}: step {step + 1} of {steps}, loss {smooth:.3f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    return {
        "loss": smooth,
        "seconds": time.perf_counter() - started,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    found = {}
    for name in options.only or MODELS:
        if not (options.out / name / "config.json").is_file():
            found[name] = train(name, options.steps, options.out)
    print(json.dumps({"benchmark": "small_models", "steps": options.steps, "models": found}))


if __name__ == "__main__":
    main()
