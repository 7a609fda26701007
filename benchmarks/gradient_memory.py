"""The memory that gradients of the whole model take: scores are formed block by block, and no weight has a `.grad`.

Prunes a randomly initialised LLaMA of about one billion parameters (bf16) on a few short windows with a method that
needs end-to-end gradients, in a process of its own, and compares the peak of the resident set above what the imports
alone took with the bound: the weights once, as they are stored, and one block's statistics in float32: one number a
weight, or for LLM Surgeon its Kronecker factors. Weights with their gradients in float32, as the usual way keeps them,
are printed beside it.

    python benchmarks/gradient_memory.py                         some minutes on two cores, 5 GB of disk python
    benchmarks/gradient_memory.py --set order=mixed       another option of the method python
    benchmarks/gradient_memory.py --method llm_surgeon --set shots=1 --sparsity 0.1      one shot; its float64 solves
    take long python benchmarks/gradient_memory.py --small                 seconds: does it run at all; its figures mean
    little
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

MEGA = 1e6


def main() -> None:
    options = _options()
    shape = SMALL if options.small else BILLION
    shape = replace(shape, blocks=options.blocks or shape.blocks)
    folder = Path(tempfile.mkdtemp(prefix="gradient-memory-", dir=options.folder))
    try:
        model, ids = folder / "model", folder / "ids.npy"
        run_child(
            __file__,
            "write",
            model=str(model),
            ids=str(ids),
            shape=asdict(shape),
            samples=options.samples,
            seqlen=options.seqlen,
        )
        asked = {
            "method": options.method,
            "sparsity": options.sparsity,
            "options": dict(pair.split("=", 1) for pair in options.set),
        }
        result = run_child(__file__, "prune", model=str(model), ids=str(ids), out=str(folder / "out"), **asked)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    above, block = result["peak"] - result["baseline"], 4 * _statistics(shape, options.method)
    kept = (shape.blocks + 1) * options.samples * options.seqlen * shape.hidden * 4
    run = {
        **asked,
        **asdict(shape),
        "parameters": shape.parameters,
        "tokens": options.samples * options.seqlen,
        "weights_bytes": shape.weights_bytes,
        "block_statistics_bytes": block,
        "block_inputs_bytes": kept,
        "bound_bytes": shape.weights_bytes + block,
        "usual_bytes": shape.weights_bytes + shape.parameters * 4,
        "baseline": result["baseline"],
        "peak_above_baseline": above,
        "holds": above <= shape.weights_bytes + block,
        "seconds": result["seconds"],
    }
    _print(run)
    print(json.dumps({"benchmark": "gradient_memory", "small": options.small, **run}))


def _statistics(shape: Shape, method: str) -> int:
    """The count of numbers in one block's statistics: one a weight, or A of four inputs and G of seven outputs."""
    if method != "llm_surgeon":
        return shape.block_parameters
    inputs = 3 * shape.hidden**2 + shape.ffn**2  # q, k and v read one input, gate and up another
    return inputs + sum(outputs**2 for outputs, _ in shape.block_matrices.values())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--method", default="llm_pruner", help="a method that needs gradients (default llm_pruner)")
    parser.add_argument("--sparsity", type=float, default=0.2, help="(default 0.2)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method; may be repeated"
    )
    parser.add_argument("--blocks", type=int, help=f"(default {BILLION.blocks})")
    parser.add_argument("--samples", type=int, default=4, help="windows (default 4)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window (default 128)")
    parser.add_argument("--folder", type=Path, help="where to write the model for the time of the run")
    parser.add_argument("--child", choices=("write", "prune"), help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        {"write": _child_write, "prune": _child_prune}[options.child](**options.arguments)
        raise SystemExit
    return options


def _child_write(model: str, ids: str, shape: dict[str, Any], samples: int, seqlen: int) -> None:
    write_llama(Path(model), Shape(**shape))
    write_ids(Path(ids), samples, seqlen, shape["vocab"])
    print("{}")


def _child_prune(model: str, ids: str, out: str, method: str, sparsity: float, options: dict[str, Any]) -> None:
    baseline = peak_after_imports("secateur.prune.run")
    from secateur.prune.run import prune
    from secateur.requests import Request

    started = time.perf_counter()
    prune(
        Request(model=model, method=method, sparsity=sparsity, calibration=ids, device="cpu", options=options),
        Path(out),
    )
    print(json.dumps({"baseline": baseline, "peak": peak_rss(), "seconds": round(time.perf_counter() - started, 2)}))


def _print(run: dict[str, Any]) -> None:
    said = ", ".join([f"{run['sparsity']:.0%}", *(f"{name}={value}" for name, value in run["options"].items())])
    print(
        f"{run['method']} {said}; {run['tokens']} random tokens, {run['blocks']} blocks, bf16 weights, CPU; MB (10^6 "
        "bytes)"
    )
    lines = {
        "parameters (millions)": "parameters",
        "weights as stored": "weights_bytes",
        "one block's statistics in float32": "block_statistics_bytes",
        "bound: the two together": "bound_bytes",
        "weights and all gradients in float32": "usual_bytes",
        "inputs of all blocks": "block_inputs_bytes",
        "baseline after imports": "baseline",
        "peak above baseline": "peak_above_baseline",
    }
    rows: list[tuple[str, ...]] = [(label, f"{run[key] / MEGA:,.1f}", "") for label, key in lines.items()]
    table(
        ("", "", ""),
        [
            *rows,
            ("  within the bound", "yes" if run["holds"] else "NO", ""),
            ("seconds", f"{run['seconds']:.1f}", "of pruning"),
        ],
    )


if __name__ == "__main__":
    main()
