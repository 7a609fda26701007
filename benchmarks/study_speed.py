"""The time that `secateur study modules` saves over running its cells one by one.

The same cells three ways, on the bundled model: the study with shared statistics; `prune --modules` and `eval` for each
cell in one Python process; and the two commands for each cell, as someone without the study would run them. The study
measures the dense model too, the others do not. Seconds are those of the processor, so that other work on the machine
counts little. Prints a table and ends with one JSON line.

    python benchmarks/study_speed.py [--kinds v,down,mlp,all] [--sparsity 0.5] [--samples 128] [--limit 128] [--repeats
    1]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import table

SECATEUR = [sys.executable, "-c", "from secateur.cli import main; main()"]


def study(arguments: argparse.Namespace, kinds: str, sparsities: str, folder: Path) -> float:
    """CPU seconds of the study, from the start of its process to its end."""
    command = [
        "study",
        "modules",
        "bundled",
        "--kinds",
        kinds,
        "--sparsity",
        sparsities,
        "--samples",
        arguments.samples,
        "--limit",
        arguments.limit,
    ]
    return _run([*command, "--out", folder / f"study-{time.monotonic_ns()}"])


def by_commands(arguments: argparse.Namespace, cells: list[str], folder: Path) -> float:
    """CPU seconds of two commands a cell."""
    spent = 0.0
    for number, modules in enumerate(cells):
        out = folder / f"cell-{time.monotonic_ns()}-{number}"
        spent += _run(
            [
                "prune",
                "bundled",
                "--method",
                "wanda",
                "--modules",
                modules,
                "--samples",
                arguments.samples,
                "--out",
                out,
            ]
        )
        spent += _run(["eval", out, "--limit", arguments.limit])
    return spent


def in_one_process(arguments: argparse.Namespace, cells: list[str], folder: Path) -> float:
    """CPU seconds of the same work without starting Python and importing torch again."""
    from secateur import api

    started = time.process_time()
    for number, modules in enumerate(cells):
        out = folder / f"one-{time.monotonic_ns()}-{number}"
        api.prune(api.Request("bundled", "wanda", modules=modules, samples=arguments.samples), out)
        api.evaluate(api.EvalRequest(str(out), limit=arguments.limit))
    return time.process_time() - started


def _run(command: list[object]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*SECATEUR, *map(str, command)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print, end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="v,down,mlp,all")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    cells = [f"{kind}={s}" for kind in arguments.kinds.split(",") for s in arguments.sparsity.split(",")]
    first_kind, first_sparsity = arguments.kinds.split(",")[0], arguments.sparsity.split(",")[0]
    seconds: dict[str, list[float]] = {
        "study": [],
        "study of one cell": [],
        "prune and eval, one process": [],
        "prune and eval, commands": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):  # one after the other, so that a busy machine is busy for all of them
            seconds["study"].append(study(arguments, arguments.kinds, arguments.sparsity, Path(folder)))
            seconds["prune and eval, one process"].append(in_one_process(arguments, cells, Path(folder)))
            seconds["study of one cell"].append(study(arguments, first_kind, first_sparsity, Path(folder)))
            seconds["prune and eval, commands"].append(by_commands(arguments, cells, Path(folder)))
    best = {name: min(times) for name, times in seconds.items()}
    more = (best["study"] - best["study of one cell"]) / max(1, len(cells) - 1)
    rows = [(name, f"{value:.1f}", f"{value / best['study']:.2f}") for name, value in best.items()]
    table((f"{len(cells)} cells", "CPU seconds", "of the study"), rows)
    one, commands = (best[f"prune and eval, {how}"] / len(cells) for how in ("one process", "commands"))
    print(
        f"  one more: study {more:.1f} s; prune and eval {one:.1f} s in one process ({one / more:.1f}), "
        f"{commands:.1f} s as commands ({commands / more:.1f})"
    )
    print(
        json.dumps(
            {
                "benchmark": "study_speed",
                "cells": cells,
                "samples": arguments.samples,
                "limit": arguments.limit,
                "seconds": seconds,
                "one_more_cell": more,
            }
        )
    )


if __name__ == "__main__":
    main()
