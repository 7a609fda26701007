"""How near a dry run's time and memory come to those of the real run, for every method, for `eval` and for `heal`.

Each line is a process of its own, which estimates and then works, in turns; figures are medians. The aim: the seconds
that a dry run says are within 1.5 times those of the record, and so are the bytes, above those of the process before
the work. A dry run itself should cost a few seconds, or a few per cent of the run.

The floor is one pass of the calibration (or evaluation, or training) tokens through the matrices of the blocks, at the
rate at which this machine multiplies large matrices: what a count of products would say.

    python benchmarks/estimates.py                                    the bundled model, 128 windows: several minutes
    python benchmarks/estimates.py MODEL --calibration FILE --samples 16 --seqlen 512
    python benchmarks/estimates.py --quick                            a few windows: to see that it runs
    python benchmarks/estimates.py --processor-time                   the processor's time: on a busy machine, one thread
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import matrix_rate, run_child

WITHIN = 1.5
FEW_STEPS = {"disp_llm": {"steps": 8, "unmet": "cut"}, "llm_surgeon": {"shots": 2}}
"""A method of many steps is asked for few: its whole run would take days."""
SPARSITY = 0.2
EVAL, HEAL = "eval", "heal"


def main() -> None:
    options = _options()
    if options.child:
        print(json.dumps(_measure(**json.loads(options.arguments))))
        return
    given = {
        "model": options.model,
        "size": {"calibration": options.calibration, "samples": options.samples, "seqlen": options.seqlen},
        "repeats": options.repeats,
        "processor": options.processor_time,
        "heal_steps": options.heal_steps,
        "windows": options.windows,
    }
    results = []
    for name in options.only or [*_cases(), EVAL, HEAL]:
        results.append({"name": name, **run_child(__file__, "measure", name=name, **given)})
        _print(results[-1:], header=len(results) == 1)
    worst = max(max(r["ratio"], 1 / r["ratio"]) for r in results if r["ratio"])
    missed = [r["name"] for r in results if not r["met"]]
    verdict = f"MISSED by {', '.join(missed)}" if missed else "all met"
    print(f"\n  the farthest estimate is {worst:.2f}x off; within {WITHIN:g}x: {verdict}")
    print(
        json.dumps({"benchmark": "estimates", **given, "within": WITHIN, "worst": round(worst, 3), "results": results})
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="bundled", help="a folder, or 'bundled'")
    parser.add_argument("--calibration", default="builtin", help="a text SPEC")
    parser.add_argument("--samples", type=int, help="calibration windows (default: as in the method's paper)")
    parser.add_argument("--seqlen", type=int, help="tokens of a window (default: as in the method's paper)")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each line (default 1)")
    parser.add_argument("--heal-steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows (default 32)")
    parser.add_argument("--only", nargs="+", help="names of lines, such as wanda, sparsegpt 2:4, eval")
    parser.add_argument("--processor-time", action="store_true", help="the processor's time, not the clock's")
    parser.add_argument("--quick", action="store_true", help="8 windows of 64 tokens")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.samples, options.seqlen, options.heal_steps, options.windows = 8, 64, 2, 4
    return options


def _cases() -> list[str]:
    """Every method, with its other pattern where it has one, and the two ways to choose the sparsity of matrices."""
    from secateur.methods import find_method, method_names

    names = list(method_names())
    names += [f"{name} 2:4" for name in names if "N:M" in find_method(name).patterns()]
    return [*names, "magnitude rows", "wanda owl", "wanda auto"]


def _measure(
    name: str, model: str, size: dict[str, Any], repeats: int, processor: bool, heal_steps: int, windows: int
) -> dict[str, Any]:
    import torch

    from secateur import api
    from secateur.core.memory import PeakMemory

    clock = time.process_time if processor else time.perf_counter
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, api.progress_to(None):
        for turn in range(repeats):
            out = Path(folder) / f"{turn}"
            dry, work = _work(name, model, size, out, heal_steps, windows, clock)
            started = clock()
            said = dry()
            cost, memory = clock() - started, PeakMemory(torch.device("cpu"))
            started = clock()
            work()
            real = clock() - started
            found.append({"said": said["seconds_estimated"] or 0.0, "real": real, "cost": cost})
            found[-1] |= {"memory_said": said["memory_bytes"] or 0, "memory": memory.peak() or 0}
            found[-1] |= {"tokens": _tokens(said)}
    middle = {key: statistics.median(turn[key] for turn in found) for key in found[0]}
    weights = api.prepare(api.Request(model, "magnitude", sparsity=SPARSITY)).checkpoint.view().matrix_parameters()
    ratio = middle["said"] / middle["real"]
    return {
        **middle,
        "ratio": round(ratio, 3),
        "memory_ratio": round(middle["memory_said"] / middle["memory"], 3) if middle["memory"] else None,
        "floor": 2 * weights * middle["tokens"] / matrix_rate(0.3),
        "met": not middle["said"] or 1 / WITHIN <= ratio <= WITHIN,  # no estimate is better than a wrong one
    }


def _tokens(said: dict[str, Any]) -> int:
    names = ("calibration_tokens", "evaluation_tokens", "training_tokens")
    return int(next(said[name] for name in names if name in said))


def _work(
    name: str, model: str, size: dict[str, Any], out: Path, heal_steps: int, windows: int, clock: Any
) -> tuple[Any, Any]:
    """The dry run of a line, and its work."""
    from secateur import api

    records = out.parent / "records.jsonl"
    measured = {"limit": windows, "text": size["calibration"]}
    if name == EVAL:
        asked = api.EvalRequest(model, **measured)
        return lambda: api.estimate_evaluate(asked, clock), lambda: api.evaluate(asked, records_file=records)
    if name == HEAL:
        pruned = out.parent / "pruned"
        api.prune(api.Request(model, "magnitude", sparsity=0.5), pruned, overwrite=True)
        seqlen = {} if size["seqlen"] is None else {"seqlen": size["seqlen"]}
        how = {"calibration": size["calibration"], "steps": heal_steps, "samples": 64, **measured, **seqlen}
        healing = api.HealRequest(str(pruned), **how)
        return lambda: api.estimate_heal(healing, clock=clock), lambda: api.heal(healing, out)
    method, _, kind = name.partition(" ")
    options = FEW_STEPS.get(method, {})
    implied = ":" in kind
    request = api.Request(
        model,
        method,
        sparsity=None if implied else SPARSITY,
        modules=kind if kind in ("auto", "owl") else None,
        pattern=kind if implied or kind == "rows" else None,
        options=options,
        **size,
    )
    return lambda: api.estimate(api.prepare(request), clock), lambda: api.prune(request, out)


def _print(results: list[dict[str, Any]], *, header: bool) -> None:
    rows = [
        (
            f"{result['name']:18}",
            f"{result['said']:9.2f}",
            f"{result['real']:9.2f}",
            f"{result['floor']:7.2f}",
            f"{result['ratio']:5.2f}",
            f"{result['cost']:8.2f}",
            f"{result['memory_said'] / 1e6:9.0f}",
            f"{result['memory'] / 1e6:7.0f}",
            "no estimate" if not result["said"] else "" if result["met"] else "MISSED",
        )
        for result in results
    ]
    if header:
        print("                        said s     real s  floor s  ratio   cost s    said MB  real MB")
    for row in rows:
        print("  " + "  ".join(row).rstrip(), flush=True)


if __name__ == "__main__":
    main()
