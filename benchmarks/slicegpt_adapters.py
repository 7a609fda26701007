"""What SliceGPT's residual adapters cost: ours, aligned and stored as a low rank, against the authors' dense ones, at
each sparsity.

Both compute the same function (to rounding); so parameters, bytes of the files and speed are all there is to compare,
and the dense model stands beside them. Two models: the bundled one, and a random LLaMA of width 768 with 6 blocks.
Files are in bfloat16; timings on CPU in float32, the three models taking turns; the fastest of some rounds. Prefill: 4
windows of 256 tokens, no cache. Decode: one sequence, 64 new tokens with the KV cache by `generate`, behind a prompt of
32.

    python benchmarks/slicegpt_adapters.py            some ten minutes on two cores
    python benchmarks/slicegpt_adapters.py --quick    two sparsities, the bundled model
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Shape, table, write_ids, write_llama
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from secateur.models.load import bundled_folder
from secateur.prune.run import prune
from secateur.requests import Request

WIDE = Shape(hidden=768, ffn=2048, heads=12, kv_heads=12, vocab=8192, blocks=6, dtype="bfloat16")
SPARSITIES = [round(0.05 * step, 2) for step in range(1, 11)]
FORMS = ("aligned", "dense")
WINDOWS, LENGTH, PROMPT, NEW = 4, 256, 32, 64


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="slicegpt-adapters-"))
    results = []
    try:
        for name in options.models:
            model = _write(folder, name)
            results.append({"model": name, "rows": _model(model, folder, options)})
            _print(results[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {
                "benchmark": "slicegpt_adapters",
                "threads": torch.get_num_threads(),
                "rounds": options.rounds,
                "results": results,
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of timings, of which the fastest counts (default 5)")
    parser.add_argument(
        "--samples",
        type=int,
        default=8,
        help="calibration windows of 256 random tokens (default 8); sizes and speed do not depend on the text",
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--models", nargs="+", choices=("bundled", "width 768"), default=["bundled", "width 768"])
    parser.add_argument("--quick", action="store_true", help="two sparsities, the bundled model")
    options = parser.parse_args()
    if options.quick:
        options.models, options.sparsities, options.rounds = ["bundled"], [0.1, 0.3], 2
    return options


def _write(folder: Path, name: str) -> Path:
    """Write the model, and random token ids beside it."""
    model = folder / name.replace(" ", "-")
    if name == "bundled":
        shutil.copytree(bundled_folder(), model)
    else:
        write_llama(model, WIDE)
    return model


def _model(folder: Path, work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    dense = _load(folder)
    vocabulary = dense.config.vocab_size
    ids = work / "ids.npy"
    write_ids(ids, options.samples, LENGTH, vocabulary)
    rows = [_sizes(folder, dense) | {"sparsity": 0.0, "sparsity_measured": 0.0, "form": "dense model"}]
    for sparsity in options.sparsities:
        models, sizes = {"dense model": dense}, []
        for form in FORMS:
            out = work / "out"
            request = Request(
                str(folder),
                "slicegpt",
                sparsity=sparsity,
                calibration=str(ids),
                seqlen=LENGTH,
                samples=options.samples,
                device="cpu",
                options={"adapters": form},
            )
            record = prune(request, out, overwrite=True)
            models[form] = _load(out)
            sizes.append(
                _sizes(out, models[form])
                | {"sparsity": sparsity, "sparsity_measured": record["sparsity_measured"], "form": form}
            )
            shutil.rmtree(out)
        times = {
            what: _alternate(models, run, vocabulary, options.rounds)
            for what, run in (("prefill", _prefill), ("decode", _decode))
        }
        for row in sizes:
            for what, tokens in (("prefill", WINDOWS * LENGTH), ("decode", NEW)):
                row[what] = round(tokens / times[what][row["form"]], 1)
                row[f"{what}_dense_model"] = round(tokens / times[what]["dense model"], 1)
        rows += sizes
    return rows


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def _sizes(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
    }


def _alternate(
    models: dict[str, PreTrainedModel],
    run: Callable[[PreTrainedModel, torch.Tensor], None],
    vocabulary: int,
    rounds: int,
) -> dict[str, float]:
    """The fewest seconds of each model."""
    ids = torch.randint(3, vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(models, float("inf"))
    for number in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            run(model, ids)
            if number:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - started)
    return best


@torch.inference_mode()
def _prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(ids, use_cache=False)


@torch.inference_mode()
def _decode(model: PreTrainedModel, ids: torch.Tensor) -> None:
    prompt = ids[:1, :PROMPT]
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert made.shape[1] == PROMPT + NEW


def _print(result: dict[str, Any]) -> None:
    whole, *rows = result["rows"]
    print(
        f"\n{result['model']}: {whole['parameters']:,} parameters, {whole['bytes'] / 1e6:.2f} MB; of the dense "
        "model: parameters, file, tokens/s"
    )
    found = []
    for row in rows:
        shares = (f"{row[key] / whole[key]:.3f}" for key in ("parameters", "bytes"))
        speeds = (
            f"{row[what]:,.0f}  ({row[what] / row[f'{what}_dense_model']:.2f} x)" for what in ("prefill", "decode")
        )
        found.append(
            (
                f"s = {row['sparsity']:g} ({row['sparsity_measured']:.3f})",
                row["form"],
                f"{row['parameters']:,}",
                *shares,
                *speeds,
                "",
            )
        )
    table(("", "adapters", "parameters", "of dense", "bytes", "prefill", "decode", ""), found)
    print(flush=True)


if __name__ == "__main__":
    main()
