"""What selecting costs at inference: a dense LLaMA-like model, the same with half of its parameters gone by DISP-LLM,
and a dense model of that size as the floor.

Random weights and random selections (gates ranked by random logits, through the same choice and cut as learned ones),
so that no structure in what is selected helps. Beside them the same widths with contiguous selections, which is the
most that any order of the residual could bring, and the random ones read and written as plain PyTorch does it
(`index_select` after a whole norm, `index_add` with int32 maps). All take turns in one process on the same prompts; the
best times count.

The vocabulary is small, so that embeddings and head have about the share of the parameters that they have in a model of
7 billion.

    python benchmarks/decode_speed.py             a few minutes on two cores, 4 GB of memory
    python benchmarks/decode_speed.py --threads 1 processor time of one thread, which a busy machine disturbs less
    python benchmarks/decode_speed.py --small     seconds: to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from _common import table
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from secateur import api
from secateur.core.machine import Machine
from secateur.evaluate.throughput import Speed, Work, measure_speed
from secateur.methods.disp_llm.choose import choose
from secateur.models.runtime import NORM_FIRST, PartNorm, Select
from secateur.plan.plan import BlockPlan, Plan
from secateur.plan.structures import find_structures

CPU = torch.device("cpu")
REMOVED = 0.5
DECODE_OVER_DENSE = 1.5  # at batch 1, of a model with half of the parameters


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    models, machine = (
        _models(options),
        Machine(CPU, torch.float32, clock=time.process_time if options.threads == 1 else time.perf_counter),
    )
    parts = _parts(models, options)
    speeds = {}
    for batch in options.batches:
        ids_BT = torch.randint(
            options.vocab, (batch, options.tokens // batch), generator=torch.Generator().manual_seed(1)
        )
        speeds[batch] = measure_speed(models, ids_BT, options.new, range(options.repeats), machine)
    rates = machine.flops_per_second, machine.bytes_per_second
    print(
        f"width {options.hidden}, {options.blocks} blocks, float32, {options.threads} threads: {rates[0] / 1e9:.0f} "
        f"GFLOP/s, {rates[1] / 1e9:.1f} GB/s"
    )
    results = [row for batch, speed in speeds.items() for row in _compared(models, batch, speed, options, machine)]
    met = next(row["decode_over_dense"] for row in results if row["model"] == "selected") >= DECODE_OVER_DENSE
    facts = {
        "flops_per_second": rates[0],
        "bytes_per_second": rates[1],
        "decode_over_dense_aim": DECODE_OVER_DENSE,
        "met": met,
    }
    print(json.dumps({"benchmark": "decode_speed", **vars(options), **facts, "parts": parts, "results": results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--round", type=int, default=1, help="widths are multiples of this (default 1: any width)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of all prompts of a batch together (default 256)"
    )
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=4, help="turns of each model (default 4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        options.hidden, options.ffn, options.heads, options.blocks, options.vocab = 256, 704, 4, 2, 256
        options.tokens, options.new, options.repeats = 32, 4, 2
    return options


def _models(options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """The models by name, the dense one first."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        num_hidden_layers=options.blocks,
        vocab_size=options.vocab,
        max_position_embeddings=2048,
    )
    dense = AutoModelForCausalLM.from_config(config).eval()
    plan = _random_plan(dense, options.round)
    selected = api.cut(dense, plan)
    left = {
        name: sum(p.numel() for p in model.parameters()) for name, model in (("dense", dense), ("selected", selected))
    }
    assert abs(1 - left["selected"] / left["dense"] - REMOVED) < 0.02, left
    plain = copy.deepcopy(
        selected, {id(parameter): parameter for parameter in selected.parameters()}
    )  # shares the weights
    for block in plain.model.layers:
        block.skips = nn.ModuleList(_PlainSelect(skip) for skip in block.skips)
    return {
        "dense": dense,
        "selected": selected,
        "contiguous": api.cut(dense, _contiguous(plan)),
        "plain": plain,
        "floor": _dense_of(config, left["selected"]),
    }


def _random_plan(dense: PreTrainedModel, multiple: int) -> Plan:
    """A plan that removes half of the parameters, those with the lowest random logits."""
    view = api.view_model(dense)
    structures = find_structures(view, constrained=False, form=NORM_FIRST, whole=True)
    # each selection leans its own way, so that widths differ from block to block as they do after learning
    logit_N = torch.cat([torch.randn(width) + 0.3 * torch.randn(1) for width in structures.widths])
    keep = choose(logit_N, structures, target=(1 - REMOVED) * structures.total, multiple=multiple, half=False)
    blocks = [
        BlockPlan(
            n,
            keep={s: keep[i].clone() for s, i in uses.items()},
            of={s: structures.widths[i] for s, i in uses.items()},
            select=NORM_FIRST,
        )
        for n, uses in enumerate(structures.uses)
    ]
    return Plan({}, tuple(blocks))


def _contiguous(plan: Plan) -> Plan:
    """The same widths, each a run of neighbours."""

    def run(count: int, of: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32) + (of - count) // 2

    return Plan(
        {},
        tuple(
            BlockPlan(
                b.index, keep={s: run(len(kept), b.of[s]) for s, kept in b.keep.items()}, of=b.of, select=b.select
            )
            for b in plan.blocks
        ),
    )


class _PlainSelect(nn.Module):
    """The runtime's `Select`, written in the plainest way."""

    def __init__(self, select: Select) -> None:
        super().__init__()
        assert select.read_index_map is not None
        self.reads, self.writes, self.form = select.read_index_map.int(), select.write_index_map.int(), select.form

    def read(self, norm: PartNorm, hidden: Tensor) -> Tensor:
        assert norm.weight is not None
        precise = hidden.float()
        unit = (precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + norm.epsilon)).to(hidden.dtype)
        return unit.index_select(-1, self.reads) * norm.weight

    def join(self, hidden: Tensor, update: Tensor) -> Tensor:
        return hidden.index_add(-1, self.writes, update)


def _dense_of(config: Any, parameters: int) -> PreTrainedModel:
    """A stock model with so many parameters: as many blocks and heads, the residual and the MLP narrower by about one
    factor.
    """

    def ffn_of(hidden: int) -> int:
        """The feed-forward width at which the number of parameters is right."""
        outer = (
            2 * config.vocab_size * hidden
            + hidden
            + config.num_hidden_layers * (4 * hidden * config.hidden_size + 2 * hidden)
        )
        return round((parameters - outer) / (3 * hidden * config.num_hidden_layers))

    widths = range(config.num_attention_heads, config.hidden_size, config.num_attention_heads)
    hidden = min(widths, key=lambda width: abs(width / config.hidden_size - ffn_of(width) / config.intermediate_size))
    fields = {
        "hidden_size": hidden,
        "intermediate_size": ffn_of(hidden),
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**config.to_dict(), **fields})).eval()


@torch.inference_mode()
def _parts(models: dict[str, PreTrainedModel], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The line between two halves of a block alone: norm and read, and adding to the residual, in microseconds, best of
    many.
    """
    dense, selected, plain = (models[name].model.layers[1] for name in ("dense", "selected", "plain"))
    norm, part_norm = dense.input_layernorm, selected.input_layernorm
    lines = {
        "dense": (norm, torch.add),
        "plain": (lambda x: plain.skips[0].read(part_norm, x), plain.skips[0].join),
        "selected": (lambda x: selected.skips[0].read(part_norm, x), selected.skips[0].join),
        "slices": (lambda x: _sliced_norm(part_norm, x), _add_slice),
    }
    width = len(selected.skips[0].write_index_map)
    found = []
    for tokens in (1, 16, options.tokens):
        hidden, update = torch.randn(1, tokens, options.hidden), torch.randn(1, tokens, width)
        best = {name: [float("inf")] * 2 for name in lines}
        for _ in range(200 if tokens < 100 else 60):
            for name, (read, join) in lines.items():
                times = _seconds(read, hidden), _seconds(join, hidden, hidden if name == "dense" else update)
                best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
        found += [
            {"line": name, "tokens": tokens, "read_seconds": times[0], "join_seconds": times[1]}
            for name, times in best.items()
        ]
    rows = []
    for name in lines:
        mine = [part for part in found if part["line"] == name]
        rows.append((name, *(f"{1e6 * part[key]:.1f}" for part in mine for key in ("read_seconds", "join_seconds"))))
    print("norm and read, and join, of half a block, microseconds, by tokens")
    table(("", *(f"{what} {tokens}" for tokens in (1, 16, options.tokens) for what in ("read", "join"))), rows)
    return found


def _seconds(call: Any, *arguments: Tensor) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def _sliced_norm(norm: PartNorm, hidden: Tensor) -> Tensor:
    """The fastest norm and read of contiguous features."""
    assert norm.weight is not None
    return rms_norm(hidden, hidden.shape[-1:], eps=norm.epsilon)[..., : len(norm.weight)] * norm.weight


def _add_slice(hidden: Tensor, update: Tensor) -> Tensor:
    """The fastest addition to contiguous features."""
    added = hidden.clone()
    added[..., : update.shape[-1]] += update
    return added


def _compared(
    models: dict[str, PreTrainedModel],
    batch: int,
    speeds: dict[str, Speed],
    options: argparse.Namespace,
    machine: Machine,
) -> list[dict[str, Any]]:
    dense, prompt, rows, shown = speeds["dense"], options.tokens // batch, [], []
    for name, speed in speeds.items():
        work = Work.of(api.view_model(models[name]), 4)
        row = {
            "model": name,
            "batch": batch,
            "prompt": prompt,
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "prefill_seconds": speed.prefill,
            "prefill_over_dense": dense.prefill / speed.prefill,
            "prefill_over_floor": speed.prefill / work.prefill_floor(batch, prompt, machine),
            "decode_seconds": speed.decode,
            "decode_over_dense": dense.decode / speed.decode,
            "decode_over_floor": speed.decode / work.decode_floor(batch, machine),
        }
        rows.append(row)
        cells = [f"{row['parameters'] / 1e6:.1f}"]
        for part in ("prefill", "decode"):
            cells += [
                f"{1e3 * row[f'{part}_seconds']:.2f}",
                f"{row[f'{part}_over_dense']:.2f}",
                f"{row[f'{part}_over_floor']:.2f}",
            ]
        shown.append((name, *cells))
    print(f"batch {batch}, {prompt} tokens of prompt")
    table(("model", "M params", "prefill ms", "x dense", "over floor", "decode ms", "x dense", "over floor"), shown)
    return rows


if __name__ == "__main__":
    main()
