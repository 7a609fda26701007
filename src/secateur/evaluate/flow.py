"""The activation flow: every linear map of a model in terms of its widths, and what a narrower residual stream would leave of it.

Source: arXiv:2503.04377, section 2 and appendix A.1: the representation dimension d (the width of the residual stream) is on one side of
every linear map of a transformer, so with d narrowed to (1 - s)d and all else kept, what d touches is multiplied by 1 - s. Widths are
rounded down to whole ones. Beyond the paper: what d does not touch is counted (biases inside a block, the products of attention), and so
is what SliceGPT (arXiv:2401.15024) pays for the narrower stream: its residual adapters, as its authors store them, and the untied head.

A model that is sliced already has its own adapters, which are among its maps, and a width a place; what a still narrower one would have is not
said of it, since SliceGPT slices the original.

FLOPs are per token, two for each weight of a product; sums, norms, activations and look-ups are not counted. Shapes alone are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from secateur.core.errors import SecateurError, UsageError
from secateur.core.records import Record
from secateur.evaluate.maps import Attention, Axis, Map, attention_products, linear_maps
from secateur.models.load import open_checkpoint
from secateur.models.view import BlockDims, ModelView

SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Point:
    """The model with d narrowed, and what SliceGPT adds to it.

    Attributes:
        sparsity: s as asked; `sparsity_measured` is that of the whole width.
        width: floor((1 - s)d).
        parameters, flops: what remains of the model; FLOPs without the products of attention.
        adapter_parameters, adapter_flops: one width x width matrix a residual addition (two a block, one where the residual is
            parallel); none at s = 0, which leaves the model as it is.
        untied_parameters: the head's own weight where it was tied: SliceGPT rotates it apart from the embedding.
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
        """As data; `sliced_*` are the sums."""
        fields = {key.replace("flops", "flops_per_token"): value for key, value in asdict(self).items()}
        sliced = self.parameters + self.adapter_parameters + self.untied_parameters
        return {**fields, "sliced_parameters": sliced, "sliced_flops_per_token": self.flops + self.adapter_flops}


@dataclass(frozen=True)
class Flow:
    """The linear maps of a model in the order in which a token meets them.

    Attributes:
        maps: equal ones of several blocks together.
        attention: the products that have no weights.
        dims: the sizes of each block.
        context: the positions before and with a token that attention looks at.
        parallel: whether attention and MLP read the same residual, and so share one addition.
    """

    name: str
    family: str
    model_type: str
    maps: tuple[Map, ...]
    attention: tuple[Attention, ...]
    dims: tuple[BlockDims, ...]
    context: int
    parallel: bool

    @property
    def sliced(self) -> bool:
        """Whether the residual stream, or what blocks read and write of it, is narrower than the hidden size of the configuration."""
        return self.dims[0].residual is not None

    @property
    def hidden(self) -> int:
        """The hidden size of the configuration: d before any slicing."""
        return self.dims[0].hidden

    @property
    def widths(self) -> list[int]:
        """The residual width where it enters the first block and after each addition."""
        found = [self.dims[0].enters]
        for dims in self.dims:
            if not self.parallel:
                found.append(
                    dims.residual.attention[1] if dims.residual and not dims.residual.selected else dims.hidden
                )
            found.append(dims.leaves)
        return found

    @property
    def width(self) -> int:
        """The residual width d; of a sliced model, where it enters the first block (see `widths`)."""
        return self.dims[0].enters

    @property
    def adapters(self) -> int:
        """How many residual additions there are, each of which has an adapter in SliceGPT."""
        return len(self.dims) * (1 if self.parallel else 2)

    def symbols(self) -> dict[str, int | list[int]]:
        """What the letters stand for; h, g and m have an entry a block, d of a sliced model one a place, r one an adapter that has a rank."""
        single: dict[str, int | list[int]] = {
            axis.symbol: axis.size
            for found in self.maps
            if not found.blocks
            for axis in found.axes
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
        """All parameters, a tied weight once."""
        return sum(found.parameters(sparsity) for found in self.maps)

    def touched_parameters(self) -> int:
        """Those that go with d."""
        return sum(found.touched_parameters() for found in self.maps)

    def flops(self, sparsity: float = 0.0) -> int:
        """FLOPs per token of the linear maps."""
        return sum(found.flops(sparsity) for found in self.maps)

    def touched_flops(self) -> int:
        """Those of maps that have d on a side."""
        return sum(found.flops() for found in self.maps if found.touched)

    def attention_flops(self) -> int:
        """FLOPs per token of the products of attention at the context."""
        return sum(found.flops() for found in self.attention)

    @property
    def refusal(self) -> str:
        """Why nothing is said of a sliced model by s."""
        if (residual := self.dims[0].residual) is not None and residual.selected:
            return f"{self.name}: its blocks already read and write parts of the residual stream; ask what s would leave of the original model"
        return f"{self.name}: its residual stream is already sliced, from {self.hidden}, and has its own adapters; ask what s would leave of the original model"

    def at(self, sparsity: float) -> Point:
        """The model where d is (1 - s)d.

        Raises:
            SecateurError: the model is sliced already.
        """
        if self.sliced:
            raise SecateurError(self.refusal)
        width = Axis("d", self.width).at(sparsity)
        adapters = self.adapters * width * width if sparsity else 0
        tied = sum(replace(found, tied=False).parameters(sparsity) - found.parameters(sparsity) for found in self.maps)
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
        """Everything as data: `flow` (the maps), `attention`, `by_sparsity`, `formula`, and the share that d touches (`touched`).

        Of a sliced model `sliced` has the hidden size and the widths, `by_sparsity` is empty and `formula` null.
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
            "flow": [found.record() for found in self.maps],
            "attention": {
                "context": self.context,
                "flops_per_token": attention,
                "products": [found.record() for found in self.attention],
            },
            "sliced": {"hidden": self.hidden, "widths": self.widths, "why_no_by_sparsity": self.refusal}
            if self.sliced
            else None,
            "by_sparsity": [] if self.sliced else [self.at(sparsity).record() for sparsity in sparsities],
            "formula": None
            if self.sliced
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


def inspect_flow(model: str, revision: str | None = None, context: int | None = None) -> Flow:
    """The activation flow of a checkpoint, pruned or not, from the headers of its files.

    Raises:
        UsageError, SecateurError: no such model, or a context it has no positions for.
    """
    return activation_flow(open_checkpoint(model, revision).view(), context)


def activation_flow(view: ModelView, context: int | None = None) -> Flow:
    """The activation flow of a model.

    Args:
        view: the model; shapes alone are read.
        context: the positions that attention looks at; None is min(2048, the model's maximum).

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
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-3, 5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
