"""How fast SparseGPT is here, beside a straightforward implementation of the published procedure and beside the
machine's own limit.

Both prune the same random LLaMA on the same random token ids, on CPU in float32. They take turns; figures are the
smallest of all runs. Two models: 6 blocks of width 192 on 128 x 256 tokens, and 4 blocks of width 768 on 16 x 256.

The straightforward implementation follows arXiv:2301.00774, algorithm 1: the whole model in memory, one window at a
time; in each block one pass with a running Hessian 2 X X^T in float32 at every linear module (seven a block), then for
each module Cholesky, inverse, Cholesky of the inverse, and the loop over all columns in lazy blocks of 128; and a
second pass for the inputs of the next block. It runs with eager attention, which is what the authors' code had, or with
the fused attention (sdpa) that secateur runs: `--attention`, both by default.

The floor: two passes of all tokens through the block matrices, and one second moment [I, I] for each of the four
distinct inputs of a block, at the rate at which this machine multiplies [2048, 1024] by [1024, 1024]. It leaves out
attention, norms, activations, the solve and files; secateur skips some of the products (what follows the last input
that a statistics pass needs, the second pass of the last block, three eighths of a second moment).

The results are not the same to the bit: the published threshold removes one weight more of each block of columns,
float32 Hessians are less exact, and what differs in one block is carried on. The fraction of entries that are zero in
one result alone is printed.

`--clock cpu` takes the processor time of one thread, which a busy machine disturbs less.

    python benchmarks/sparsegpt_speed.py --models "width 192" --patterns unstructured     about three minutes
    python benchmarks/sparsegpt_speed.py                                                  about twenty
"""

from __future__ import annotations

import argparse
import json
import shutil
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
    "width 768": Shape(hidden=768, ffn=2048, heads=12, kv_heads=12, vocab=8192, blocks=4, dtype="float32"),
}
SAMPLES = {"width 192": 128, "width 768": 16}
PATTERNS = ("unstructured", "2:4")
SPARSITY, DAMPING, LAZY = 0.5, 0.01, 128
PARTS = ("forward", "statistics", "solve", "files", "text", "other")
END_TO_END = {"width 192": 2.0, "width 768": 1.0}
OURS = {"selection": "solve"}  # what the package calls it

Times = dict[str, float]


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    if options.clock == "cpu":
        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # of both sides, the package's own stopwatch too
    folder = Path(tempfile.mkdtemp(prefix="sparsegpt-speed-"))
    try:
        results = [
            result for name in options.models for result in _model(folder / name.replace(" ", "-"), name, options)
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = {
        "benchmark": "sparsegpt_speed",
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "seqlen": options.seqlen,
    }
    print(json.dumps({**about, "results": results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--samples", type=int, help="calibration windows (default 128, and 16 at width 768)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=["eager", "sdpa"],
        default=["eager", "sdpa"],
        help="of the straightforward side",
    )
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    return parser.parse_args()


def _model(folder: Path, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all patterns on one model."""
    shape, ids, few = SHAPES[name], folder / "ids.npy", folder / "few.npy"
    samples = options.samples or SAMPLES[name]
    write_llama(folder / "model", shape)
    write_ids(ids, samples, options.seqlen, shape.vocab)
    write_ids(few, 2, options.seqlen, shape.vocab)
    results = []
    for pattern in options.patterns:
        sides: dict[str, Callable[..., Times]] = {"secateur": partial(secateur_sparsegpt, pattern=pattern)}
        sides |= {
            attention: partial(plain_sparsegpt, pattern=pattern, attention=attention) for attention in options.attention
        }
        runs: dict[str, list[Times]] = {side: [] for side in sides}
        rates = []
        for side, run in sides.items():
            run(folder / "model", few, folder / side)  # the first call of a process is slower
        for _ in range(options.repeats):
            rates.append(matrix_rate())
            for side, run in sides.items():
                runs[side].append(_timed(partial(run, folder / "model", ids, folder / side)))
        apart = differing(folder / "secateur", folder / options.attention[-1], shape)
        best = {side: min(times, key=lambda t: t["total"]) for side, times in runs.items()}
        results.append(_summary(name, pattern, shape, samples * options.seqlen, options, best, max(rates), apart))
        _print(results[-1])
    shutil.rmtree(folder)
    return results


def _timed(run: Callable[[], Times]) -> Times:
    started = time.perf_counter()
    times = {OURS.get(part, part): seconds for part, seconds in run().items()}
    total = time.perf_counter() - started
    named = {part: times.get(part, 0.0) for part in PARTS[:-1]}
    return {**named, "other": total - sum(named.values()), "total": total}


def secateur_sparsegpt(model: Path, ids: Path, out: Path, pattern: str) -> Times:
    sparsity = SPARSITY if pattern == "unstructured" else None
    request = Request(str(model), "sparsegpt", sparsity=sparsity, pattern=pattern, calibration=str(ids), device="cpu")
    times: Times = prune(request, out, overwrite=True)["seconds_by"]
    return times


@torch.no_grad()
def plain_sparsegpt(folder: Path, ids: Path, out: Path, pattern: str, attention: str) -> Times:
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
        hessians = {path: _Hessian(linear.in_features) for path, linear in linears.items()}
        hooks = [linears[path].register_forward_hook(_hook(hessian, watch)) for path, hessian in hessians.items()]
        with watch("forward"):
            for i in range(len(inputs)):
                outputs[i] = block(inputs[i : i + 1], **arguments)[0]
        for hook in hooks:
            hook.remove()
        with watch("solve"):
            for path, linear in linears.items():
                linear.weight.data = _pruned(linear.weight.data.clone(), hessians[path].value, pattern)
        with watch("forward"):
            for i in range(len(inputs)):
                outputs[i] = block(inputs[i : i + 1], **arguments)[0]
        inputs, outputs = outputs, inputs
    with watch("files"):
        model.save_pretrained(out)
    return watch.seconds


class _Hessian:
    """The running mean over windows of 2 X X^T."""

    def __init__(self, inputs: int) -> None:
        self.value, self.windows = torch.zeros(inputs, inputs), 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).t()
        self.value *= self.windows / (self.windows + 1)
        self.windows += 1
        x = (2 / self.windows) ** 0.5 * x.float()
        self.value += x @ x.t()


def _hook(hessian: _Hessian, watch: Stopwatch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def listen(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        with watch("statistics"):
            hessian.add(inputs[0].data)

    return listen


def _pruned(weight: Tensor, hessian: Tensor, pattern: str) -> Tensor:
    """Algorithm 1, one column at a time."""
    inputs = weight.shape[1]
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPING * torch.mean(torch.diag(hessian)))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for first in range(0, inputs, LAZY):
        last = min(first + LAZY, inputs)
        now, errors = weight[:, first:last].clone(), torch.zeros_like(weight[:, first:last])
        after, factor = torch.zeros_like(now), inverse[first:last, first:last]
        gone = torch.zeros_like(now, dtype=torch.bool)
        if pattern == "unstructured":
            cost = now**2 / torch.diag(factor).reshape(1, -1) ** 2
            gone = cost <= torch.sort(cost.flatten())[0][int(cost.numel() * SPARSITY)]
        for j in range(last - first):
            column, pivot = now[:, j], factor[j, j]
            if pattern != "unstructured" and j % 4 == 0:
                cost = now[:, j : j + 4] ** 2 / torch.diag(factor)[j : j + 4].reshape(1, -1) ** 2
                gone.scatter_(1, j + torch.topk(cost, 2, dim=1, largest=False)[1], True)
            kept = column.clone()
            kept[gone[:, j]] = 0
            after[:, j] = kept
            error = (column - kept) / pivot
            now[:, j:] -= error.unsqueeze(1).matmul(factor[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, first:last] = after
        weight[:, last:] -= errors.matmul(inverse[first:last, last:])
    return weight


def _summary(
    name: str,
    pattern: str,
    shape: Shape,
    tokens: int,
    options: argparse.Namespace,
    best: dict[str, Times],
    rate: float,
    apart: float,
) -> dict[str, Any]:
    matrices = 2 * 2 * shape.blocks * shape.block_parameters * tokens
    moments = 2 * shape.blocks * (3 * shape.hidden**2 + shape.ffn**2) * tokens
    ours = best.pop("secateur")
    return {
        "model": name,
        "pattern": pattern,
        "parameters": shape.parameters,
        "tokens": tokens,
        "repeats": options.repeats,
        "secateur": _rounded(ours),
        "straightforward": {attention: _rounded(times) for attention, times in best.items()},
        "ratio": {
            attention: _rounded({part: times[part] / ours[part] for part in (*PARTS[:4], "total")})
            for attention, times in best.items()
        },
        "gflops": round(rate / 1e9, 1),
        "floor_seconds": _rounded({"forward": matrices / rate, "statistics": moments / rate}),
        "differing": apart,
    }


def _rounded(times: Times) -> Times:
    return {name: round(value, 4) for name, value in times.items()}


def _print(result: dict[str, Any]) -> None:
    ours, theirs, ratio, floor = result["secateur"], result["straightforward"], result["ratio"], result["floor_seconds"]
    wanted = END_TO_END[result["model"]]
    print(
        f"\n{result['model']} ({result['parameters'] / 1e6:.1f}M parameters), {result['pattern']}, "
        f"{result['tokens']:,} tokens: ",
        end="",
    )
    print(f"seconds, minimum of {result['repeats']}")

    def row(label: str, part: str) -> tuple[str, ...]:
        against = [
            cell
            for a in theirs
            for cell in (f"{theirs[a][part]:.3f}", f"{ratio[a][part]:.2f}x" if part in ratio[a] else "")
        ]
        met = ", ".join(f"{a} {'met' if ratio[a]['total'] >= wanted else 'MISSED'}" for a in theirs)
        limit = f"{floor[part]:.3f}" if part in floor else ""
        return (label, f"{ours[part]:.3f}", limit, *against, f">= {wanted:g}x: {met}" if part == "total" else "")

    header = ("", "secateur", "floor", *(cell for attention in theirs for cell in (attention, "ratio")), "target")
    table(header, [*(row(part, part) for part in PARTS), row("end to end", "total")])
    print(
        f"  the floor is at {result['gflops']:.0f} GFLOP/s; zero patterns differ in {result['differing']:.3%} of the "
        "entries",
        flush=True,
    )


if __name__ == "__main__":
    main()
