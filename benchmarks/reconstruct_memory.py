"""The memory that reconstruction takes, and that it does not grow with the depth of the model.

Prunes a randomly initialised LLaMA with the blocks of a model of one billion parameters (bf16) with Wanda at 50%, and
reconstructs it with a few steps, then one with twice the blocks, each in a process of its own. Compares the peak of the
resident set above what the imports alone took with one block five times in float32 (weights, gradients, two moments of
Adam, the dense block), two activation buffers, and 0.3 GB. The deeper model may take at most 3% more than the other.

    python benchmarks/reconstruct_memory.py             some ten minutes on two cores, 4 GB of disk
    python benchmarks/reconstruct_memory.py --blocks 20 the whole billion, and two: hours
    python benchmarks/reconstruct_memory.py --small     seconds: does it run at all; its figures mean little
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

from _common import BILLION, SMALL, Shape, peak_after_imports, peak_rss, run_child, table, write_ids, write_llama

COPIES, BESIDE = 5, 0.3e9  # of a block in float32; bytes
GROWTH = 1.03  # of the peak, when the depth doubles
SAMPLES, SEQLEN, STEPS, BATCH = 8, 512, 2, 1024
MEGA = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--blocks", type=int, default=3, help="of the first model (default 3)")
    parser.add_argument("--child", choices=("write", "prune", "reconstruct"), help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        {"write": _child_write, "prune": _child_prune, "reconstruct": _child_reconstruct}[options.child](
            **options.arguments
        )
        return
    shape = replace(SMALL if options.small else BILLION, blocks=options.blocks)
    folder = Path(tempfile.mkdtemp(prefix="reconstruct-memory-"))
    try:
        runs = [_measure(folder, shape.deeper(times)) for times in (1, 2)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    growth = runs[1]["peak_above_baseline"] / runs[0]["peak_above_baseline"]
    _print(runs, growth)
    print(json.dumps({"benchmark": "reconstruct_memory", "small": options.small, "runs": runs, "growth": growth}))


def _measure(folder: Path, shape: Shape) -> dict[str, Any]:
    """Write one model, prune it and reconstruct it, each in another process."""
    model, pruned, ids = folder / f"blocks-{shape.blocks}", folder / f"blocks-{shape.blocks}-wanda", folder / "ids.npy"
    run_child(__file__, "write", model=str(model), ids=str(ids), shape=asdict(shape))
    run_child(__file__, "prune", model=str(model), ids=str(ids), out=str(pruned))
    out = folder / f"blocks-{shape.blocks}-reconstructed"
    result = run_child(__file__, "reconstruct", model=str(pruned), dense=str(model), ids=str(ids), out=str(out))
    for used in (model, pruned, out):
        shutil.rmtree(used)
    buffers = 2 * SAMPLES * SEQLEN * shape.hidden * 4
    bound = COPIES * 4 * shape.block_parameters + buffers + BESIDE
    above = result["peak"] - result["baseline"]
    return {
        **asdict(shape),
        "parameters": shape.parameters,
        "buffer_bytes": buffers,
        "block_bytes": COPIES * 4 * shape.block_parameters,
        "bound_bytes": round(bound),
        "peak_above_baseline": above,
        "holds": above <= bound,
        **result,
    }


def _child_write(model: str, ids: str, shape: dict[str, Any]) -> None:
    write_llama(Path(model), Shape(**shape))
    write_ids(Path(ids), SAMPLES, SEQLEN, shape["vocab"])
    print("{}")


def _child_prune(model: str, ids: str, out: str) -> None:
    from secateur.prune.run import prune
    from secateur.requests import Request

    prune(Request(model=model, method="wanda", sparsity=0.5, calibration=ids, device="cpu"), Path(out))
    print("{}")


def _child_reconstruct(model: str, dense: str, ids: str, out: str) -> None:
    baseline = peak_after_imports("secateur.reconstruct.reconstruct")
    from secateur.reconstruct.reconstruct import reconstruct
    from secateur.requests import ReconstructRequest

    started = time.perf_counter()
    request = ReconstructRequest(model, dense, calibration=ids, steps=STEPS, batch=BATCH, device="cpu")
    reconstruct(request, Path(out))
    seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"baseline": baseline, "peak": peak_rss(), "seconds": seconds}))


def _print(runs: list[dict[str, Any]], growth: float) -> None:
    def row(label: str, key: str, note: str = "") -> tuple[str, ...]:
        return (label, *(f"{run[key] / MEGA:,.1f}" for run in runs), note)

    print(
        f"Wanda 50%, then {STEPS} steps a block of {BATCH} tokens, {SAMPLES} x {SEQLEN} random tokens; MB (10^6 bytes)"
    )
    rows = [
        row("parameters (millions)", "parameters"),
        row("a block, five times", "block_bytes", "float32: weights, gradients, two moments, the dense block"),
        row("activation buffers", "buffer_bytes", "dense and pruned"),
        row("bound", "bound_bytes", "both, and 0.3 GB"),
        row("baseline after imports", "baseline"),
        row("peak above baseline", "peak_above_baseline"),
        ("  of the bound", *(f"{run['peak_above_baseline'] / run['bound_bytes']:.2f}" for run in runs), ""),
        ("  within the bound", *("yes" if run["holds"] else "NO" for run in runs), ""),
        ("seconds", *(f"{run['seconds']:.1f}" for run in runs), "of reconstruction"),
    ]
    table(("", *(f"{run['blocks']} blocks" for run in runs), ""), rows)
    verdict = "GROWS" if growth > GROWTH else "does not grow"
    print(f"  twice the depth: {growth:.3f} x the peak (allowed {GROWTH}): {verdict}")


if __name__ == "__main__":
    main()
