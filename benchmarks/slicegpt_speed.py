"""How fast SliceGPT is here, beside a straightforward implementation of the published procedure and beside the
machine's own limit.

Both slice the same random LLaMA by a quarter on the same random token ids, on CPU in float32, and must end with the
same function: the same widths, and logits that agree. They take turns; figures are the smallest of all runs, or their
median. Two models: 6 blocks of width 192, and 12 blocks of width 768.

The straightforward implementation follows arXiv:2401.15024 literally: the whole model in memory, batches of windows;
for each block one pass for the input of the second norm, PCA, rotate and slice, and another pass for the output of the
block, PCA, rotate and slice. Every pass computes the whole block and drops what is not asked for; second moments are
float64 products [B, D, T] x [B, T, D], summed over B; weights are rotated in float64; the adapters are the dense
Q_prev^T Q_next and are applied in the forward.

What the times hold. `eigenproblems`: of secateur also the alignment of each basis with the one before and the adapters'
factors. `files`: reading, folding the norms' gains into the weights, writing. The floor: all tokens once through the
block matrices (but for the last MLP, behind which nothing is measured), once a place through a projection onto the kept
directions, [D, W], and once a place into a second moment, [D, D], at the rate at which this machine multiplies [2048,
1024] by [1024, 1024] in float32. It leaves out attention's own products, norms and activations, eigenproblems,
rotations and files.

    python benchmarks/slicegpt_speed.py --width192-only    about two minutes on two cores
    python benchmarks/slicegpt_speed.py                    about ten minutes
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Shape, matrix_rate, table, write_ids, write_llama
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import secateur  # noqa: F401  # lets transformers load sliced checkpoints
from secateur.core.timing import Stopwatch
from secateur.prune.run import prune
from secateur.requests import Request

SHAPES = {
    "width 192": Shape(hidden=192, ffn=512, heads=6, kv_heads=2, vocab=2048, blocks=6, dtype="float32"),
    "width 768": Shape(hidden=768, ffn=2048, heads=12, kv_heads=12, vocab=8192, blocks=12, dtype="float32"),
}
SAMPLES = {"width 192": 128, "width 768": 32}
SPARSITY = 0.25
PARTS = ("forward", "covariances", "eigenproblems", "rotations", "files", "text", "other")
OURS = {"statistics": "covariances", "rotation": "rotations"}  # what the package calls them
COVARIANCES = 5.0
END_TO_END = {"width 192": 3.0, "width 768": 1.0}
AGREE = 1e-3  # relative, of logits

Times = dict[str, float]


def main() -> None:
    options = _options()
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="slicegpt-speed-"))
    try:
        results = [_model(folder / name.replace(" ", "-"), name, options) for name in options.models]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {
                "benchmark": "slicegpt_speed",
                "threads": torch.get_num_threads(),
                "seqlen": options.seqlen,
                "results": results,
            }
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--samples", type=int, help=f"calibration windows (default {SAMPLES})")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument(
        "--batch",
        type=int,
        default=16,
        help="windows of a batch of the straightforward implementation (default 16, the authors')",
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--attention",
        choices=["sdpa", "eager"],
        default="sdpa",
        help="of the straightforward side; the authors' code has eager attention",
    )
    parser.add_argument("--width192-only", action="store_true", help="the small model alone")
    parser.add_argument("--median", action="store_true", help="report medians instead of minima")
    options = parser.parse_args()
    if options.width192_only:
        options.models = ["width 192"]
    return options


def _model(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    shape, samples = SHAPES[name], options.samples or SAMPLES[name]
    model, ids, few, out = folder / "model", folder / "ids.npy", folder / "few.npy", folder / "out"
    write_llama(model, shape)
    write_ids(ids, samples, options.seqlen, shape.vocab)
    write_ids(few, 4, options.seqlen, shape.vocab)
    secateur_slicegpt(model, few, out)  # the first call of a process is slower
    PlainSliceGPT(options.batch, options.attention).run(model, few, out)
    ours, theirs, rates = [], [], []
    for _ in range(options.repeats):
        rates.append(matrix_rate())
        ours.append(_timed(lambda: secateur_slicegpt(model, ids, out)))
        plain = PlainSliceGPT(options.batch, options.attention)
        theirs.append(_timed(partial(plain.run, model, ids, folder / "plain")))
    difference = _difference(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), plain.model, shape)
    summary = statistics.median if options.median else min
    ours_one, theirs_one = ({part: summary(run[part] for run in runs) for part in runs[0]} for runs in (ours, theirs))
    result = _summary(
        name, shape, samples * options.seqlen, options, ours_one, theirs_one, statistics.median(rates), difference
    )
    _print(result)
    shutil.rmtree(folder)
    return result


def _timed(run: Callable[[], Times]) -> Times:
    started = time.perf_counter()
    times = run()
    total = time.perf_counter() - started
    named = {part: times.get(part, 0.0) for part in PARTS[:-1]}
    return {**named, "other": total - sum(named.values()), "total": total}


def secateur_slicegpt(model: Path, ids: Path, out: Path) -> Times:
    request = Request(model=str(model), method="slicegpt", sparsity=SPARSITY, calibration=str(ids), device="cpu")
    times: Times = prune(request, out, overwrite=True)["seconds_by"]
    return {OURS.get(part, part): seconds for part, seconds in times.items()}


class _PlainNorm(nn.Module):
    """Divides by the root mean square over the original width."""

    def __init__(self, original: int, epsilon: float) -> None:
        super().__init__()
        self.original, self.epsilon = original, epsilon

    def forward(self, x_BTW: Tensor) -> Tensor:
        square_BT = x_BTW.to(torch.float32).pow(2).sum(-1, keepdim=True) / self.original
        return x_BTW * torch.rsqrt(square_BT + self.epsilon)


class _PlainBlock(nn.Module):
    """A LLaMA block with a dense adapter on both residual connections."""

    def __init__(self, stock: nn.Module, original: int, epsilon: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = stock.self_attn, stock.mlp
        self.first_norm, self.second_norm = _PlainNorm(original, epsilon), _PlainNorm(original, epsilon)
        self.attention_adapter, self.mlp_adapter = torch.eye(original), torch.eye(original)  # [in, out]

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        hidden = hidden @ self.attention_adapter + self.self_attn(hidden_states=self.first_norm(hidden), **arguments)[0]
        return hidden @ self.mlp_adapter + self.mlp(self.second_norm(hidden))


class _Caught(Exception):
    pass


class _Catcher(nn.Module):
    """Stands for the first block: keeps what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.inputs.append((hidden, arguments))
        raise _Caught


class PlainSliceGPT:
    """arXiv:2401.15024, section 3, as it is written."""

    def __init__(self, batch: int, attention: str = "sdpa") -> None:
        self.batch, self.attention, self.watch = batch, attention, Stopwatch()
        self.model: PreTrainedModel

    @torch.no_grad()
    def run(self, folder: Path, ids: Path, out: Path) -> Times:
        watch = self.watch
        with watch("files"):
            self.model = model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=self.attention
            ).eval()
            model.config.use_cache = False
            self._fold()
        with watch("text"):
            windows = torch.from_numpy(np.load(ids))
        with watch("forward"):
            inputs = self._block_inputs(windows)
        hidden = model.config.hidden_size
        width = int((1 - SPARSITY) * hidden) // 8 * 8
        q_DD = self._pca([x for x, _ in inputs])
        with watch("rotations"):
            self._rotate_in(model.model.embed_tokens, q_DD, width)
        for index, block in enumerate(model.model.layers):
            last = index == len(model.model.layers) - 1
            with watch("rotations"):
                for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                    self._rotate_in(linear, q_DD, width)
                block.attention_adapter = q_DD[:, :width].t().float()
            with watch("forward"):
                inputs = [((x @ q_DD.float())[..., :width], arguments) for x, arguments in inputs]
                between, _ = self._signals(block, inputs)
            before_DD, q_DD = q_DD, self._pca(between)
            with watch("rotations"):
                block.attention_adapter = (before_DD[:, :width].t() @ q_DD[:, :width]).float()
                self._rotate_out(block.self_attn.o_proj, q_DD, width)
                block.mlp_adapter = q_DD[:, :width].t().float()
                for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                    self._rotate_in(linear, q_DD, width)
            with watch("forward"):
                _, leaving = self._signals(block, inputs)
            inputs = [(x, arguments) for x, (_, arguments) in zip(leaving, inputs, strict=True)]
            before_DD, q_DD = q_DD, self._pca(leaving)
            with watch("rotations"):
                end = hidden if last else width
                block.mlp_adapter = (before_DD[:, :width].t() @ q_DD[:, :end]).float()
                self._rotate_out(block.mlp.down_proj, q_DD, end)
        with watch("rotations"):
            self._rotate_in(model.lm_head, q_DD, hidden)
        with watch("files"):
            self._save(out)
        return watch.seconds

    def _fold(self) -> None:
        """Fold the gains of norms into the matrices that read them, in float64; make blocks with adapters."""
        config, decoder = self.model.config, self.model.model
        for index, stock in enumerate(decoder.layers):
            attention, mlp = stock.self_attn, stock.mlp
            self._scale(stock.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
            self._scale(stock.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
            decoder.layers[index] = _PlainBlock(stock, config.hidden_size, config.rms_norm_eps)
        self._scale(decoder.norm, [self.model.lm_head])
        decoder.norm = _PlainNorm(config.hidden_size, config.rms_norm_eps)

    @staticmethod
    def _scale(norm: nn.Module, readers: list[nn.Module]) -> None:
        for reader in readers:
            reader.weight.data = (reader.weight.double() * norm.weight.double()).float()

    def _block_inputs(self, windows: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        layers, catcher = self.model.model.layers, _Catcher()
        layers[0], first = catcher, layers[0]
        for batch in windows.split(self.batch):
            try:
                self.model(batch)
            except _Caught:
                continue
        layers[0] = first
        return catcher.inputs

    @staticmethod
    def _signals(block: nn.Module, inputs: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[Tensor]]:
        """The input of the second norm, and the output of the block; each pass drops one of them."""
        entering: list[Tensor] = []
        with _hooked(block.second_norm, entering):
            leaving = [block(x, **arguments) for x, arguments in inputs]
        return entering, leaving

    def _pca(self, batches: list[Tensor]) -> Tensor:
        with self.watch("covariances"):
            moment_DD = torch.zeros(batches[0].shape[-1], batches[0].shape[-1], dtype=torch.float64)
            for x_BTD in batches:
                x_BTD = x_BTD.double()
                moment_DD += (x_BTD.mT @ x_BTD).sum(0)
        with self.watch("eigenproblems"):
            vector_DD: Tensor = torch.linalg.eigh(moment_DD).eigenvectors
        return vector_DD.flip(1)

    @staticmethod
    def _rotate_in(module: nn.Module, q_DD: Tensor, width: int) -> None:
        module.weight.data = (module.weight.double() @ q_DD)[:, :width].float().contiguous()

    @staticmethod
    def _rotate_out(module: nn.Module, q_DD: Tensor, width: int) -> None:
        module.weight.data = (q_DD.t() @ module.weight.double())[:width].float().contiguous()

    def _save(self, out: Path) -> None:
        out.mkdir(exist_ok=True)
        adapters = {
            f"{i}.{n}": getattr(block, n).contiguous()
            for i, block in enumerate(self.model.model.layers)
            for n in ("attention_adapter", "mlp_adapter")
        }
        save_file({**self.model.state_dict(), **adapters}, out / "model.safetensors")


@contextmanager
def _hooked(module: nn.Module, entering: list[Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _difference(ours: PreTrainedModel, theirs: PreTrainedModel, shape: Shape) -> float:
    """The largest difference of logits over their root mean square, on ids that neither has seen; the widths must be
    equal.
    """
    for mine, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        for part, path in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")):
            one, two = (getattr(getattr(block, part), path).weight.shape for block in (mine, other))
            assert one == two, f"{path}: {one} here, {two} there"
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, shape.vocab, (4, 128)))
    found, wanted = ours.eval()(ids).logits, theirs(ids).logits
    return float((found - wanted).abs().max() / wanted.square().mean().sqrt())


def _summary(
    name: str,
    shape: Shape,
    tokens: int,
    options: argparse.Namespace,
    ours: Times,
    theirs: Times,
    rate: float,
    difference: float,
) -> dict[str, Any]:
    hidden, places = shape.hidden, 2 * shape.blocks
    width = int((1 - SPARSITY) * hidden) // 8 * 8
    mlp = 3 * shape.hidden * shape.ffn
    flop = {
        "blocks": 2 * tokens * (shape.blocks * shape.block_parameters - mlp),
        "projections": 2 * tokens * (places - 1) * hidden * width,
        "second moments": 2 * tokens * places * hidden * hidden,
    }
    floor = sum(flop.values()) / rate
    return {
        "model": name,
        "parameters": shape.parameters,
        "tokens": tokens,
        "width": [hidden, width],
        "repeats": options.repeats,
        "figure": "median" if options.median else "minimum",
        "batch_of_straightforward": options.batch,
        "attention_of_straightforward": options.attention,
        "secateur": _rounded(ours),
        "straightforward": _rounded(theirs),
        "ratio": _rounded({part: theirs[part] / ours[part] for part in (*PARTS[:5], "total")}),
        "gflops": round(rate / 1e9, 1),
        "floor_seconds": _rounded({part: count / rate for part, count in flop.items()} | {"total": floor}),
        "over_floor": round((ours["forward"] + ours["covariances"]) / floor, 3),
        "straightforward_over_floor": round((theirs["forward"] + theirs["covariances"]) / floor, 3),
        "difference": difference,
        "agree": difference < AGREE,
    }


def _rounded(times: Times) -> Times:
    return {name: round(value, 4) for name, value in times.items()}


def _print(result: dict[str, Any]) -> None:
    ours, theirs, ratio, floor = result["secateur"], result["straightforward"], result["ratio"], result["floor_seconds"]
    wanted = {"covariances": COVARIANCES, "total": END_TO_END[result["model"]]}
    hidden, width = result["width"]
    print(
        f"\n{result['model']} ({result['parameters'] / 1e6:.1f}M parameters), {hidden} to {width} directions, "
        f"{result['tokens']:,} tokens: ",
        end="",
    )
    print(f"seconds, {result['figure']} of {result['repeats']}")

    def row(label: str, part: str) -> tuple[str, ...]:
        verdict = f">= {wanted[part]:g}x {'met' if ratio[part] >= wanted[part] else 'MISSED'}" if part in wanted else ""
        return (
            label,
            f"{ours[part]:.3f}",
            f"{theirs[part]:.3f}",
            f"{ratio[part]:.2f}x" if part in ratio else "",
            verdict,
        )

    table(
        ("", "secateur", "straightforward", "ratio", "target"),
        [*(row(part, part) for part in PARTS), row("end to end", "total")],
    )
    print(f"  floor of forward and covariances: {floor['total']:.3f} s at {result['gflops']:.0f} GFLOP/s", end=" ")
    print(f"({', '.join(f'{part} {floor[part]:.3f}' for part in list(floor)[:-1])}); ", end="")
    print(f"{result['over_floor']:.2f} x the floor, straightforward {result['straightforward_over_floor']:.2f} x")
    print(
        f"  logits differ by {result['difference']:.1e} of their root mean square: "
        f"{'the same function' if result['agree'] else 'NOT THE SAME'}",
        flush=True,
    )
    assert result["agree"], f"the two sliced models differ by {result['difference']:.1e}, which is more than {AGREE}"


if __name__ == "__main__":
    main()
