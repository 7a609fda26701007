"""The settings of each command as a frozen dataclass: the defaults of the command line and of `secateur.api`.

Nothing here imports torch, so that `--help` can show the defaults without waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class _Settings:
    """A request, which takes a `Path` for text that names a file or a folder, such as a model."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Path) and "Path" not in str(one.type):
                object.__setattr__(self, one.name, str(value))


@dataclass(frozen=True)
class Request(_Settings):
    """The settings of `prune`, with the defaults of the command line.

    Attributes:
        model: a local folder, a hub name, or `bundled`.
        method: the name of a method. Without one, `params_removed` takes `search`, a pattern of zeros `sparsegpt` with
            `refine=2`, both with `reconstruct` (`prune.default.with_method`).
        sparsity: the fraction to remove, in [0, 1). N:M implies it; `params_removed` or `modules` may replace it.
        params_removed: the pruning ratio to reach, over all parameters; instead of `sparsity`.
        modules: per-module sparsity, `NAME=S,...`.
        pattern: `unstructured`, `N:M`, `rows` or `columns`; None takes the method's default.
        calibration: a text SPEC; None takes the method's default.
        samples, seqlen: the number of calibration windows and their length in tokens. None takes the values of the
            method's paper, or 128 and 2048; the length is at most the model's maximum.
        seed: the seed of every random choice.
        device, dtype: `auto`, or a name.
        options: the options of the method.
        spill: keep the activation buffer in a file beside the output.
        stock_only: refuse plans that a stock architecture cannot express.
        include_path: a folder of task files for lm-eval, for a calibration on `task:NAME`.
        prompt_form: how rows of instructions become text: `chat` (the tokenizer's chat template), `plain` (the form of
            the Alpaca project), or `auto`: chat where the tokenizer has a template, and plain for the text `alpaca`.
        at_least: with `params_removed`, take the smallest step that removes at least that much, not the nearest step.
        ignore_unknown: skip tensors in the files that the model does not have, instead of raising an error.
        reconstruct: then train the result block by block towards the dense model (`ReconstructRequest` has the
            settings), on the same text.
    """

    model: str
    method: str = ""
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
    prompt_form: str = "auto"
    ignore_unknown: bool = False
    reconstruct: bool = False


@dataclass(frozen=True)
class EvalRequest(_Settings):
    """The settings of `eval`, with the defaults of the command line.

    Attributes:
        model: a folder (pruned or not), a hub name, or `bundled`.
        text: a text SPEC; None takes the text of the protocol.
        protocol: a name from `PROTOCOLS`; None takes the protocol that belongs to the text.
        seqlen: the length of a window in tokens; None takes the length of the protocol.
        tasks: names of tasks of lm-eval, or presets of them; `cloze` is built in.
        limit: use only the first N windows, and the first N items of each task.
        items: use only the first N items of each task; None takes `limit`.
        against, against_revision: the dense model to compare with, and its hub revision.
        shift: with `against`, also measure how the behaviour shifted; False compares perplexities alone.
        include_path: a folder of task files for lm-eval.
    """

    model: str
    text: str | None = None
    protocol: str | None = None
    seqlen: int | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None
    items: int | None = None
    against: str | None = None
    against_revision: str | None = None
    shift: bool = True
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    text_field: str = "text"
    include_path: str | Path | None = None

    @property
    def items_a_task(self) -> int | None:
        """The number of items of each task to use; None is all."""
        return self.limit if self.items is None else self.items


@dataclass(frozen=True)
class HealRequest(_Settings):
    """The settings of `heal`, with the defaults of the command line.

    Attributes:
        model: the folder of a checkpoint that secateur wrote.
        calibration: a text SPEC, or instruction data; None takes the calibration text of the pruning.
        steps: the number of optimiser steps.
        batch: windows (or instructions) per step.
        lr, schedule: the highest learning rate, and its course after the first twentieth of the steps: `cosine` or
            `constant`.
        weight_decay: the weight decay of AdamW.
        rank, alpha: the rank of the adapters; updates are multiplied by alpha / rank.
        targets: the matrices that get an adapter: names as in `--modules`.
        completion_only: learn only the answers of instruction data.
        keep_adapter: write the adapter, in peft's form, instead of merging it.
        samples, seqlen: the number of windows and their length in tokens; None is min(1024, the model's maximum).
        save_every: steps between two saves.
        checkpointing: keep one activation per block and recompute the others: a third more time, much less memory.
        include_path: a folder of task files for lm-eval, for healing on `task:NAME`.
        prompt_form: how rows of instructions become text, as in `Request`; on the calibration text of the pruning,
            `auto` takes the form that it had there.
        text, protocol, limit: the text that perplexity is measured on, before and after; see `EvalRequest`.
        eval_seqlen: the length of a window of that text in tokens; None takes the length of the protocol.
        evaluate: measure perplexity before and after; False leaves it to `eval`.
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
    eval_seqlen: int | None = None
    evaluate: bool = True
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    text_field: str = "text"
    include_path: str | Path | None = None
    prompt_form: str = "auto"


@dataclass(frozen=True)
class ReconstructRequest(_Settings):
    """The settings of `reconstruct`, with the defaults of the command line.

    Attributes:
        model: the folder of a checkpoint that secateur wrote.
        dense, dense_revision: the model that it was pruned from, and its hub revision; None takes the one that the plan
            names.
        calibration: a text SPEC; None takes the calibration text of the pruning.
        samples, seqlen: the number of windows and their length in tokens; None is min(512, the model's maximum).
        steps: the number of optimiser steps for each block.
        batch: tokens a step, in whole windows; at most all windows that are learned from.
        lr: the highest learning rate, in units of the root mean square of each tensor.
        held_out: the share of the windows that tells which state of a block is the best; nothing is learned from them.
        spill: keep the two residual streams in files instead of memory.
        include_path: a folder of task files for lm-eval, for `task:NAME`.
        prompt_form: how rows of instructions become text, as in `Request`; on the calibration text of the pruning,
            `auto` takes the form that it had there.
    """

    model: str
    dense: str | None = None
    dense_revision: str | None = None
    calibration: str | None = None
    samples: int = 128
    seqlen: int | None = None
    steps: int = 200
    batch: int = 1024
    lr: float = 0.03
    held_out: float = 0.1
    seed: int = 0
    spill: bool = False
    device: str = "auto"
    text_field: str = "text"
    include_path: str | Path | None = None
    prompt_form: str = "auto"


@dataclass(frozen=True)
class BenchRequest(_Settings):
    """The settings of `bench`, with the defaults of the command line.

    Attributes:
        model: a folder (pruned or not), a hub name, or `bundled`.
        dense: a model to compare with; None measures only `model`.
        batches: the batch sizes, in sequences; each is measured.
        prompt: tokens in the prompt of each sequence.
        new: tokens to generate after the prompt.
        repeats: the number of turns of each model; the best one counts.
        semi_structured: multiply by the 2:4 matrices of `model` in torch's compressed form, on an accelerator that
            supports it.
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
class GenerateRequest(_Settings):
    """The settings of `generate`, with the defaults of the command line.

    Attributes:
        model: a folder (pruned or not), a hub name, or `bundled`.
        dense: a model whose text is put beside; None writes with `model` alone.
        prompt: the texts to go on from, or one text.
        prompts: a file with more of them, one a line; empty lines are skipped.
        chat: put each prompt into the chat template of the tokenizer, as a message of the user, if it has one.
        new: the largest number of tokens to write after each prompt.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: draw from the likeliest tokens that have this share of the probability together.
        seed: the seed of the draws, the same for every prompt and model.
        revision, dense_revision: the hub revisions of the two models.
    """

    model: str
    dense: str | None = None
    prompt: Sequence[str] = ()
    prompts: str | Path | None = None
    chat: bool = True
    new: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    revision: str | None = None
    dense_revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class ModulesRequest:
    """The settings of `study modules`, with the defaults of the command line: what it varies and how it runs.

    Attributes:
        kinds: names as in `--modules`; empty takes each projection of the family, then attention, mlp and all.
        sparsities: in [0, 1]; empty takes `study.modules.SPARSITIES`, or the sparsity that the pattern implies.
        weights: numbers of weights; each is also removed from every kind that has that many.
        grid: sparsities to combine, of attention and of MLP.
        mode: `shared`: all runs use the statistics of the dense model; `sequential`: each run is done as in `prune`.
        jobs: the number of processes that share the runs; each keeps the model and the statistics in memory.
        engine: `processes` on this machine, or `ray`: the processes of a Ray cluster (at `RAY_ADDRESS`, or one started
            here) that can read the same files.
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
    """The settings of `compare`: the runs that it puts side by side.

    Attributes:
        base: the model and its calibration; method, sparsity, pattern and options are replaced.
        methods: the names of the methods.
        ratios: pruning ratios over all parameters, in (0, 1), for methods and patterns that remove parameters.
        sparsities: the sparsities of pattern `unstructured`.
        patterns: the patterns, for methods that have a choice; N:M implies its sparsity. Empty takes the method's own
            pattern. If that zeroes weights and `ratios` are given, `rows` is added; if it removes parameters and
            `sparsities` are given, `unstructured` is added.
        options: method -> its options.
        heal: the settings to heal each result with; `model` is replaced. None: no healing.
        bench: the settings to time each result with, beside the dense model; the models are replaced. None: no timing.
    """

    base: Request
    methods: Sequence[str]
    ratios: Sequence[float] = ()
    sparsities: Sequence[float] = ()
    patterns: Sequence[str] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heal: HealRequest | None = None
    bench: BenchRequest | None = None
