"""A stock model whose blocks read and write through gates, by hooks placed once (arXiv:2410.11988, equations 2 and 3).

    x + S2 attention(S1 norm(x)),    x + S5 down(S4 middle(S3 norm(x)))

Biases of what writes are masked with it, since the cut drops them. The MLP's middle is masked once, where `down` reads
it. A norm that attention and MLP share (Phi) is read twice; where q, k and v choose for themselves, each reads it.
Weights are frozen: gradients reach the gates alone. A step sets one list of tensors and walks no modules.

Shape letters: B windows, T tokens, D residual, N gates of a structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from secateur.calibrate.stream import make_computed_tables
from secateur.core.distributed import size
from secateur.models.load import build_skeleton
from secateur.models.loss import hidden_states, mean_loss
from secateur.models.runtime import SELECT_FIRST
from secateur.models.view import ModelView
from secateur.plan.structures import Structures


class MaskedModel:
    """A model in memory, with gates.

    Args:
        view: the model; its weights are not copied if device and dtype are already right.
        structures: the gates of the model.
        form: how blocks read: norm all features and then mask, or norm over the open gates alone, see
            `runtime.Select`.
        device, dtype: the device and dtype of the computation.
        autocast: compute products in bfloat16 whatever the dtype.
        checkpointing: store only the input of each block, and run the block again in the backward pass.

    With several processes, each holds a share of every block (FSDP2), and all of the embeddings and the head.
    """

    def __init__(
        self,
        view: ModelView,
        structures: Structures,
        form: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        autocast: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.structures, self.form, self.device, self.dtype, self.autocast = structures, form, device, dtype, autocast
        self._gates: list[Tensor] = []
        self._scales: list[Tensor] | None = None
        self._second: dict[int, Tensor] = {}
        family = view.family
        self.norm, self.epsilon = family.norm, family.norm.epsilon_of(view.config)
        self.model = build_skeleton(view.config, dtype).requires_grad_(False)
        for index in range(view.blocks):
            block = self.model.get_submodule(f"{family.blocks}.{index}")
            self._load(view, block, view.block_prefix(index))
            self._hook_block(block, index, view)
            if checkpointing:
                _run_again_on_the_way_back(block)
            if size() > 1:
                fully_shard(block)
        self._load(view, self.model, "")
        self.model.tie_weights()
        make_computed_tables(self.model, device)
        self.model.requires_grad_(False).eval()
        if size() > 1:  # fetches the next block while one computes
            decoder = self.model.get_decoder()
            fully_shard(decoder, ignored_params={p for p in decoder.parameters() if not isinstance(p, DTensor)})

    def _load(self, view: ModelView, module: nn.Module, prefix: str) -> None:
        """Load the weights that are still missing from a module."""
        missing = {name for name, tensor in module.state_dict().items() if tensor.is_meta}
        names = [
            name for name in view.source.names() if name.startswith(prefix) and name.removeprefix(prefix) in missing
        ]
        state = {name.removeprefix(prefix): view.source.read(name).to(self.device, self.dtype) for name in names}
        module.load_state_dict(state, strict=False, assign=True)

    def logits(self, ids_BT: Tensor, gate_N: Tensor) -> Tensor:
        """The logits [B, T, V] with these gates [N], structure after structure. A tensor [2 N] holds the gates and then
        the scales.
        """
        self._set(gate_N, self.dtype)
        logits_BTV: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV

    def loss(self, ids_BT: Tensor, gate_N: Tensor) -> Tensor:
        """Cross-entropy of the next token, nats a token, float32 or better. It keeps no logits: `models/loss.py`."""
        self._set(gate_N, torch.bfloat16 if self.autocast else self.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            hidden_BTD = hidden_states(self.model, ids_BT)[:, :-1]
            return mean_loss(self.model, hidden_BTD.flatten(0, 1), ids_BT[:, 1:].flatten())

    def _set(self, gate_N: Tensor, dtype: torch.dtype) -> None:
        parts = gate_N.to(dtype).split(sum(self.structures.widths))
        self._gates = self.structures.split(parts[0])
        self._scales = self.structures.split(parts[1]) if len(parts) > 1 else None

    def _gate(self, index: int, selection: str) -> Tensor:
        return self._gates[self.structures.uses[index][selection]]

    def _stretched(self, x_BTN: Tensor, index: int, selection: str, bias_N: Tensor | None = None) -> Tensor:
        """Multiply by the scales, except for the bias: the cut folds scales into matrices, not into biases."""
        if self._scales is None:
            return x_BTN
        scale_N = self._scales[self.structures.uses[index][selection]]
        return x_BTN * scale_N if bias_N is None else (x_BTN - bias_N) * scale_N + bias_N

    def _hook_block(self, block: nn.Module, index: int, view: ModelView) -> None:
        family = view.family

        def write(selection: str) -> Any:
            return lambda module, inputs, output: (
                self._stretched(output, index, selection, module.bias) * self._gate(index, selection)
            )

        def middle(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self._stretched(inputs[0], index, "ffn") * self._gate(index, "ffn"), *inputs[1:])

        def read(selection: str, *, also: str | None = None) -> Any:
            def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if also is not None:
                    self._second[index] = self._stretched(
                        self._read(norm, inputs[0], output, self._gate(index, also)), index, also
                    )
                if selection not in self.structures.uses[index]:  # q, k and v read for themselves
                    return inputs[0] if self.form == SELECT_FIRST else output
                return self._stretched(
                    self._read(norm, inputs[0], output, self._gate(index, selection)), index, selection
                )

            return hook

        norms = [block.get_submodule(path) for path in family.norms]
        if "q_in" in self.structures.uses[index]:
            self._separate(block, index, view)
        if family.one_norm:
            norms[0].register_forward_hook(read("attention_in", also="mlp_in"))
            block.get_submodule(family.mlp[0]).register_forward_pre_hook(
                lambda module, inputs: (self._second.pop(index), *inputs[1:])
            )
        else:
            norms[0].register_forward_hook(read("attention_in"))
            norms[1].register_forward_hook(read("mlp_in"))
        block.get_submodule(family.matrices["o"]).register_forward_hook(write("attention_out"))
        block.get_submodule(family.matrices["down"]).register_forward_pre_hook(middle)
        block.get_submodule(family.matrices["down"]).register_forward_hook(write("mlp_out"))

    def _separate(self, block: nn.Module, index: int, view: ModelView) -> None:
        """Let q, k and v read through their own gates; a fused module of all three becomes three products."""
        norm, paths = block.get_submodule(view.family.norms[0]), {name: view.family.matrices[name] for name in "qkv"}

        def read(hidden: Tensor, name: str) -> Tensor:  # receives what the hook of the norm lets through
            return self._stretched(
                self._read(norm, hidden, hidden, self._gate(index, f"{name}_in")), index, f"{name}_in"
            )

        if len(set(paths.values())) == 1:
            rows = [view.dims(index).shape(name)[0] for name in paths]
            block.set_submodule(
                paths["q"],
                _ThreeLinears(
                    block.get_submodule(paths["q"]), rows, lambda hidden: [read(hidden, name) for name in paths]
                ),
            )
            return
        for name, path in paths.items():
            block.get_submodule(path).register_forward_pre_hook(
                lambda module, inputs, name=name: (read(inputs[0], name), *inputs[1:])
            )

    def _read(self, norm: Any, hidden_BTD: Tensor, normed_BTD: Tensor, gate_D: Tensor) -> Tensor:
        if self.form != SELECT_FIRST:
            return normed_BTD * gate_D
        gain_D, shift_D = self.norm.gain(norm.weight), getattr(norm, "bias", None)
        return masked_norm(hidden_BTD, gate_D, gain_D, shift_D, self.epsilon, centred=self.norm.centred)


class _ThreeLinears(nn.Module):
    """The q, k and v of one fused module, each with its own input."""

    def __init__(self, linear: Any, rows: list[int], reads: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.linear, self.rows, self.reads = linear, rows, reads

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        biases = [None] * 3 if self.linear.bias is None else self.linear.bias.split(self.rows)
        parts = zip(self.reads(hidden_BTD), self.linear.weight.split(self.rows), biases, strict=True)
        return torch.cat([nn.functional.linear(*part) for part in parts], -1)


def _run_again_on_the_way_back(block: nn.Module) -> None:
    forward = block.forward
    # nothing in a frozen block is random, so the states of random generators need not be stored
    block.forward = lambda *inputs, **named: checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named
    )


def masked_norm(
    hidden_BTD: Tensor, gate_D: Tensor, gain_D: Tensor | None, shift_D: Tensor | None, epsilon: float, *, centred: bool
) -> Tensor:
    """The norm over the features of the open gates. It divides by their number: dividing by D would change the size of
    the output by sqrt(D / open).
    """
    precise = torch.promote_types(hidden_BTD.dtype, torch.float32)
    gate_D = gate_D.to(precise)
    count = gate_D.sum().clamp(min=1e-6)
    open_BTD = hidden_BTD.to(precise) * gate_D
    if centred:
        open_BTD = (open_BTD - open_BTD.sum(-1, keepdim=True) / count) * gate_D
    unit_BTD = (open_BTD * torch.rsqrt(open_BTD.square().sum(-1, keepdim=True) / count + epsilon)).to(hidden_BTD.dtype)
    if gain_D is not None:
        unit_BTD = unit_BTD * gain_D
    return unit_BTD if shift_D is None else unit_BTD + shift_D * gate_D.to(hidden_BTD.dtype)


def keep_gates(structures: Structures, keep: Sequence[Tensor]) -> Tensor:
    """Gates [N], float32: 1 at the kept indices of each structure, 0 elsewhere."""
    gates = []
    for width, indices in zip(structures.widths, keep, strict=True):
        gate_N = torch.zeros(width)
        gate_N[indices.long()] = 1
        gates.append(gate_N)
    return torch.cat(gates)
