"""The memory that pruning takes, and that it does not grow with the depth of the model.

Prunes a randomly initialised LLaMA of about one billion parameters (bf16) on at most 4,096 tokens, with Wanda at 50% or
with SliceGPT at 25%, then one with twice the blocks, each in a process of its own, and compares the peak of the
resident set above what the imports alone took with 0.35 times the size of the weights plus the activation buffer. The
deeper model may take at most 3% more than the other.

    python benchmarks/prune_memory.py                      some ten minutes on two cores, 12 GB of disk python
    benchmarks/prune_memory.py --method slicegpt    eigenproblems of width 2048 in float64 at every place: hours;
    --blocks 4 for fewer python benchmarks/prune_memory.py --small              seconds: does it run at all; its figures
    mean little

--blocks 4 has fewer blocks. The resident set counts the pages of mapped files too, so reading weights through a map
shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _common import (
    BILLION,
    ITEM_BYTES,
    SMALL,
    Shape,
    peak_after_imports,
    peak_rss,
    run_child,
    table,
    write_ids,
    write_llama,
)

SPARSITY = {"wanda": 0.5, "slicegpt": 0.25}
SHARE = 0.35  # of the weights, that may be in memory beside the activation buffer
GROWTH = 1.03  # of the peak, when the depth doubles
MEGA = 1e6


def main() -> None:
    options = _options()
    shape = SMALL if options.small else BILLION
    shape = replace(shape, blocks=options.blocks or shape.blocks)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="prune-memory-"))
    try:
        runs = [_measure(folder, shape.deeper(times), options) for times in (1, 2)]
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    growth = runs[1]["peak_above_baseline"] / runs[0]["peak_above_baseline"]
    _print(runs, growth, options)
    print(
        json.dumps(
            {
                "benchmark": "prune_memory",
                "method": options.method,
                "small": options.small,
                "runs": runs,
                "growth": round(growth, 4),
                "grows": growth > GROWTH,
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--method", choices=list(SPARSITY), default="wanda")
    parser.add_argument("--blocks", type=int, help=f"of the first model (default {BILLION.blocks})")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (default 8)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the models and results there and leave them")
    parser.add_argument("--child", choices=("write", "prune"), help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        {"write": _child_write, "prune": _child_prune}[options.child](**options.arguments)
        raise SystemExit
    if options.samples * options.seqlen > 4096:
        parser.error("--samples x --seqlen: at most 4096 tokens")
    return options


def _measure(folder: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Write one model and prune it, both in other processes."""
    model, out, ids = (
        folder / f"blocks-{shape.blocks}",
        folder / f"blocks-{shape.blocks}-{options.method}",
        folder / "ids.npy",
    )
    run_child(
        __file__,
        "write",
        model=str(model),
        ids=str(ids),
        shape=asdict(shape),
        samples=options.samples,
        seqlen=options.seqlen,
    )
    result = run_child(__file__, "prune", model=str(model), ids=str(ids), out=str(out), method=options.method)
    weights = shape.weights_bytes
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert 0 <= stored - weights < 1e-3 * weights + 1e6, (stored, weights)
    bound = SHARE * weights + result["buffer_bytes"]
    above = result["peak"] - result["baseline"]
    if options.keep is None:
        shutil.rmtree(model)
        shutil.rmtree(out)
    return {
        **asdict(shape),
        "parameters": shape.parameters,
        "tokens": options.samples * options.seqlen,
        "weights_bytes": weights,
        "buffer_bytes": result["buffer_bytes"],
        "floor_bytes": shape.block_parameters * 4
        + shape.vocab * shape.hidden * ITEM_BYTES[shape.dtype]
        + result["buffer_bytes"],
        "bound_bytes": round(bound),
        "baseline": result["baseline"],
        "peak_above_baseline": above,
        "of_weights": round(above / weights, 4),
        "holds": above <= bound,
        "seconds": result["seconds"],
        "seconds_by": result["seconds_by"],
    }


def _child_write(model: str, ids: str, shape: dict[str, Any], samples: int, seqlen: int) -> None:
    write_llama(Path(model), Shape(**shape))
    write_ids(Path(ids), samples, seqlen, shape["vocab"])
    print("{}")


def _child_prune(model: str, ids: str, out: str, method: str) -> None:
    baseline = peak_after_imports("secateur.prune.run")
    from secateur.prune.run import prune
    from secateur.requests import Request

    started = time.perf_counter()
    request = Request(model=model, method=method, sparsity=SPARSITY[method], calibration=ids, device="cpu")
    record = prune(request, Path(out), overwrite=True)
    seconds = round(time.perf_counter() - started, 2)
    print(
        json.dumps(
            {
                "baseline": baseline,
                "peak": peak_rss(),
                "seconds": seconds,
                "seconds_by": record["seconds_by"],
                "buffer_bytes": record["buffer_bytes"],
            }
        )
    )


def _print(runs: list[dict[str, Any]], growth: float, options: argparse.Namespace) -> None:
    def row(label: str, key: str, note: str = "") -> tuple[str, ...]:
        return (label, *(f"{run[key] / MEGA:,.1f}" for run in runs), note)

    print(
        f"{options.method} {SPARSITY[options.method]:.0%}, {options.samples} x {options.seqlen} random tokens, bf16 "
        "weights, CPU; MB (10^6 bytes)"
    )
    rows = [
        ("parameters (millions)", *(f"{run['parameters'] / MEGA:,.1f}" for run in runs), ""),
        row("weights", "weights_bytes"),
        row("activation buffer", "buffer_bytes"),
        row("floor", "floor_bytes", "one block in float32 + the largest outer tensor + the buffer"),
        row("bound", "bound_bytes", f"{SHARE} x weights + the buffer"),
        row("baseline after imports", "baseline"),
        row("peak above baseline", "peak_above_baseline"),
        ("  of the weights", *(f"{run['of_weights']:.3f}" for run in runs), ""),
        ("  of the floor", *(f"{run['peak_above_baseline'] / run['floor_bytes']:.2f}" for run in runs), ""),
        ("  within the bound", *("yes" if run["holds"] else "NO" for run in runs), ""),
        ("seconds", *(f"{run['seconds']:.1f}" for run in runs), "of pruning"),
    ]
    table(("", *(f"{run['blocks']} blocks" for run in runs), ""), rows)
    print(
        f"  twice the depth: {growth:.3f} x the peak (allowed {GROWTH}): "
        f"{'GROWS' if growth > GROWTH else 'does not grow'}"
    )


if __name__ == "__main__":
    main()
