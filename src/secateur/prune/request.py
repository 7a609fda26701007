"""What the user asks of `prune`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the user asks of `prune`; the defaults of the command line are these.

    Attributes:
        model: a local folder, a hub name, or `bundled`.
        method: the name of a method.
        sparsity: the fraction to remove; N:M implies it, `params_removed` or `modules` may replace it.
        params_removed: the pruning ratio to reach instead, over all parameters.
        modules: per-module sparsity, `NAME=S,...`.
        pattern: None takes the method's default.
        calibration: a text SPEC; None takes the method's default.
        samples, seqlen: calibration windows and their length; None is what the method's paper uses, or 128 and 2048, and never more than the model's maximum.
        seed: of every random choice.
        device, dtype: `auto`, or a name.
        options: the method's own.
        spill: keep the activation buffer in a file beside the output.
        stock_only: refuse plans that a stock architecture cannot express.
        include_path: a folder of task files for lm-eval, for a calibration on `task:NAME`.
        at_least: with `params_removed`, the first step that removes as much, instead of the nearest one.
        ignore_unknown: leave out tensors of the files that the model does not have, instead of refusing.
    """

    model: str
    method: str
    sparsity: float | None = None
    params_removed: float | None = None
    modules: str | None = None
    pattern: str | None = None
    calibration: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    spill: bool = False
    stock_only: bool = False
    include_path: str | Path | None = None
    at_least: bool = False
    ignore_unknown: bool = False
