"""Perplexity of a sliced model, predicted from one calibration pass of the dense model; no pruned model is evaluated.

Slicing discards a part of the residual stream at each place. This part has the second moment
C(W) = sum over the directions k > W of lambda_k v_k v_k^T. If it were noise that reached the head unchanged, the logits
would move a little, and the divergence of the next-token distribution p would be, to second order,

    K(W) = 1/2 sum over places of trace(F C(W)),
    F = mean over tokens of U^T (diag(p) - p p^T) U / mean square of the residual.

U [V, D] is the head after the gain of the final norm. F is the Fisher information of the input of the head. The
prediction is

    ln(PPL / PPL0) = c K((1 - s) D).

c is fitted to the measured points (one is enough). Without points c is the mean of six small models (`C_UNFITTED`); it
is above 1, since the blocks in between read the noise and react to it. F and the spectra are sums over the tokens of a
single forward pass.

Shape letters: D residual, V vocabulary, N tokens, W kept width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.calibrate.statistics import SecondMoment
from secateur.calibrate.stream import Stream
from secateur.core.errors import NotFiniteError, SecateurError, UsageError
from secateur.core.names import shown
from secateur.core.progress import track
from secateur.core.records import Record, version
from secateur.core.words import exp
from secateur.models.view import ModelView
from secateur.predict.points import Points
from secateur.prune.calibration import read_windows
from secateur.prune.prepare import Prepared
from secateur.prune.settings import prepared_settings

FORMULA = "ln(PPL / PPL0) = c K(s)"
# Geometric mean over six small models, and the factor within which all lie: benchmarks/predict_small_models.py
C_UNFITTED, C_FACTOR = 3.2, 3.0
_UNFITTED = (
    f"no point is measured: c = {C_UNFITTED:g} is that of six small models, which differ by a factor of {C_FACTOR:g}; "
    "one measured sparsity fixes it"
)
_AT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Costs:
    """K of every place, as a function of the kept width.

    Attributes:
        hidden: D.
        places: name -> K [D + 1] by kept width, float64; K[D] = 0.
    """

    hidden: int
    places: dict[str, NDArray[np.float64]]

    def at(self, sparsity: float) -> float:
        """K if every place keeps (1 - s) D directions, interpolated linearly between whole widths."""
        total_W = np.sum(list(self.places.values()), axis=0)
        return float(np.interp((1 - sparsity) * self.hidden, np.arange(self.hidden + 1), total_W))

    def inverse(self, cost: float) -> float | None:
        """The largest sparsity with at most this K; None if K is above it at s = 0 already."""
        total_W = np.sum(list(self.places.values()), axis=0)
        if cost < 0:
            return None
        if cost >= total_W[1]:
            return 1 - 1 / self.hidden  # one direction stays
        return 1 - float(np.interp(-cost, -total_W, np.arange(self.hidden + 1))) / self.hidden


def measure_costs(prepared: Prepared) -> Costs:
    """Run the dense model over the calibration text, one block at a time, and measure K.

    Args:
        prepared: a request for `slicegpt` at any sparsity above 0.

    Raises:
        SecateurError: a soft-cap stands behind the head, which the law does not know.
        NotFiniteError: the residual stream is not finite.
    """
    view = prepared.job.view
    if (cap := view.family.cap_of(view.config)) is not None:
        raise SecateurError(
            f"{view.name}: its logits pass a soft-cap ({view.family.logit_cap} = {cap:g}), "
            "which the prediction from the spectrum leaves out; predict from measured points instead"
        )
    windows = read_windows(prepared)
    assert windows is not None
    stream = Stream(view, windows, device=prepared.device, dtype=prepared.dtype)
    moments = {"embeddings": _moment(view, stream.show)}
    halves = {1: {"attention_half": "leave"}, 2: {"attention_half": "between", "mlp_half": "leave"}}[
        len(view.family.norms)
    ]
    for index in track(range(view.blocks), "spectrum: blocks", view.blocks):
        block = view.block(index)
        for half, name in halves.items():

            def run(listener: Callable[[Tensor], None], block=block, half=half) -> None:  # type: ignore[no-untyped-def]
                stream.advance_half(block, half, None, listener)

            moments[f"block {index}, {name}"] = _moment(view, run)
    moments.popitem()  # the head's input is rotated, not sliced
    fisher_DD = head_fisher(view, stream)
    return Costs(
        view.config.hidden_size, {name: place_costs(moment_DD, fisher_DD) for name, moment_DD in moments.items()}
    )


def place_costs(moment_DD: Tensor, fisher_DD: Tensor) -> NDArray[np.float64]:
    """K [D + 1] of one place by kept width: 1/2 trace(F C(W))."""
    value_D, vector_DD = torch.linalg.eigh(moment_DD)  # ascending: the weakest directions are removed first
    cost_D = 0.5 * value_D.clamp(min=0) * (vector_DD * (fisher_DD @ vector_DD)).sum(0)
    return np.concatenate([[0.0], cost_D.cpu().numpy().cumsum()])[::-1].copy()


def head_fisher(view: ModelView, stream: Stream) -> Tensor:
    """F [D, D], float64 on the CPU, of the residual at the end of the stream."""
    head, described = view.family.head, view.raw_config["pruned_residual"]
    unit_VD = view.source.read(f"{head}.weight").to(stream.device)
    bias_V = view.source.read(f"{head}.bias").to(unit_VD) if described["head_bias"] else None
    weighted_V = torch.zeros(len(unit_VD), dtype=torch.float64, device=stream.device)
    outer_DD = torch.zeros(unit_VD.shape[1], unit_VD.shape[1], dtype=torch.float64, device=stream.device)
    tokens = 0

    def listen(hidden_ND: Tensor) -> None:
        nonlocal tokens
        hidden_ND = hidden_ND.to(unit_VD)
        scale_N1 = torch.rsqrt(hidden_ND.square().mean(1, keepdim=True) + described["epsilon"])
        logits_NV = torch.nn.functional.linear(hidden_ND * scale_N1, unit_VD, bias_V)
        weighted_NV = logits_NV.softmax(1).mul_(scale_N1)  # p / rms
        mean_ND = weighted_NV @ unit_VD
        weighted_V.add_((weighted_NV * scale_N1).sum(0))
        outer_DD.add_(mean_ND.t() @ mean_ND)
        tokens += len(hidden_ND)

    stream.show(listen)
    wide_VD = unit_VD.double()
    return ((wide_VD.t() * (weighted_V / tokens)) @ wide_VD - outer_DD / tokens).cpu()


def _moment(view: ModelView, run: Callable[[Callable[[Tensor], None]], None]) -> Tensor:
    moment = SecondMoment(view.config.hidden_size, torch.device("cpu"))
    run(moment.update)
    if not moment.finite():
        raise NotFiniteError(
            f"{view.name}: the residual stream is not finite (NaN or infinity); the checkpoint is damaged, "
            "or try --dtype float32"
        )
    return moment.sum_II / moment.tokens


def fit_constant(costs: Costs, points: Points) -> float:
    """Fit c by least squares in ln PPL, with the dense model fixed.

    Raises:
        SecateurError: no point is measured, or slicing did not raise the perplexity, so c has no value.
    """
    if not len(points.s):
        raise SecateurError("no pruned point is measured, so there is nothing to scale by")
    cost_N = np.array([costs.at(float(s)) for s in points.s])
    gain_N = np.log(points.values / points.dense)
    constant = float(cost_N @ gain_N / (cost_N @ cost_N))
    if not constant > 0:
        raise SecateurError(
            "the measured points have no higher perplexity than the dense model, so there is nothing to scale by; "
            "measure a larger sparsity"
        )
    return constant


def predict_from_spectrum(
    prepared: Prepared,
    dense: float | None,
    points: Points | None,
    *,
    at: Sequence[float] = (),
    target: float | None = None,
) -> tuple[Costs, Record]:
    """Predict the perplexity after slicing.

    Args:
        prepared: a request for `slicegpt`; its calibration text is used.
        dense: the perplexity of the dense model. None takes it from `points`; without both, predictions are ratios.
        points: measured points that scale the prediction, or None.
        at: sparsities in [0, 1).
        target: the perplexity not to exceed.
    """
    if points is not None and points.kind != "ppl":
        raise UsageError("--spectrum predicts perplexity: leave --metric and --target-acc out")
    if points is not None:
        _check_same(points, prepared)
    dense = points.dense if points is not None else dense
    if dense is not None and not (math.isfinite(dense) and dense > 1):
        raise UsageError(f"--dense-ppl {dense:g}: a finite perplexity above 1 is needed")
    if target is not None and dense is None:
        raise UsageError(
            "--target-ppl needs the perplexity of the dense model: add --dense-ppl P, or records of a sweep"
        )
    if bad := [s for s in at if not 0 <= s < 1]:
        raise UsageError(f"--at {bad[0]:g} is outside [0, 1)")
    costs = measure_costs(prepared)
    measured = points is not None and len(points.s) > 0
    constant = fit_constant(costs, points) if measured and points is not None else C_UNFITTED
    factor = None if measured else C_FACTOR
    reach = float(points.s.max()) if measured and points is not None else _AT[-1]
    aim = None
    if target is not None and dense is not None:
        room = math.log(target / dense)
        cautious = costs.inverse(room / (constant * (factor or 1.0)))
        largest = costs.inverse(room / constant)
        aim = {
            "ppl": target,
            "sparsity": largest,
            "cautious": cautious,
            "extrapolated": largest is not None and largest > reach,
        }
    sparsities = list(at) or (points.s.tolist() if measured and points is not None else list(_AT))
    record: Record = {
        "command": "predict",
        "version": version(),
        **{
            key: value
            for key, value in prepared_settings(prepared, None).items()
            if key in ("model", "model_revision", "method", "device", "dtype")
        },
        "calibration": prepared.calibration,
        "metric": "ppl",
        "law": "spectrum",
        "formula": FORMULA,
        "a": constant,
        "b": None,
        "points": 0 if points is None else len(points.s),
        "dense": dense,
        "rmse": _error(costs, constant, points) if measured and points is not None else None,
        "heldout_rmse": _held_out(costs, points) if measured and points is not None else None,
        "places": {name: float(values[int(0.8 * costs.hidden)]) for name, values in costs.places.items()},
        "predictions": [_answer(costs, s, constant, factor, dense, reach) for s in sparsities],
        "target": aim,
        "warnings": [
            *(points.warnings if points is not None else ()),
            *([] if measured else [_UNFITTED]),
            *_beyond(sparsities, aim, reach),
        ],
    }
    return costs, record


def _check_same(points: Points, prepared: Prepared) -> None:
    """Raise SecateurError if the points are of another model or method."""
    for name, here in (("model", shown(prepared.request.model)), ("method", prepared.request.method)):
        there = points.about.get(name)
        if there is not None and there != here:
            raise SecateurError(
                f"the points are of {name} '{there}', --spectrum predicts {name} '{here}': give points of the same, "
                "or keep them with --where"
            )


def _beyond(sparsities: Sequence[float], aim: Record | None, reach: float) -> list[str]:
    """A warning for the sparsities above `reach`, the largest one that the scale was tested at."""
    past = list(
        dict.fromkeys(
            f"{s:.3g}"
            for s in [*sparsities, *([aim["sparsity"]] if aim is not None and aim["extrapolated"] else [])]
            if s > reach
        )
    )
    return (
        [f"sparsity {', '.join(past)} is above {reach:.3g}, the largest that the scale rests on: extrapolated"]
        if past
        else []
    )


def _answer(costs: Costs, s: float, constant: float, factor: float | None, dense: float | None, reach: float) -> Record:
    gain = constant * costs.at(s)
    ends = (None, None) if factor is None else (gain / factor, gain * factor)
    scale = 1.0 if dense is None else dense
    key = "ppl_ratio" if dense is None else "ppl"
    low, high = (None if end is None else scale * exp(end) for end in ends)
    return {"sparsity": float(s), key: scale * exp(gain), "low": low, "high": high, "extrapolated": s > reach}


def _error(costs: Costs, constant: float, points: Points) -> float:
    errors = [
        math.log(v / points.dense) - constant * costs.at(float(s)) for s, v in zip(points.s, points.values, strict=True)
    ]
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def _held_out(costs: Costs, points: Points) -> float | None:
    """Root of the mean squared error in ln PPL of each point, predicted from the others; None without such points."""
    errors = []
    for left_out in range(len(points.s)):
        rest = replace(points, s=np.delete(points.s, left_out), values=np.delete(points.values, left_out))
        gain = math.log(points.values[left_out] / points.dense)
        with suppress(SecateurError):
            errors.append(gain - fit_constant(costs, rest) * costs.at(float(points.s[left_out])))
    if not errors:
        return None
    return math.sqrt(sum(e * e for e in errors) / len(errors))
