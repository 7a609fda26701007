"""The activation flow: every linear map in terms of the widths, and what a narrower residual stream would leave.

Source: arXiv:2503.04377, section 2 and appendix A.1. The representation dimension d (the width of the residual stream)
is on one side of every linear map of a transformer. With d narrowed to (1 - s)d and everything else kept, each map that
d touches is multiplied by 1 - s. Widths are rounded down to whole numbers. Two things go beyond the paper. What d does
not touch is counted too: biases inside a block, the products of attention. So is what SliceGPT (arXiv:2401.15024) adds
for the narrower stream: its residual adapters, as its authors store them, and the untied head.

A model that is already sliced has adapters among its maps, and a width at each place. No table over s is made for it,
since SliceGPT slices the original model.

FLOPs are per token, two for each weight of a product. Sums, norms, activations and look-ups are not counted. Only
shapes are read, no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from secateur.core.errors import SecateurError, UsageError
from secateur.core.records import Record
from secateur.evaluate.maps import Attention, Axis, Map, attention_products, linear_maps
from secateur.models.family import ROTATE
from secateur.models.load import open_checkpoint
from secateur.models.view import BlockDims, ModelView

SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Point:
    """The model with d narrowed, and what SliceGPT adds to it.

    Attributes:
        sparsity: s as requested.
        sparsity_measured: s after the width is rounded down.
        width: floor((1 - s)d).
        parameters, flops: what remains of the model; FLOPs without the products of attention.
        adapter_parameters, adapter_flops: the cost of one width x width matrix for each residual addition (two per
            block, one where attention and MLP are parallel); 0 at s = 0, which leaves the model as it is.
        untied_parameters: the size of the head's own weight, where head and embedding were tied before: SliceGPT
            rotates them differently.
    """

    sparsity: float
    sparsity_measured: float
    width: int
    parameters: int
    flops: int
    adapter_parameters: int
    adapter_flops: int
    untied_parameters: int

    def record(self) -> Record:
        """Return the fields of a record; `sliced_*` are the sums of model, adapters and head."""
        fields = {key.replace("flops", "flops_per_token"): value for key, value in asdict(self).items()}
        sliced = self.parameters + self.adapter_parameters + self.untied_parameters
        return {**fields, "sliced_parameters": sliced, "sliced_flops_per_token": self.flops + self.adapter_flops}


@dataclass(frozen=True)
class Flow:
    """The linear maps of a model in the order in which a token meets them.

    Attributes:
        maps: the maps; equal maps of several blocks are one entry.
        attention: the products of attention, which have no weights.
        dims: the sizes of each block.
        context: the number of positions that attention looks at, the token itself included.
        parallel: whether attention and MLP read the same residual and share one addition.
        fixed: why the residual stream cannot be narrowed; None where it can be.
    """

    name: str
    family: str
    model_type: str
    maps: tuple[Map, ...]
    attention: tuple[Attention, ...]
    dims: tuple[BlockDims, ...]
    context: int
    parallel: bool
    fixed: str | None = None

    @property
    def sliced(self) -> bool:
        """True if blocks read and write a residual stream, or parts of one, narrower than the hidden size."""
        return self.dims[0].residual is not None

    @property
    def hidden(self) -> int:
        """The hidden size of the configuration: d before any slicing."""
        return self.dims[0].hidden

    @property
    def widths(self) -> list[int]:
        """The residual width where it enters the first block and after each addition."""
        widths = [self.dims[0].enters]
        for dims in self.dims:
            if not self.parallel:
                sliced = dims.residual and not dims.residual.selected
                widths.append(dims.residual.attention[1] if dims.residual and sliced else dims.hidden)
            widths.append(dims.leaves)
        return widths

    @property
    def width(self) -> int:
        """The residual width d where it enters the first block. Other places of a sliced model: see `widths`."""
        return self.dims[0].enters

    @property
    def adapters(self) -> int:
        """The number of residual additions. In SliceGPT each has an adapter."""
        return len(self.dims) * (1 if self.parallel else 2)

    def symbols(self) -> dict[str, int | list[int]]:
        """Return the value of each letter.

        h, g and m are lists with one entry per block; d of a sliced model has one entry per place, r one per adapter
        that has a rank.
        """
        single: dict[str, int | list[int]] = {
            axis.symbol: axis.size
            for linear_map in self.maps
            if not linear_map.blocks
            for axis in linear_map.axes
            if axis.symbol in "dVP"
        }
        if self.sliced:
            ranks = [
                form for dims in self.dims if dims.residual for form in dims.residual.skips if isinstance(form, int)
            ]
            single |= {"d": self.widths} | ({"r": ranks} if ranks else {})
        several = {
            "h": [dims.heads for dims in self.dims],
            "g": [dims.groups for dims in self.dims],
            "m": [dims.ffn for dims in self.dims],
        }
        return {**single, "k": self.dims[0].head_width, **several}

    def parameters(self, sparsity: float = 0.0) -> int:
        """Count all parameters, a tied weight once."""
        return sum(linear_map.parameters(sparsity) for linear_map in self.maps)

    def touched_parameters(self) -> int:
        """Count the parameters that shrink with d."""
        return sum(linear_map.touched_parameters() for linear_map in self.maps)

    def flops(self, sparsity: float = 0.0) -> int:
        """Return the FLOPs per token of the linear maps."""
        return sum(linear_map.flops(sparsity) for linear_map in self.maps)

    def touched_flops(self) -> int:
        """Return the FLOPs per token of the maps that have d as an axis."""
        return sum(linear_map.flops() for linear_map in self.maps if linear_map.touched)

    def attention_flops(self) -> int:
        """Return the FLOPs per token of the products of attention at this context."""
        return sum(products.flops() for products in self.attention)

    @property
    def refusal(self) -> str | None:
        """The reason why there is no table over s; None where there is one."""
        if not self.sliced:
            return f"{self.name}: no residual stream of this family is narrowed: {self.fixed}" if self.fixed else None
        if (residual := self.dims[0].residual) is not None and residual.selected:
            return (
                f"{self.name}: its blocks already read and write parts of the residual stream; "
                "inspect the original model to see what s would leave of it"
            )
        return (
            f"{self.name}: its residual stream is already sliced, from {self.hidden}, and has its own adapters; "
            "inspect the original model to see what s would leave of it"
        )

    def at(self, sparsity: float) -> Point:
        """Return the sizes of the model with d narrowed to (1 - s)d.

        Raises:
            SecateurError: the model is sliced already, or its residual stream cannot be narrowed.
        """
        if self.refusal is not None:
            raise SecateurError(self.refusal)
        width = Axis("d", self.width).at(sparsity)
        adapters = self.adapters * width * width if sparsity else 0
        untied = sum(replace(linear_map, tied=False).parameters(sparsity) for linear_map in self.maps)
        tied = untied - self.parameters(sparsity)
        return Point(
            sparsity=sparsity,
            sparsity_measured=1 - width / self.width,
            width=width,
            parameters=self.parameters(sparsity),
            flops=self.flops(sparsity),
            adapter_parameters=adapters,
            adapter_flops=2 * adapters,
            untied_parameters=tied if sparsity else 0,
        )

    def record(self, sparsities: Sequence[float] = SPARSITIES) -> Record:
        """Return the record: `flow` (the maps), `attention`, `by_sparsity`, `formula`, and `touched` (the share of d).

        For a sliced model `sliced` has the hidden size and the widths. Without a table over s `by_sparsity` is empty,
        `formula` is null, and `why_no_by_sparsity` is the reason.
        """
        parameters, flops, attention = self.parameters(), self.flops(), self.attention_flops()
        by_d, flops_by_d = self.touched_parameters(), self.touched_flops()
        return {
            "command": "inspect",
            "model": self.name,
            "family": self.family,
            "model_type": self.model_type,
            "symbols": self.symbols(),
            "parameters": parameters,
            "flops_per_token": flops,
            "flow": [linear_map.record() for linear_map in self.maps],
            "attention": {
                "context": self.context,
                "flops_per_token": attention,
                "products": [products.record() for products in self.attention],
            },
            "sliced": {"hidden": self.hidden, "widths": self.widths} if self.sliced else None,
            "why_no_by_sparsity": self.refusal,
            "by_sparsity": [] if self.refusal else [self.at(sparsity).record() for sparsity in sparsities],
            "formula": None
            if self.refusal
            else {
                "parameters": f"(1 - s) * {by_d} + {parameters - by_d}",
                "flops_per_token": f"(1 - s) * {flops_by_d} + {flops - flops_by_d}",
                "adapter_parameters": f"{self.adapters} * ((1 - s) * {self.width})**2",
                "adapter_flops_per_token": f"{2 * self.adapters} * ((1 - s) * {self.width})**2",
            },
            "touched": {
                "parameters": by_d,
                "parameters_share": by_d / parameters,
                "flops_per_token": flops_by_d,
                "flops_share": flops_by_d / flops,
                "flops_share_with_attention": flops_by_d / (flops + attention),
            },
        }


def inspect_flow(model: str | Path, revision: str | None = None, context: int | None = None) -> Flow:
    """Return the activation flow of a checkpoint, pruned or not, from the headers of its files.

    Raises:
        UsageError: the model has no positions for such a context.
        SecateurError: the model cannot be opened.
    """
    return activation_flow(open_checkpoint(str(model), revision).view(), context)


def activation_flow(view: ModelView, context: int | None = None) -> Flow:
    """Return the activation flow of a model.

    Args:
        view: the model; only shapes are read.
        context: the number of positions that attention looks at; None takes min(2048, the model's maximum).

    Raises:
        UsageError: the model has no positions for such a context.
    """
    longest = int(view.config.max_position_embeddings)
    context = min(_DEFAULT_CONTEXT, longest) if context is None else context
    if not 1 <= context <= longest:
        raise UsageError(f"--context {context} is outside [1, {longest}], the lengths this model knows")
    return Flow(
        name=view.name,
        family=view.family.name,
        model_type=view.config.model_type,
        maps=tuple(linear_maps(view)),
        attention=tuple(attention_products(view, context)),
        dims=tuple(view.dims(index) for index in range(view.blocks)),
        context=context,
        parallel=view.family.parallel,
        fixed=view.family.why_not(ROTATE),
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in short form, such as `0-3, 5`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
