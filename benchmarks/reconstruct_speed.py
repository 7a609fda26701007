"""The time that reconstruction takes, beside the two forward passes of a Wanda prune, and beside its own products.

Prunes a randomly initialised LLaMA with Wanda at 50% on its default of 128 x 2,048 tokens, and reconstructs it at its
default of 128 x 512 tokens, in turns. Prints the median over the turns of

- the seconds of the whole reconstruction over those of Wanda's forward passes alone; at most 3 is the aim;
- the seconds of its matrix products (blocks forward, and three times that for a step) at the rate at which this machine
  multiplies matrices, over those of reconstruction: the share of the floor.

    python benchmarks/reconstruct_speed.py            some ten minutes on two cores
    python benchmarks/reconstruct_speed.py --small    seconds: does it run at all; its figures mean little
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from _common import SMALL, Shape, matrix_rate, table, write_ids, write_llama

from secateur import api

SHAPE = replace(SMALL, hidden=576, ffn=1536, heads=9, kv_heads=3, blocks=2, dtype="float32")
IDS = ("wanda.npy", "fit.npy")
HELD_OUT, LOOKS = 0.1, 5  # the share of the windows, and how often their error is measured


def products(shape: Shape, samples: int, seqlen: int, steps: int, batch: int) -> float:
    """The floating-point operations of the matrix products of a reconstruction, attention among them."""
    token = 2 * shape.block_parameters + 4 * seqlen * shape.hidden / 2  # causal: half of all pairs
    tokens = samples * seqlen
    passes = 2 * tokens + LOOKS * HELD_OUT * tokens + 3 * steps * min(batch, (1 - HELD_OUT) * tokens)
    return shape.blocks * token * passes


def turn(dense: Path, out: Path, steps: int) -> tuple[float, float]:
    """Return the seconds of Wanda's forward passes and of reconstruction."""
    request = api.Request(str(dense), "wanda", sparsity=0.5, calibration=str(out / IDS[0]))
    pruned = api.prune(request, out / "pruned", overwrite=True)
    again = api.ReconstructRequest(str(out / "pruned"), calibration=str(out / IDS[1]), steps=steps)
    return pruned["seconds_by"]["forward"], api.reconstruct(again, out / "mended", overwrite=True)["seconds"]


def main() -> None:
    """Run the benchmark, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    small, repeats = arguments.small, 1 if arguments.small else arguments.repeats
    wanda, fit = ((16, 256), (16, 64)) if small else ((128, 2048), (128, 512))
    steps, batch = 5 if small else api.ReconstructRequest.steps, api.ReconstructRequest.batch
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        write_llama(dense, SHAPE)
        for number, (samples, seqlen) in enumerate((wanda, fit)):
            write_ids(Path(folder) / IDS[number], samples, seqlen, SHAPE.vocab, seed=number)
        turns, rates = [], []
        for _ in range(repeats):
            rates.append(matrix_rate())
            turns.append(turn(dense, Path(folder), steps))
    floor = [products(SHAPE, *fit, steps, batch) / rate for rate in rates]
    forward, mended = ([times[i] for times in turns] for i in (0, 1))
    print(f"a random LLaMA, {SHAPE.blocks} blocks of width {SHAPE.hidden}; {repeats} turns, medians")
    table(
        ("", "seconds", "what"),
        [
            ("wanda, forward", f"{median(forward):.1f}", f"two passes over {wanda[0]} x {wanda[1]:,} tokens"),
            ("reconstruct", f"{median(mended):.1f}", f"{fit[0]} x {fit[1]} tokens, {steps} steps of {batch:,}"),
            ("its products", f"{median(floor):.1f}", f"at {median(rates) / 1e9:.0f} GFLOP/s"),
        ],
    )
    ratio = median(m / f for m, f in zip(mended, forward, strict=True))
    share = median(f / m for f, m in zip(floor, mended, strict=True))
    print(f"reconstruct : forward passes of wanda = {ratio:.2f}; wanted: at most 3")
    print(f"products : reconstruct = {share:.2f}")


if __name__ == "__main__":
    main()
