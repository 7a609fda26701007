"""What a user asks for: one frozen dataclass a command, with the defaults of the command line and of `secateur.api`.

Nothing here imports torch, so that `--help` can show the defaults without waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        samples, seqlen: calibration windows and their length; None is what the method's paper uses, or 128 and 2048,
            and never more than the model's maximum.
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


@dataclass(frozen=True)
class EvalRequest:
    """What the user asks of `eval`; the defaults of the command line are these.

    Attributes:
        model: a folder (pruned or not), a hub name, or `bundled`.
        text: a text SPEC; None takes that of the protocol.
        protocol: a name from `PROTOCOLS`; None takes the one that goes with the text.
        seqlen: None takes that of the protocol.
        tasks: names of tasks of lm-eval, or presets of them; `cloze` is built in.
        limit: use the first so many windows, and items of a task.
        against: the dense model to compare with, and its hub revision.
        include_path: a folder of task files for lm-eval.
    """

    model: str
    text: str | None = None
    protocol: str | None = None
    seqlen: int | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None
    against: str | None = None
    against_revision: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    text_field: str = "text"
    include_path: str | Path | None = None


@dataclass(frozen=True)
class HealRequest:
    """What the user asks of `heal`; the defaults of the command line are these.

    Attributes:
        model: the folder of a checkpoint that secateur wrote.
        calibration: a text SPEC, or instruction data; None takes the text it was pruned with.
        steps: of the optimiser.
        batch: windows (or instructions) a step.
        lr, schedule: the learning rate at its highest, and `cosine` or `constant` after the first twentieth.
        weight_decay: of AdamW.
        rank, alpha: of the adapters.
        targets: which matrices get one: names as in `--modules`.
        completion_only: of instruction data, learn the answers alone.
        keep_adapter: write the adapter, in peft's form, instead of merging it.
        samples, seqlen: windows and their length; seqlen None is min(1024, the model's maximum).
        save_every: steps between two saves.
        checkpointing: keep one activation a block and compute the others again: a third more time, much less memory.
        include_path: a folder of task files for lm-eval, for healing on `task:NAME`.
        text, protocol, limit: what perplexity is measured on before and after; see `EvalRequest`.
    """

    model: str
    calibration: str | None = None
    steps: int = 1000
    batch: int = 4
    lr: float = 2e-4
    schedule: str = "cosine"
    weight_decay: float = 0.0
    rank: int = 32
    alpha: float = 10.0
    targets: Sequence[str] = ("all",)
    completion_only: bool = False
    keep_adapter: bool = False
    samples: int = 1024
    seqlen: int | None = None
    save_every: int = 100
    checkpointing: bool = True
    seed: int = 0
    text: str | None = None
    protocol: str | None = None
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    text_field: str = "text"
    include_path: str | Path | None = None


@dataclass(frozen=True)
class BenchRequest:
    """What the user asks of `bench`; the defaults of the command line are these.

    Attributes:
        model: a folder (pruned or not), a hub name, or `bundled`.
        dense: the model to put beside it; None measures `model` alone.
        batches: how many sequences at once; each is measured.
        prompt: tokens of a sequence before the first new one.
        new: tokens generated after it.
        repeats: turns of each model; the best counts.
        semi_structured: multiply by 2:4 matrices of `model` in torch's compressed form, on an accelerator that has
            such products.
    """

    model: str
    dense: str | None = None
    batches: Sequence[int] = (1, 16)
    prompt: int = 128
    new: int = 32
    repeats: int = 3
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    semi_structured: bool = False


@dataclass(frozen=True)
class ModulesRequest:
    """What `study modules` varies, and how it runs; the defaults of the command line are these.

    Attributes:
        kinds: names as in `--modules`; none is each projection of the family, attention, mlp and all.
        sparsities: in [0, 1]; none is `study.modules.SPARSITIES`, or what the pattern implies.
        weights: numbers of weights to remove, as many from each kind that has them.
        grid: sparsities of attention and of MLP that are combined.
        mode: `shared`: the statistics of the dense model serve all cells; `sequential`: each cell as `prune` makes it.
        jobs: processes that share the cells; each keeps the model and the statistics.
        engine: `processes` of this machine, or `ray`: those of a Ray cluster (that of `RAY_ADDRESS`, or one that is
            started here), which see the same files.
    """

    kinds: Sequence[str] = ()
    sparsities: Sequence[float] = ()
    weights: Sequence[int] = ()
    grid: Sequence[float] = ()
    mode: str = "shared"
    jobs: int = 1
    engine: str = "processes"


@dataclass(frozen=True)
class CompareRequest:
    """What `compare` puts side by side.

    Attributes:
        base: the model and its calibration; method, sparsity, pattern and options are replaced.
        methods: names.
        ratios: pruning ratios over all parameters, in (0, 1), for methods and patterns that remove them.
        sparsities: for pattern `unstructured`.
        patterns: of the methods that have them; N:M implies its sparsity. None given: the method's own, and `rows`
            where that zeroes weights and ratios are asked for, `unstructured` where it does not and sparsities are.
        options: method -> its options.
        heal: how to heal each result; its model is replaced. None: no healing.
        bench: how to time each result beside the dense model; the models are replaced. None: no timing.
    """

    base: Request
    methods: Sequence[str]
    ratios: Sequence[float] = ()
    sparsities: Sequence[float] = ()
    patterns: Sequence[str] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heal: HealRequest | None = None
    bench: BenchRequest | None = None
