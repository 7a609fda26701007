"""Run a model one block at a time over all calibration windows.

Only one block's weights are in memory. The residual stream of all windows is one buffer, in memory or in a file. Each
block overwrites it in place. The arguments that blocks receive (positions, masks, rotary tables) are captured from the
stock model's own forward, so this module does not depend on what a family passes to its blocks.

Shape letters: S windows, B windows of a batch, T tokens, D residual.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from secateur.calibrate.packed import packed
from secateur.core.errors import SecateurError
from secateur.models.load import build_skeleton
from secateur.models.runtime import block_with_widths
from secateur.models.view import BlockView, ModelView, block_modules, other_forwards

TOKENS_A_BATCH = 1024  # large enough for fast matrix products, small enough for the caches
Listener = Callable[[Tensor], None]


class _Stop(Exception):
    """Raised inside a forward to end it, once everything needed has been captured."""


class _Recorder:
    """In place of a block's forward: notes its arguments and passes the residual on."""

    def __init__(self, last: bool) -> None:
        self.last = last
        self.arguments: dict[str, Any] = {}
        self.hidden = torch.empty(0)

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        if self.last:
            raise _Stop
        return hidden


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[_Recorder]]:
    """Record what blocks receive; the forward ends at the last one."""
    recorders = [_Recorder(last=block is blocks[-1]) for block in blocks]
    with other_forwards(blocks, [recorder.forward for recorder in recorders]):
        yield recorders


class Stream:
    """The residual stream of calibration windows, carried through a model block by block.

    Args:
        view: the model.
        windows: token ids [S, T].
        device, dtype: where and in which dtype blocks run.
        spill: a file for the residual stream; None keeps it in memory.
    """

    def __init__(
        self, view: ModelView, windows: Tensor, *, device: torch.device, dtype: torch.dtype, spill: Path | None = None
    ) -> None:
        self.view, self.device, self.dtype = view, device, dtype
        self._windows = windows
        self._batch = max(1, TOKENS_A_BATCH // windows.shape[1])
        self.skeleton = build_skeleton(view.config, dtype)
        self._blocks = block_modules(self.skeleton, view.family)
        self._classes = [type(block) for block in self._blocks]
        self._enters_as_embedded = False
        self._arguments = {size: self._capture(size) for size in {rows.stop - rows.start for rows in self.slices()}}
        self.hidden_STD = self._buffer(spill)
        self.begin()

    @property
    def buffer_bytes(self) -> int:
        """The size of the activation buffer in bytes."""
        return self.hidden_STD.numel() * self.hidden_STD.element_size()

    @contextmanager
    def loaded(self, block: BlockView, *, forward_only: bool = True) -> Iterator[nn.Module]:
        """Yield the block as a module that can run. On a CPU, float32 weights are not copied.

        Args:
            block: the block.
            forward_only: whether no gradient is needed; then the weights may be packed.
        """
        skeleton = self._blocks[block.index]
        if block.dims != self.view.dims(block.index):
            with torch.device("meta"):
                skeleton = block_with_widths(
                    self._classes[block.index], self.skeleton.config, block.index, block.dims.widths()
                )
        module = skeleton.eval()
        state = {
            name: t.to(self.device, self.dtype if t.is_floating_point() else t.dtype)
            for name, t in block.tensors.items()
        }
        module.load_state_dict(state, assign=True)
        del state  # now only the module holds the converted tensors
        if forward_only:
            with packed(module, self._windows.numel(), self._batch * self._windows.shape[1]):
                yield module
        else:
            yield module
        module.to("meta")

    @torch.inference_mode()
    def observe(self, block: BlockView, listeners: Mapping[str, Listener]) -> None:
        """Pass the inputs of matrices to listeners, [B·T, I] for each batch. The residual stream does not change.

        Args:
            block: the block to run.
            listeners: path of a linear module in the block -> a function of its input. A forward stops once all are
                called.
        """
        called: set[str] = set()
        with self.loaded(block) as module:
            hooks = [
                module.get_submodule(path).register_forward_pre_hook(_hook(path, call, called, len(listeners)))
                for path, call in listeners.items()
            ]
            for rows, arguments in self.batches(block.index):
                called.clear()
                with suppress(_Stop):
                    module(self.hidden(rows, block.dims.enters), **arguments)
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def advance(self, block: BlockView, listener: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Carry the residual stream through the block, in place.

        Args:
            block: the block to run.
            listener: a function of the residual before and after the block, [B·T, D] for each batch.
        """
        self.carry(block, [self.hidden_STD], listener)

    @torch.inference_mode()
    def carry(
        self,
        block: BlockView,
        streams_XSTD: Iterable[Tensor],
        listener: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """Carry other residual streams of these windows through the block, in place; arguments as for `advance`."""
        with self.loaded(block) as module:
            for stream_STD in streams_XSTD:
                for rows, arguments in self.batches(block.index):
                    entering_BTD = stream_STD[rows, :, : block.dims.enters].to(self.device)
                    leaving_BTD = module(entering_BTD, **arguments)
                    if listener is not None:
                        listener(entering_BTD.flatten(0, -2), leaving_BTD.flatten(0, -2))
                    stream_STD[rows, :, : block.dims.leaves] = leaving_BTD

    @torch.inference_mode()
    def advance_half(self, block: BlockView, half: str, project_DD: Tensor | None, listener: Listener | None) -> None:
        """Carry the residual stream through one half of a rotated block, in place.

        Args:
            block: a block of the canonical model, at full width.
            half: the method of the runtime's block to call, `attention_half` or `mlp_half`.
            project_DD: a matrix that the residual is multiplied with first; None leaves the residual as it is.
            listener: a function of the residual after this half, [B·T, D] for each batch.
        """
        with self.loaded(block) as module:
            run = getattr(module, half)
            for rows, arguments in self.batches(block.index):
                hidden_BTD = self.hidden_STD[rows].to(self.device)
                if project_DD is not None:
                    hidden_BTD = hidden_BTD @ project_DD
                hidden_BTD = run(hidden_BTD, **(arguments if half == "attention_half" else {}))
                if listener is not None:
                    listener(hidden_BTD.flatten(0, -2))
                self.hidden_STD[rows] = hidden_BTD

    def of_first(self, windows: int) -> Stream:
        """Return a stream of the first windows alone, from the embeddings on, in memory."""
        return Stream(self.view, self._windows[:windows], device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def show(self, listener: Listener) -> None:
        """Call `listener` with the residual stream at the current block, [B·T, D] for each batch."""
        for rows in self.slices():
            listener(self.hidden_STD[rows].to(self.device).flatten(0, -2))

    def hidden(self, rows: slice, width: int) -> Tensor:
        """Return the residual of these windows, on the device. A sliced model uses only the first `width` features."""
        return self.hidden_STD[rows, :, :width].to(self.device)

    def slices(self) -> Iterator[slice]:
        """Yield the rows of each batch of windows."""
        for start in range(0, len(self._windows), self._batch):
            yield slice(start, min(start + self._batch, len(self._windows)))

    def arguments(self, index: int, windows: int) -> dict[str, Any]:
        """Return the other arguments that block `index` receives, for any number of windows at a time."""
        if windows not in self._arguments:
            self._arguments[windows] = self._capture(windows)
        return self._arguments[windows][index]

    def batches(self, index: int) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Yield the rows of each batch of windows, with the other arguments that block `index` receives."""
        for rows in self.slices():
            yield rows, self.arguments(index, rows.stop - rows.start)

    @torch.no_grad()  # not inference mode, since these tensors may enter a graph (`backward.py`)
    def _capture(self, batch: int) -> list[dict[str, Any]]:
        """Return the arguments of every block for a batch of this size. They do not depend on the tokens."""
        decoder = self._decoder()
        inputs = torch.zeros(
            batch, self._windows.shape[1], self.view.dims(0).enters, dtype=self.dtype, device=self.device
        )
        with _recorded(list(self._blocks)) as recorders, suppress(_Stop):
            decoder(inputs_embeds=inputs, use_cache=False)
        self._enters_as_embedded = recorders[0].hidden is inputs
        return [recorder.arguments for recorder in recorders]

    @torch.inference_mode()
    def begin(self) -> None:
        """Fill the buffer with what enters the first block."""
        decoder = self._decoder()
        with _recorded([self._blocks[0]]) as (recorder,):
            for rows in self.slices():
                embedded_BTD = self._token_embedding(self._windows[rows])
                if not self._enters_as_embedded:  # OPT adds positions, say
                    with suppress(_Stop):
                        decoder(inputs_embeds=embedded_BTD, use_cache=False)
                    embedded_BTD = recorder.hidden
                self.hidden_STD[rows, :, : self.view.dims(0).enters] = embedded_BTD

    def _token_embedding(self, ids_BT: Tensor) -> Tensor:
        """What the token embedding gives, [B, T, D]. While it runs, the rows of these tokens are all of its table."""
        path = self.view.family.embeddings[0]
        row_BTD = self.view.source.rows(f"{path}.weight", ids_BT).to(self.device, self.dtype)
        table: Any = self.skeleton.get_submodule(path)
        table.padding_idx = None  # a row of the whole table, which matters to its gradient alone
        place_BT = torch.arange(ids_BT.numel(), device=self.device).view(ids_BT.shape)
        embedded_BTD: Tensor = functional_call(table, {"weight": row_BTD.flatten(0, 1)}, (place_BT,))
        return embedded_BTD

    def _decoder(self) -> nn.Module:
        """Return the base model, with everything before the first block ready to run."""
        family, model = self.view.family, self.skeleton
        for path in family.embeddings[1:]:
            module = model.get_submodule(path)
            if next(module.parameters()).is_meta:
                state = {name: t.to(self.device, self.dtype) for name, t in self.view.read_module(path).items()}
                module.load_state_dict(state, assign=True)
        make_computed_tables(model, self.device)
        decoder: nn.Module = model.get_decoder()
        return decoder

    def _buffer(self, spill: Path | None) -> Tensor:
        samples, seqlen = self._windows.shape
        widths = [
            width
            for index in range(self.view.blocks)
            for width in (self.view.dims(index).enters, self.view.dims(index).leaves)
        ]
        return new_buffer((samples, seqlen, max(widths)), self.dtype, spill)


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, spill: Path | None) -> Tensor:
    """Return an uninitialised tensor, in memory, or in a file where `spill` is given.

    Raises:
        OSError: the disk has too little space for the file.
    """
    if spill is None:
        return torch.empty(shape, dtype=dtype)
    size = torch.Size(shape).numel()
    with spill.open("wb") as file:
        # reserve the space now: on a full disk this is an error here, and would be a bus error later
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(spill), shared=True, size=size, dtype=dtype).view(shape)


def _hook(
    path: str, call: Listener, called: set[str], listeners: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        call(inputs[0].flatten(0, -2))
        called.add(path)
        if len(called) == listeners:
            raise _Stop  # the rest of the block would be computed for nothing

    return listen


def make_computed_tables(model: PreTrainedModel, device: torch.device) -> None:
    """Compute again what the meta device left empty and no file holds: rotary tables, the scale of an embedding.

    transformers does so with `_init_weights`, which passes over parameters that are marked as being there.

    Raises:
        SecateurError: this class leaves a buffer as it is.
    """
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        names = [name for name in empty if name in module._non_persistent_buffers_set]
        if not names:
            continue
        for name in names:
            module._buffers[name] = torch.full_like(module.get_buffer(name), torch.nan, device="cpu")
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
        with torch.no_grad():
            model._init_weights(module)
        for name in names:
            if module.get_buffer(name).isnan().any():
                where = f"the buffer {name} of {type(module).__name__}"
                raise SecateurError(f"transformers does not compute {where}, which no file holds; use another model")
            module._buffers[name] = module.get_buffer(name).to(device)
