"""What the benchmarks share: random LLaMA checkpoints, random token ids, and the rate at which this machine multiplies
matrices.

Importing this costs nothing: torch, numpy and transformers are imported where they are used, so that a process that
only starts others stays small (Linux counts the peak of a parent into the peak of its child).
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA with an untied head."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    blocks: int
    dtype: str
    positions: int = 2048

    @property
    def block_matrices(self) -> dict[str, tuple[int, int]]:
        """Name inside the block -> (outputs, inputs)."""
        keys = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    @property
    def block_parameters(self) -> int:
        """The weights of one block's matrices."""
        return sum(outputs * inputs for outputs, inputs in self.block_matrices.values())

    @property
    def parameters(self) -> int:
        norms = (2 * self.blocks + 1) * self.hidden
        return self.blocks * self.block_parameters + 2 * self.vocab * self.hidden + norms

    @property
    def weights_bytes(self) -> int:
        return self.parameters * ITEM_BYTES[self.dtype]

    def deeper(self, times: int) -> Shape:
        return replace(self, blocks=self.blocks * times)


BILLION = Shape(hidden=2048, ffn=5632, heads=32, kv_heads=4, vocab=32000, blocks=20, dtype="bfloat16")
SMALL = Shape(hidden=256, ffn=688, heads=8, kv_heads=2, vocab=4096, blocks=4, dtype="bfloat16")


def write_llama(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write a randomly initialised checkpoint, one shard a block: never more than one block or one outer tensor in
    memory.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.blocks,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        dtype=shape.dtype,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    parts = list(_parts(shape))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        tensors = {}
        for name, size in part.items():
            tensor = torch.empty(size, dtype=dtype)
            tensors[name] = tensor.fill_(1) if len(size) == 1 else tensor.normal_(0, 0.02, generator=generator)
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": shape.parameters * ITEM_BYTES[shape.dtype]}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shards: tensor name -> size."""
    yield {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for block in range(shape.blocks):
        prefix = f"model.layers.{block}."
        matrices: dict[str, tuple[int, ...]] = {
            f"{prefix}{name}.weight": size for name, size in shape.block_matrices.items()
        }
        yield matrices | {
            f"{prefix}{norm}.weight": (shape.hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    yield {"model.norm.weight": (shape.hidden,)}
    yield {"lm_head.weight": (shape.vocab, shape.hidden)}


def write_ids(file: Path, samples: int, seqlen: int, vocab: int, seed: int = 0) -> None:
    """Random token ids [samples, seqlen] as .npy."""
    import numpy as np

    np.save(file, np.random.default_rng(seed).integers(0, vocab, (samples, seqlen), dtype=np.int64))


def run_child(script: str, child: str, **arguments: Any) -> dict[str, Any]:
    """Run a benchmark's script in a process of its own, as `--child NAME --arguments JSON`; the last line it prints is
    its answer.
    """
    command = [sys.executable, script, "--child", child, "--arguments", json.dumps(arguments)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def peak_rss() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_after_imports(*modules: str) -> int:
    """The peak of this process once transformers' LLaMA and these modules are imported, which are no part of a figure."""
    before = peak_rss()
    for name in ("transformers.models.llama.modeling_llama", *modules):
        importlib.import_module(name)
    baseline = peak_rss()
    assert baseline > before, "the parent's peak hides that of the imports"
    return baseline


def matrix_rate(seconds: float = 1.0) -> float:
    """FLOP/s of float32 products of [2048, 1024] by [1024, 1024], on as many threads as torch takes by itself."""
    import torch

    left, right = torch.randn(2048, 1024), torch.randn(1024, 1024)
    with torch.inference_mode():
        out = left @ right
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            torch.matmul(left, right, out=out)
            done += 1
    return done * 2 * 2048 * 1024 * 1024 / spent


def rms(errors: Iterable[float]) -> float:
    """The root mean square."""
    squares = [float(error) ** 2 for error in errors]
    return math.sqrt(sum(squares) / len(squares))


def finish(axes: Axes, title: str) -> None:
    """Give a figure its title, grid and legend."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print columns: the first aligned left, the last unchanged, the others aligned right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
