"""How well perplexity after slicing is predicted, on models that share nothing but the text: laws fitted to points, and
the spectrum of the dense model.

    python benchmarks/small_models.py --out runs/small python benchmarks/predict_small_models.py --models runs/small
    --out runs/laws [--stories ../shared/models/stories260K]

For each model: a SliceGPT sweep (kept in --out, resumed), then the root mean square error in ln PPL over its points of
the laws of `secateur predict` (held out), of the paper's law without fitted constants, and of the spectrum: scaled by
no point of this model (by the geometric mean over the other models), and by one point. stories260K, where it is there,
is calibrated and measured on text that it writes itself, since text unlike its training text tells little of it. Prints
a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _common import finish, rms
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from secateur import api
from secateur.predict.choose import choose
from secateur.predict.points import Points
from secateur.predict.read import read_points
from secateur.predict.spectrum import C_UNFITTED, Costs, fit_constant, measure_costs
from secateur.report.plots import COLOURS, MARKERS

SPARSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
ONE = 0.2  # the sparsity whose point scales the spectrum
VISIBLE = 0.002  # below it, ln PPL - ln PPL0 is noise of the sample and has no logarithm worth averaging


@dataclass(frozen=True)
class Subject:
    """A model, and the texts to calibrate and to measure with."""

    name: str
    model: str
    calibration: str
    text: str


def subjects(models: Path, stories: Path | None, out: Path) -> Iterator[Subject]:
    yield Subject("bundled", "bundled", "builtin", "builtin")
    for folder in sorted(path.parent for path in models.glob("*/config.json")):
        yield Subject(folder.name, str(folder), "builtin", "builtin")
    if stories is not None:
        calibration, text = out / "stories-calibration.npy", out / "stories-text.npy"
        if not text.is_file():
            np.save(calibration, written_by(stories, 128, seed=0))
            np.save(text, written_by(stories, 64, seed=1))
        yield Subject("stories260K", str(stories), str(calibration), str(text))


def written_by(model: Path, windows: int, seed: int) -> np.ndarray:
    """Token ids [windows, 256] sampled from the model itself."""
    torch.manual_seed(seed)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    start = torch.full((windows, 1), loaded.config.bos_token_id)
    ids = loaded.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=255, min_new_tokens=255, do_sample=True, top_k=0
    )
    found: np.ndarray = ids.numpy()
    return found


def measure(subject: Subject, out: Path) -> tuple[Points, Costs]:
    request = api.Request(
        subject.model, "slicegpt", calibration=subject.calibration, samples=64, seqlen=256, options={"round": 1}
    )
    folder = out / subject.name
    list(
        api.sweep(request, SPARSITIES, folder, api.EvalRequest(subject.model, text=subject.text, limit=64), resume=True)
    )
    return read_points([folder], "ppl"), measure_costs(api.prepare(replace(request, sparsity=0.5)))


def spectrum_error(points: Points, costs: Costs, constant: float) -> float:
    return rms(
        [
            math.log(v / points.dense) - constant * costs.at(float(s))
            for s, v in zip(points.s, points.values, strict=True)
        ]
    )


def ratio_of_logs(points: Points, costs: Costs) -> float:
    """ln c from this model's visible points, each with the same weight."""
    pairs = [(math.log(v / points.dense), costs.at(float(s))) for s, v in zip(points.s, points.values, strict=True)]
    return float(np.mean([math.log(gain / cost) for gain, cost in pairs if gain > VISIBLE]))


def draw(found: dict[str, tuple[Points, Costs]], file: Path) -> None:
    """Draw measured ln(PPL / PPL0) against K, the prediction of the spectrum alone."""
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (name, (points, costs)), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
        pairs = [(costs.at(float(s)), math.log(v / points.dense)) for s, v in zip(points.s, points.values, strict=True)]
        shown = [(cost, gain) for cost, gain in pairs if gain > VISIBLE / 10]
        axes.plot(
            *zip(*shown, strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1,
            label=f"{name}, dense {points.dense:.3g}",
        )
    ends = np.array([1e-5, 1.5])
    for constant, style in ((1.0, ":"), (C_UNFITTED, "--")):
        axes.plot(ends, constant * ends, color="#333333", linestyle=style, linewidth=1.2, label=f"c = {constant:g}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="K, from the dense model's spectra alone",
        ylabel="measured ln(PPL / PPL0)",
        ylim=(1e-4, 6),
    )
    finish(axes, "Perplexity after slicing against what the spectrum says, s = 0.05 to 0.5")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        subject.name: measure(subject, options.out)
        for subject in subjects(options.models, options.stories, options.out)
    }
    logs = {name: ratio_of_logs(points, costs) for name, (points, costs) in found.items()}
    if options.plot is not None:
        draw(found, options.plot)
    rows = []
    for name, (points, costs) in found.items():
        elsewhere = math.exp(float(np.mean([value for other, value in logs.items() if other != name])))
        one = int(np.abs(points.s - ONE).argmin())
        single = replace(points, s=points.s[one : one + 1], values=points.values[one : one + 1])
        laws = {judged.law.name: judged.heldout for judged in choose(points, None).judged}
        try:
            by_one = spectrum_error(points, costs, fit_constant(costs, single))
        except api.SecateurError:
            by_one = math.nan  # that point is not above the dense model
        theory = rms(
            [
                math.log(points.dense) * (1 / (1 - s) - 1) - math.log(v / points.dense)
                for s, v in zip(points.s, points.values, strict=True)
            ]
        )
        rows.append(
            {
                "model": name,
                "dense": points.dense,
                "half": float(points.values[-1]),
                "c": math.exp(logs[name]),
                "theory": theory,
                "spectrum": spectrum_error(points, costs, elsewhere),
                "spectrum_one_point": by_one,
                **{law: laws.get(law) for law in ("ratio", "exponential", "phase")},
            }
        )
    columns = {
        "dense": "PPL0",
        "half": "s=0.5",
        "theory": "theory",
        "spectrum": "spectrum",
        "spectrum_one_point": "one point",
    }
    columns |= {"ratio": "ratio", "exponential": "exponential", "phase": "phase", "c": "c"}
    print(
        "RMS error in ln PPL over s = 0.05 ... 0.5; `theory` and `spectrum` see no point of the model, `one point` "
        "one, the rest all but the one predicted"
    )
    print(" ".join([f"{'model':12}", *(f"{title:>11}" for title in columns.values())]))
    for row in rows:
        print(
            " ".join(
                [f"{row['model']:12}", *("          -" if row[key] is None else f"{row[key]:11.4f}" for key in columns)]
            )
        )
    scales = np.exp(list(logs.values()))
    print(
        f"c over models: geometric mean {math.exp(np.mean(list(logs.values()))):.2f}, from {scales.min():.2f} to "
        f"{scales.max():.2f}"
    )
    print(json.dumps({"benchmark": "predict_small_models", "rows": rows}))


if __name__ == "__main__":
    main()
