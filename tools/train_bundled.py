"""Train the model that ships with the package: a small LLaMA on the standard library's sources and documentation.

    python tools/train_bundled.py --out src/secateur/bundled/model

Text and split are those of `secateur.text.builtin` (train part, the library's test suite included). One seed fixes the
tokenizer, the weights and the order of the data. The state is saved every few minutes; the same command again
continues. At the end it writes bf16 safetensors, tokenizer and model card with the held-out perplexity, the bits per
byte and a sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.text.builtin import documents

BOS, EOS = "<s>", "</s>"
VOCABULARY = 2048
SEQLEN = 512
CONFIG = dict(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=SEQLEN,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, runs of spaces are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=SEQLEN)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Every document with its BOS, one after the other: int64 [tokens]."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([i for e in encoded for i in e.ids], dtype=torch.int64)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, limit: int | None = None) -> tuple[float, int]:
    """Mean loss in nats a token over non-overlapping windows, and the number of predicted tokens."""
    windows = stream[: len(stream) // SEQLEN * SEQLEN].view(-1, SEQLEN)[:limit]
    total, count = 0.0, 0
    for batch in windows.split(8):
        logits = model(batch).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").double().item()
        count += batch[:, 1:].numel()
    return total / count, count


def model_card(facts: dict[str, object], sample: str) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The model bundled with secateur

A small LLaMA (grouped-query attention, RMSNorm, gated MLP, byte-level BPE) for demonstrations and tests. It writes
plausible Python and nothing else; its use is that pruning has something real to destroy. Trained from scratch on the
Python standard library (sources, tests and documentation, PSF licence), which is read at run time and is not in this
repository.

| | |
|---|---|
{rows}

A sample, temperature 0.8, after `def read_`:

```python
{sample}
```
"""


def _changes(schedule: list[tuple[int, int]]) -> str:
    return "".join(
        f" (--steps was {before} up to step {step})" for (_, before), (step, _) in itertools.pairwise(schedule)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--state", type=Path, default=Path("runs/bundled-state.pt"), help="where to keep the state for resuming"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    train, test = documents("train", with_tests=True), documents("test")
    tokenizer = train_tokenizer([d.text for d in train])
    train_stream = token_stream(tokenizer, [d.text for d in train])
    test_stream = token_stream(tokenizer, [d.text for d in test])
    test_bytes = sum(len(d.text.encode()) for d in test)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, {len(train_stream):,} training tokens, {len(test_stream):,} held out", flush=True
    )

    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    first, spent = 0, 0.0
    schedule = [
        (0, args.steps)
    ]  # (from this step on, the cosine ends at that step): a run may be continued with another --steps
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        schedule = state.get("schedule", [(0, args.steps)])
        if schedule[-1][1] != args.steps:
            schedule.append((first, args.steps))
        print(f"continuing after step {first}", flush=True)

    started = time.perf_counter() - spent
    offsets = torch.arange(SEQLEN)
    for step in range(first, args.steps):
        # the data of a step depends on the seed and the step alone, so resuming needs no generator state
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(len(train_stream) - SEQLEN, (args.batch, 1), generator=draw)
        batch = train_stream[starts + offsets]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak, args.warmup)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        seconds = time.perf_counter() - started
        if done % 50 == 0 or done == args.steps:
            print(json.dumps({"step": done, "loss": round(loss.item(), 4), "seconds": round(seconds)}), flush=True)
        if done % 250 == 0 or done == args.steps:
            held_out, _ = held_out_loss(model, test_stream, limit=64)
            print(json.dumps({"step": done, "held_out_ppl": round(math.exp(held_out), 3)}), flush=True)
            args.state.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "seconds": seconds,
                "schedule": schedule,
            }
            torch.save(state, args.state.with_suffix(".tmp"))
            args.state.with_suffix(".tmp").rename(args.state)

    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model = model.float().eval()  # what is measured are the rounded weights that ship
    loss_nats, predicted = held_out_loss(model, test_stream)
    facts = {
        "parameters": f"{parameters:,} (bf16)",
        "training data": f"standard library of Python {platform.python_version()}, train part, with tests: "
        f"{len(train_stream):,} tokens",
        "steps": f"{args.steps}{_changes(schedule)} of {args.batch} x {SEQLEN} tokens",
        "optimiser": f"AdamW, peak {args.peak:g}, warm-up {args.warmup}, cosine, weight decay 0.1",
        "seed": args.seed,
        "command": f"`python tools/train_bundled.py --out {args.out} --steps {args.steps} --batch {args.batch}`",
        "training time": f"{(time.perf_counter() - started) / 60:.0f} minutes of wall time "
        f"on {torch.get_num_threads()} CPU cores",
        "held-out perplexity": f"{math.exp(loss_nats):.3f} a token, windows of {SEQLEN} "
        f"({predicted:,} tokens, tests left out)",
        "held-out bits per byte": f"{loss_nats / math.log(2) * len(test_stream) / test_bytes:.3f}",
    }
    torch.manual_seed(args.seed)
    prompt = tokenizer("def read_", return_tensors="pt")["input_ids"]
    sample = tokenizer.decode(
        model.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.8)[0], skip_special_tokens=True
    )
    (args.out / "README.md").write_text(model_card(facts, sample))
    print(json.dumps(facts, default=str), flush=True)


if __name__ == "__main__":
    main()
