"""How fast Wanda is here, beside a straightforward implementation of the published procedure and beside the machine's
own limit.

Both prune the same random LLaMA on the same 128 x 256 random token ids, on CPU in float32, and must remove the same
weights. They take turns; figures are medians. Two models: 6 blocks of width 192, and about 100M parameters. Two
patterns: 50% in every row, 2:4.

The straightforward implementation follows arXiv:2306.11695: the whole model in memory, one window at a time; in each
block one pass with a running mean of squared norms at every linear module, scores |W| * sqrt(mean), a sort of every row
(or, for N:M, a loop over groups of columns), and a second pass for the inputs of the next block.

The floor of the forward is two passes of all tokens through the block matrices, at the rate at which this machine
multiplies [2048, 1024] by [1024, 1024]. It leaves out attention, norms and activations, which cost time, and the
products that secateur skips (what follows the last input that a statistics pass needs, and the second pass of the last
block), which save some.

    python benchmarks/wanda_speed.py --width192-only    about two minutes on two cores
    python benchmarks/wanda_speed.py                    about half an hour
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Shape, matrix_rate, table, write_ids, write_llama
from _plain import block_inputs, differing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from secateur.core.timing import Stopwatch
from secateur.prune.run import prune
from secateur.requests import Request

SHAPES = {
    "width 192": Shape(hidden=192, ffn=512, heads=6, kv_heads=2, vocab=2048, blocks=6, dtype="float32"),
    "100M": Shape(hidden=768, ffn=2048, heads=12, kv_heads=12, vocab=8192, blocks=12, dtype="float32"),
}
PATTERNS = ("unstructured", "2:4")
SPARSITY = 0.5
PARTS = ("forward", "statistics", "selection", "files", "text", "other")
WORK = ("forward", "statistics", "selection")
TARGETS = {"unstructured": {"selection": 5.0}, "2:4": {"selection": 10.0}}
END_TO_END = {"width 192": 2.0, "100M": 1.0}
FORWARD_OVER_FLOOR = 1.3
DIFFERING = 1e-3  # of the entries: rounding decides near-ties

Times = dict[str, float]


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="wanda-speed-"))
    try:
        results = [
            result for name in options.models for result in _model(folder / name.replace(" ", "-"), name, options)
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {
                "benchmark": "wanda_speed",
                "threads": torch.get_num_threads(),
                "tokens": options.samples * options.seqlen,
                "results": results,
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default 128)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--attention",
        choices=["sdpa", "eager"],
        default="sdpa",
        help="of the straightforward side; the authors' code has eager attention",
    )
    parser.add_argument("--width192-only", action="store_true", help="the small model alone")
    options = parser.parse_args()
    if options.width192_only:
        options.models = ["width 192"]
    return options


def _model(folder: Path, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all patterns on one model."""
    shape, ids, few = SHAPES[name], folder / "ids.npy", folder / "few.npy"
    write_llama(folder / "model", shape)
    write_ids(ids, options.samples, options.seqlen, shape.vocab)
    write_ids(few, 2, options.seqlen, shape.vocab)
    results = []
    theirs_wanda = partial(plain_wanda, attention=options.attention)
    for pattern in options.patterns:
        for side in (secateur_wanda, theirs_wanda):
            side(folder / "model", few, folder / "few", pattern)  # the first call of a process is slower
        ours, theirs, rates = [], [], []
        for _ in range(options.repeats):
            rates.append(matrix_rate())
            ours.append(_timed(partial(secateur_wanda, folder / "model", ids, folder / "ours", pattern)))
            theirs.append(_timed(partial(theirs_wanda, folder / "model", ids, folder / "theirs", pattern)))
        different = differing(folder / "ours", folder / "theirs", shape)
        result = _summary(
            name, pattern, shape, options, _medians(ours), _medians(theirs), statistics.median(rates), different
        )
        _print(result)
        results.append(result)
    shutil.rmtree(folder)
    return results


def _timed(run: Callable[[], Times]) -> Times:
    started = time.perf_counter()
    times = run()
    total = time.perf_counter() - started
    named = {part: times.get(part, 0.0) for part in PARTS[:-1]}
    return {**named, "other": total - sum(named.values()), "total": total, "work": sum(named[part] for part in WORK)}


def _medians(runs: list[Times]) -> Times:
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def secateur_wanda(model: Path, ids: Path, out: Path, pattern: str) -> Times:
    request = Request(
        model=str(model),
        method="wanda",
        sparsity=SPARSITY if pattern == "unstructured" else None,
        pattern=pattern,
        calibration=str(ids),
        device="cpu",
    )
    times: Times = prune(request, out, overwrite=True)["seconds_by"]
    return times


@torch.no_grad()
def plain_wanda(folder: Path, ids: Path, out: Path, pattern: str, attention: str = "sdpa") -> Times:
    watch = Stopwatch()
    with watch("files"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with watch("text"):
        windows = torch.from_numpy(np.load(ids))
    model.config.use_cache = False
    with watch("forward"):
        inputs, arguments = block_inputs(model, windows)
        outputs = torch.zeros_like(inputs)
    for block in model.model.layers:
        linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        means = {path: _MeanSquare(linear.in_features) for path, linear in linears.items()}
        hooks = [linears[path].register_forward_hook(_hook(mean, watch)) for path, mean in means.items()]
        with watch("forward"):
            for i in range(len(inputs)):
                outputs[i] = block(inputs[i : i + 1], **arguments)[0]
        for hook in hooks:
            hook.remove()
        with watch("selection"):
            for path, linear in linears.items():
                score = linear.weight.abs() * means[path].value.sqrt()
                linear.weight.data[_removed(score, pattern)] = 0
        with watch("forward"):
            for i in range(len(inputs)):
                outputs[i] = block(inputs[i : i + 1], **arguments)[0]
        inputs, outputs = outputs, inputs
    with watch("files"):
        model.save_pretrained(out)
    return watch.seconds


class _MeanSquare:
    """The running mean over windows of the squared norm of every input."""

    def __init__(self, inputs: int) -> None:
        self.value, self.windows = torch.zeros(inputs), 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).t().to(torch.float32)
        self.value *= self.windows / (self.windows + 1)
        self.windows += 1
        self.value += torch.norm(x, p=2, dim=1) ** 2 / self.windows


def _hook(mean: _MeanSquare, watch: Stopwatch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def listen(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        with watch("statistics"):
            mean.add(inputs[0].data)

    return listen


def _removed(score: Tensor, pattern: str) -> Tensor:
    """The mask of the weights that go."""
    removed = torch.zeros_like(score, dtype=torch.bool)
    if pattern == "unstructured":
        order = torch.sort(score, dim=-1, stable=True).indices
        return removed.scatter_(1, order[:, : int(score.shape[1] * SPARSITY)], True)
    keep, group = (int(number) for number in pattern.split(":"))
    for start in range(0, score.shape[1], group):
        lowest = torch.topk(score[:, start : start + group], group - keep, dim=1, largest=False).indices
        removed.scatter_(1, start + lowest, True)
    return removed


def _summary(
    name: str,
    pattern: str,
    shape: Shape,
    options: argparse.Namespace,
    ours: Times,
    theirs: Times,
    rate: float,
    different: float,
) -> dict[str, Any]:
    flop = 2 * 2 * shape.blocks * shape.block_parameters * options.samples * options.seqlen
    # of the two passes: statistics stop before `down`, and nothing needs the output of the last block
    outputs, inputs = shape.block_matrices["mlp.down_proj"]
    done = flop * (1 - outputs * inputs / shape.block_parameters / 2 - 1 / shape.blocks / 2)
    return {
        "model": name,
        "pattern": pattern,
        "attention_of_straightforward": options.attention,
        "parameters": shape.parameters,
        "repeats": options.repeats,
        "secateur": _rounded(ours),
        "straightforward": _rounded(theirs),
        "ratio": _rounded({part: theirs[part] / ours[part] for part in (*WORK, "files", "total", "work")}),
        "gflops": round(rate / 1e9, 1),
        "floor_seconds": round(flop / rate, 3),
        "forward_over_floor": round(ours["forward"] / (flop / rate), 3),
        "forward_over_own_products": round(ours["forward"] / (done / rate), 3),
        "straightforward_over_floor": round(theirs["forward"] / (flop / rate), 3),
        "differing": different,
    }


def _rounded(times: Times) -> Times:
    return {name: round(value, 4) for name, value in times.items()}


def _print(result: dict[str, Any]) -> None:
    ours, theirs, ratio = result["secateur"], result["straightforward"], result["ratio"]
    wanted = {**TARGETS[result["pattern"]], "total": END_TO_END[result["model"]]}
    print(
        f"\n{result['model']} ({result['parameters'] / 1e6:.1f}M parameters), {result['pattern']}: seconds, medians "
        f"of {result['repeats']}"
    )

    def row(label: str, part: str) -> tuple[str, ...]:
        times = f"{ratio[part]:.2f}x" if part in ratio else ""
        return (
            label,
            f"{ours[part]:.3f}",
            f"{theirs[part]:.3f}",
            times,
            _verdict(ratio[part] >= wanted[part], f">= {wanted[part]:g}x") if part in wanted else "",
        )

    rows = [row(part, part) for part in PARTS] + [
        row("end to end", "total"),
        row("  without text, files, other", "work"),
    ]
    table(("", "secateur", "straightforward", "ratio", "target"), rows)
    over = result["forward_over_floor"]
    print(
        f"  forward: floor {result['floor_seconds']:.3f} s at {result['gflops']:.0f} GFLOP/s; {over:.2f} x the "
        f"floor, target <= {FORWARD_OVER_FLOOR}",
        end="",
    )
    print(
        f" {'met' if over <= FORWARD_OVER_FLOOR else 'MISSED'} (straightforward "
        f"{result['straightforward_over_floor']:.2f} x;"
    )
    print(f"    secateur against the products it does not skip: {result['forward_over_own_products']:.2f} x)")
    same = result["differing"]
    print(
        f"  zero patterns differ in {same:.5%} of the entries, target < {DIFFERING:.1%} "
        f"{'met' if same < DIFFERING else 'MISSED'}",
        flush=True,
    )


def _verdict(met: bool, target: str) -> str:
    return f"{target} {'met' if met else 'MISSED'}"


if __name__ == "__main__":
    main()
