"""How fast DISP-LLM learns here, beside a straightforward implementation of the authors' procedure, and how much memory
it takes.

Both learn the gates of the same random LLaMA (6 blocks of width 192) on the same random token ids, 4 windows of 256
tokens a step, on CPU in float32, and take turns step by step; with equal gates both must give the same loss. Figures
are the smallest of all steps, or their median.

The straightforward implementation does what the authors' code is described to do (arXiv:2410.11988 and its public
repository): every step walks all modules to set masks, attention is eager, the logits of the whole batch are held in
float32, the hypernetwork runs a second time for the budget's own draw, the mask of the MLP's middle multiplies both of
its factors, AdamW steps parameter by parameter.

The floor of the time: the tokens forward through the matrices of blocks and head and backward to their inputs (weights
are frozen), at the rate at which this machine multiplies [2048, 1024] by [1024, 1024] in float32. It leaves out
attention's own products, norms, activations and the hypernetwork.

Memory, each in a process of its own, at 16 windows a step: the peak of what torch has allocated (exact; the weights,
mapped from their file, are added), and the peak of the resident set above that after imports, with what allocators and
libraries of products hold besides. The floor: the weights, what one block keeps for the way back (measured: hooks on
saved tensors), and the float32 logits of one chunk of positions. Beside it what learning with checkpointing cannot do
without: the inputs of the other blocks, the hypernetwork with its gradients and two moments, and the gradient that
comes to and the one that leaves the widest activation.

    python benchmarks/disp_llm_speed.py            about two minutes on one core
    python benchmarks/disp_llm_speed.py --quick    seconds: to see that it runs
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import Shape, matrix_rate, table, write_llama

SHAPE = Shape(hidden=192, ffn=512, heads=6, kv_heads=2, vocab=2048, blocks=6, dtype="float32")
SEQLEN, BATCH, MEMORY_BATCH = 256, 4, 16
SPARSITY = 0.5
OURS, AGAIN, PLAIN, WRITE = "secateur", "secateur, checkpointing", "straightforward", "write"
AIM = 1.25
AGREE = 1e-4  # relative, of the loss
MEGA = 1e6


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="disp-llm-speed-"))
    try:
        _child(WRITE, folder)
        memory = {side: _child(side, folder) for side in (OURS, AGAIN, PLAIN)}  # first: this process must stay small
        result = _speed(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= _memory(memory)
    _print(result)
    print(json.dumps({"benchmark": "disp_llm_speed", "quick": options.quick, **result}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="steps of each side (default 20)")
    parser.add_argument("--quick", action="store_true", help="two steps of each side")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the processor's time instead of the clock's: on a busy machine, with one thread",
    )
    parser.add_argument("--median", action="store_true", help="report medians instead of minima")
    parser.add_argument("--child", choices=(OURS, AGAIN, PLAIN, WRITE), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _measure_memory(options.child, options.folder)
        raise SystemExit
    if options.quick:
        options.repeats = 2
    return options


def _speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    sides = {side: _make(side, folder, BATCH) for side in (OURS, AGAIN, PLAIN)}
    clock = time.process_time if options.processor_time else time.perf_counter
    difference = _difference(sides[OURS], sides[PLAIN])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    rates = []
    for step in range(1, options.repeats + 2):
        rates.append(matrix_rate(0.2))
        for name, side in sides.items():
            started = clock()
            side.step(step)
            seconds[name].append(clock() - started)
    figure = statistics.median if options.median else min
    found = {name: figure(times[1:]) for name, times in seconds.items()}  # the first step of a process is slower
    rate = statistics.median(rates) if options.median else max(rates)
    products = BATCH * SEQLEN * (SHAPE.blocks * SHAPE.block_parameters + SHAPE.vocab * SHAPE.hidden)
    floor = 2 * 2 * products / rate
    return {
        "parameters": SHAPE.parameters,
        "tokens": BATCH * SEQLEN,
        "threads": torch.get_num_threads(),
        "steps": options.repeats,
        "clock": "processor" if options.processor_time else "wall",
        "figure": "median" if options.median else "minimum",
        "seconds": {name: round(value, 4) for name, value in found.items()},
        "steps_a_second": {name: round(1 / value, 3) for name, value in found.items()},
        "ratio": round(found[PLAIN] / found[OURS], 3),
        "ratio_of_medians": round(statistics.median(seconds[PLAIN][1:]) / statistics.median(seconds[OURS][1:]), 3),
        "met": found[PLAIN] / found[OURS] >= AIM,
        "gflops": round(rate / 1e9, 1),
        "floor_seconds": round(floor, 4),
        "over_floor": {name: round(value / floor, 3) for name, value in found.items()},
        "difference": difference,
    }


def _make(side: str, folder: Path, batch: int) -> Any:
    return PlainDispLLM(folder, batch) if side == PLAIN else make_learner(folder, batch, checkpointing=side == AGAIN)


def make_learner(folder: Path, batch: int, *, checkpointing: bool) -> Any:
    """The learner with the default options of `disp_llm`, except for the windows of a step."""
    import torch

    from secateur.methods.disp_llm.hypernetwork import Hypernetwork
    from secateur.methods.disp_llm.learning import Learner, Learning
    from secateur.methods.disp_llm.masked import MaskedModel
    from secateur.models.load import open_checkpoint
    from secateur.models.runtime import NORM_FIRST
    from secateur.plan.structures import find_structures

    view = open_checkpoint(str(folder)).view()
    structures = find_structures(view, constrained=False, form=NORM_FIRST, whole=True)
    masked = MaskedModel(
        view, structures, NORM_FIRST, device=torch.device("cpu"), dtype=torch.float32, checkpointing=checkpointing
    )
    how = Learning(
        steps=1,
        batch=batch,
        lr=1e-3,
        weight_decay=0.05,
        strength=6.0,
        gate="reinmax",
        bias=3.0,
        temperature=1.0,
        seed=0,
    )
    return Learner(Hypernetwork(structures.widths), masked, _ids(batch), (1 - SPARSITY) * structures.total, how, None)


def _ids(batch: int) -> Any:
    import torch

    return torch.randint(0, SHAPE.vocab, (batch, SEQLEN), generator=torch.Generator().manual_seed(0))


class PlainDispLLM:
    """The authors' loop, on stock modules."""

    def __init__(self, folder: Path, batch: int) -> None:
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        from secateur.methods.disp_llm.hypernetwork import Hypernetwork

        class Masked(nn.Module):
            """A module whose output is multiplied by a mask."""

            mask: Any

            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Any) -> Any:
                return self.inner(x) * self.mask

        self.kind, self.windows = Masked, _ids(batch)
        self.model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            .eval()
            .requires_grad_(False)
        )
        for block in self.model.model.layers:
            block.input_layernorm, block.post_attention_layernorm = (
                Masked(block.input_layernorm),
                Masked(block.post_attention_layernorm),
            )
            block.self_attn.o_proj, block.mlp.down_proj = Masked(block.self_attn.o_proj), Masked(block.mlp.down_proj)
            block.mlp.gate_proj, block.mlp.up_proj = Masked(block.mlp.gate_proj), Masked(block.mlp.up_proj)
        hidden, ffn = SHAPE.hidden, SHAPE.ffn
        self.widths = [width for _ in range(SHAPE.blocks) for width in (hidden, hidden, hidden, ffn, hidden)]
        self.network = Hypernetwork(self.widths)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=0.05)

    def step(self, _: int) -> None:
        import torch

        self._set(self._draw())
        loss = self.loss(self.windows)
        budget = torch.log(self._left(self._draw()) / ((1 - SPARSITY) * SHAPE.parameters)).abs()
        self.optimizer.zero_grad()
        (loss + 16 * budget).backward()
        self.optimizer.step()

    def loss(self, ids: Any) -> Any:
        from torch.nn.functional import cross_entropy

        logits = self.model(ids, use_cache=False).logits.float()
        return cross_entropy(logits[:, :-1].reshape(-1, SHAPE.vocab), ids[:, 1:].reshape(-1))

    def _draw(self) -> list[Any]:
        import torch

        logits = self.network()
        gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
        return list(torch.sigmoid((logits + gumbel + 3) / 0.4).split(self.widths))

    def _set(self, gates: list[Any]) -> None:
        names = {
            "input_layernorm": 0,
            "o_proj": 1,
            "post_attention_layernorm": 2,
            "gate_proj": 3,
            "up_proj": 3,
            "down_proj": 4,
        }
        for name, module in self.model.named_modules():
            if isinstance(module, self.kind):
                _, _, block, *_, last = name.split(".")
                module.mask = gates[5 * int(block) + names[last]]

    def _left(self, gates: list[Any]) -> Any:
        left = float(SHAPE.parameters - SHAPE.blocks * SHAPE.block_parameters)
        inner, keys = SHAPE.hidden, SHAPE.hidden // SHAPE.heads * SHAPE.kv_heads
        for start in range(0, len(gates), 5):
            s1, s2, s3, s4, s5 = (gate.sum() for gate in gates[start : start + 5])
            left = left + s1 * (inner + 2 * keys) + s2 * inner + 2 * s3 * s4 + s4 * s5
        return left


def _difference(ours: Any, plain: PlainDispLLM) -> float:
    """The relative difference of the losses with the same random gates."""
    import torch

    gates = (torch.rand(sum(plain.widths), generator=torch.Generator().manual_seed(1)) < 0.7).float()
    ids = plain.windows[:1]
    with torch.no_grad():
        plain._set(list(gates.split(plain.widths)))
        one, two = float(ours.masked.loss(ids, gates)), float(plain.loss(ids))
    difference = abs(one - two) / two
    assert difference < AGREE, f"with equal gates the losses are {one} and {two}"
    return difference


def _child(side: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder)]
    found: dict[str, int] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )
    return found


def _measure_memory(side: str, folder: Path) -> None:
    if side == WRITE:
        write_llama(folder, SHAPE)
        print("{}")
        return
    import torch
    import torch._dynamo  # which the first step of an optimiser imports
    import transformers.models.llama.modeling_llama  # noqa: F401  # imports are no part of the figure

    import secateur.methods.disp_llm.learning  # noqa: F401  # nor are these
    from secateur.core.records import peak_rss_bytes

    torch.randn(512, 512) @ torch.randn(512, 512)  # what the libraries of products set up for themselves
    baseline = peak_rss_bytes()
    learner = _make(side, folder, MEMORY_BATCH)
    for step in (1, 2):
        learner.step(step)
    found = {"resident": peak_rss_bytes() - baseline}
    del learner
    found["allocated"] = 4 * SHAPE.parameters + _allocated(lambda: _make(side, folder, MEMORY_BATCH))
    if side == OURS:
        found |= _parts(_make(side, folder, MEMORY_BATCH))
    print(json.dumps(found))


def _allocated(make: Callable[[], Any]) -> int:
    """The most that torch has allocated at a time, from the making to the end of the second step, in bytes; mapped
    files are not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            learner = make()
            for step in (1, 2):
                learner.step(step)
        profiled.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text("utf-8"))["traceEvents"]
    totals = [
        event["args"]["Total Allocated"]
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    ]
    return int(max(totals) - totals[0])


def _parts(learner: Any) -> dict[str, int]:
    """The parts of the floor, in bytes."""
    import torch

    from secateur.models.loss import TRAINED_POSITIONS, positions_a_chunk

    masked = learner.masked
    block = masked.model.model.layers[1]
    weights = {p.data_ptr() for p in masked.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    contexts: list[Any] = []

    def enter(*_: Any) -> None:
        contexts.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        contexts[-1].__enter__()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(lambda *_: contexts.pop().__exit__(None, None, None))
    gates = torch.ones(sum(masked.structures.widths), requires_grad=True)
    masked.loss(learner.windows.long(), gates)
    positions = min(MEMORY_BATCH * (SEQLEN - 1), positions_a_chunk(SHAPE.vocab), TRAINED_POSITIONS)
    return {
        "weights": 4 * SHAPE.parameters,
        "block": sum(kept.values()),
        "logits": 4 * SHAPE.vocab * positions,
        "inputs": 4 * (SHAPE.blocks - 1) * MEMORY_BATCH * SEQLEN * SHAPE.hidden,
        "gradients": 2 * 4 * MEMORY_BATCH * SEQLEN * SHAPE.ffn,
        "network": 4 * 4 * sum(p.numel() for p in learner.network.parameters()),
    }


def _memory(found: dict[str, dict[str, int]]) -> dict[str, Any]:
    ours = found[OURS]
    parts = {name: ours[name] for name in ("weights", "block", "logits", "inputs", "network", "gradients")}
    floor = parts["weights"] + parts["block"] + parts["logits"]
    needed = sum(parts.values())
    allocated, resident = (
        {side: measured[name] for side, measured in found.items()} for name in ("allocated", "resident")
    )
    return {
        "memory_tokens": MEMORY_BATCH * SEQLEN,
        "memory_parts": parts,
        "memory_floor": floor,
        "memory_needed": needed,
        "memory_allocated": allocated,
        "memory_resident": resident,
        "memory_over_floor": {side: round(peak / floor, 3) for side, peak in allocated.items()},
        "memory_met": allocated[AGAIN] <= floor,
        "memory_over_needed": round(allocated[AGAIN] / needed, 3),
    }


def _print(result: dict[str, Any]) -> None:
    print(
        f"\n{result['parameters'] / 1e6:.1f}M parameters, {result['tokens']} tokens a step, {result['threads']} "
        "thread(s), ",
        end="",
    )
    print(f"{result['figure']} of {result['steps']} steps of each side, taking turns, {result['clock']} time")
    seconds, rates, over = result["seconds"], result["steps_a_second"], result["over_floor"]
    rows = [
        (side, f"{seconds[side]:.3f}", f"{rates[side]:.2f}", f"{over[side]:.2f}", "") for side in (OURS, AGAIN, PLAIN)
    ]
    rows.append(("floor", f"{result['floor_seconds']:.3f}", "", "", f"at {result['gflops']:.0f} GFLOP/s"))
    table(("", "seconds a step", "steps a second", "of the floor", ""), rows)
    verdict = "met" if result["met"] else "MISSED"
    print(
        f"  {result['ratio']:.2f}x the steps per second of the straightforward implementation (medians "
        f"{result['ratio_of_medians']:.2f}x); ",
        end="",
    )
    print(f">= {AIM:g}x {verdict}; with equal gates the losses differ by {result['difference']:.1e}")
    parts, allocated, resident = result["memory_parts"], result["memory_allocated"], result["memory_resident"]
    print(f"\npeak of memory, {result['memory_tokens']} tokens a step, MB (10^6 bytes)")
    rows = [
        (
            side,
            f"{allocated[side] / MEGA:.1f}",
            f"{result['memory_over_floor'][side]:.2f}",
            f"{resident[side] / MEGA:.1f}",
            "",
        )
        for side in allocated
    ]
    floor = ", ".join(f"{name} {parts[name] / MEGA:.1f}" for name in ("weights", "block", "logits"))
    rows.append(("floor", f"{result['memory_floor'] / MEGA:.1f}", "", "", floor))
    more = ", ".join(f"{name} {parts[name] / MEGA:.1f}" for name in ("inputs", "network", "gradients"))
    rows.append(("needed", f"{result['memory_needed'] / MEGA:.1f}", "", "", f"and {more}"))
    table(("", "allocated", "of the floor", "resident", ""), rows)
    verdict = "met" if result["memory_met"] else "MISSED"
    print(f"  checkpointing: the floor {verdict}, {result['memory_over_needed']:.2f} of what is needed")


if __name__ == "__main__":
    main()
