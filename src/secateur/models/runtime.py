"""Pruned model classes: the stock ones, with blocks whose widths differ.

This file is copied into a checkpoint as `modeling_secateur.py`, so it imports nothing but torch and transformers, and a
checkpoint loads with `trust_remote_code=True` where secateur is not installed. Where it is, `import secateur` registers the same
classes and no remote code is needed.

`config.pruned_widths` holds one entry a block, `{"heads": H, "groups": G, "ffn": F}`: query heads, key-value heads, feed-forward
units. Every block is the stock block, built from a configuration that has that block's widths.

Where the residual stream itself is narrower (SliceGPT, arXiv:2401.15024), `config.pruned_residual` describes it and each entry of
`pruned_widths` has more: `"attention": [in, out]`, `"mlp": [in, out]`, the widths of the residual that attention and MLP read and
write, and `"skips"`, what lies on the two residual connections (on the one of a parallel block). The modules inside a block stay
the stock ones; what changes is the line between them: norms without gain, and a `Skip` from one basis of the residual to the next.

Where gains are stored with an offset, as w of 1 + w (Gemma), `pruned_residual` has `"norm"` with that offset, epsilon, and whether norms subtract the mean.

Where blocks read and write parts of a residual that stays whole (DISP-LLM, arXiv:2410.11988, algorithm 1), the same fields give the widths of the
parts, and a `Select` lies where a `Skip` would: it holds which features are read and which are written, as index maps in the safetensors file. With
`"readers": [q, k, v]` those three select for themselves, and a `Reader` stands where each was. How long this takes: docs/inference.md.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, linear, pad, rms_norm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

MODULE = "modeling_secateur"
PREFIX = "secateur_"
NORM_FIRST, SELECT_FIRST = SELECT_FORMS = ("norm, select", "select, norm")
SECOND_NORM = "mlp_norm"  # of a parallel block whose attention and MLP norm different features
_READ, _WRITE = "read_index_map", "write_index_map"


class BlockConfig:
    """A view of a configuration in which a few fields have the values of one block; all else follows the original."""

    def __init__(self, config: PreTrainedConfig, **fields: Any) -> None:
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)


class UnitNorm(nn.Module):
    """x / sqrt(sum(x^2) / D + epsilon), without gain, for a residual of which `width` of D directions are left.

    The mean square is over the original D: what was removed counts as zero (it would otherwise grow by D / width).
    """

    def __init__(self, width: int, original: int, epsilon: float) -> None:
        super().__init__()
        self.width, self.scale, self.epsilon = width, (original / width) ** 0.5, epsilon * original / width

    def forward(self, hidden_BTW: Tensor) -> Tensor:
        """[..., width] to the same shape; 16-bit input is normed in float32."""
        normed = rms_norm(hidden_BTW, (self.width,), eps=self.epsilon)
        return normed if self.scale == 1 else normed * self.scale

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.width}, scale={self.scale:.4g}, eps={self.epsilon:.3g}"


class Skip(nn.Module):
    """A residual connection from one basis of the residual stream to the next.

    Three forms of the same map, [..., inputs] to [..., outputs], chosen by size when a model is pruned:

    - `None`: the identity; zeros are appended, or the last features dropped, where the widths differ. No parameters.
    - a number k: the identity less a product of rank k, x - (x L) R^T, with L [inputs, k] and R [outputs, k]. Between equal widths
      the map is symmetric and R is L.
    - `"dense"`: x W^T.
    """

    def __init__(self, inputs: int, outputs: int, form: int | str | None) -> None:
        super().__init__()
        self.inputs, self.outputs, self.form = inputs, outputs, form
        if form == "dense":
            self.weight = nn.Parameter(torch.empty(outputs, inputs))
        elif form is not None:
            assert isinstance(form, int)
            self.left = nn.Parameter(torch.empty(inputs, form))
            if inputs != outputs:
                self.right = nn.Parameter(torch.empty(outputs, form))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self.form == "dense":
            return linear(hidden, self.weight)
        resized = hidden
        if self.inputs != self.outputs:
            resized = (
                pad(hidden, (0, self.outputs - self.inputs))
                if self.outputs > self.inputs
                else hidden[..., : self.outputs]
            )
        if self.form is None:
            return resized
        right = self.left if self.inputs == self.outputs else self.right
        return resized - linear(linear(hidden, self.left.t()), right)

    def read(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """What attention or MLP receives."""
        return norm(hidden)  # type: ignore[no-any-return]

    def join(self, hidden: Tensor, update: Tensor) -> Tensor:
        """The residual after it."""
        return self(hidden) + update  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.inputs}, {self.outputs}, form={self.form}"


def _pick(hidden: Tensor, index_map: Tensor) -> Tensor:
    """[..., D] to the selected features [..., W]. On a CPU a gather takes a sixth of the time of an `index_select` along the last of three dimensions."""
    return hidden.gather(-1, index_map.expand(*hidden.shape[:-1], -1))


class PartNorm(nn.Module):
    """A norm over all features, of which some are wanted: [..., D] to [..., width]. Gain and bias are those of the selected features.

    Without them a norm is one fused operation in torch, and what follows touches the selected features alone.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: Any, width: int, described: dict[str, Any] | None) -> None:
        super().__init__()
        self.gain_offset = 0.0
        if described is None:  # a stock norm with plain gains
            self.centred = isinstance(norm, nn.LayerNorm)
            self.epsilon = norm.eps if self.centred else norm.variance_epsilon
        else:
            self.centred, self.epsilon, self.gain_offset = (
                described[name] for name in ("centred", "epsilon", "gain_offset")
            )
        parameters = dict(norm.named_parameters())
        for name in ("weight", "bias"):
            like = parameters.get(name)
            self.register_parameter(
                name, None if like is None else nn.Parameter(torch.empty(width, dtype=like.dtype, device=like.device))
            )

    def forward(self, hidden: Tensor, index_map: Tensor) -> Tensor:
        """16-bit input is normed in float32."""
        unit = (layer_norm if self.centred else rms_norm)(hidden, hidden.shape[-1:], eps=self.epsilon)
        part = _pick(unit, index_map)
        if self.weight is None:
            return part
        gain = self.weight + self.gain_offset if self.gain_offset else self.weight
        return part * gain if self.bias is None else torch.addcmul(self.bias, part, gain)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{0 if self.weight is None else len(self.weight)}, centred={self.centred}, eps={self.epsilon:.3g}"


class Select(nn.Module):
    """A residual connection that keeps all features, beside something that reads `inputs` and writes `outputs` of them.

    Two forms: `"norm, select"` norms all features and then selects; `"select, norm"` selects first, so that the norm is over the selected ones
    alone, divides by their number, and has a gain for each of them (arXiv:2410.11988, algorithm 1).

    Args:
        inputs: None where q, k and v select for themselves, see `Reader`.
        outputs: how many features are written.
        form: one of `SELECT_FORMS`.
    """

    read_index_map: Tensor | None
    write_index_map: Tensor

    def __init__(self, inputs: int | None, outputs: int, form: str) -> None:
        super().__init__()
        self.form = form
        # as int64: with int32 maps index_add along the last dimension has no fast path on a CPU, and takes thirty times as long
        self.register_buffer(_READ, None if inputs is None else torch.zeros(inputs, dtype=torch.int64))
        self.register_buffer(_WRITE, torch.zeros(outputs, dtype=torch.int64))

    def read(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """What attention or MLP receives: [..., D] to [..., inputs]."""
        if self.read_index_map is None:
            return norm(hidden)  # type: ignore[no-any-return]
        if self.form == SELECT_FIRST:
            return norm(_pick(hidden, self.read_index_map))  # type: ignore[no-any-return]
        return norm(hidden, self.read_index_map)  # type: ignore[no-any-return]

    def join(self, hidden: Tensor, update: Tensor) -> Tensor:
        """[..., D] with `update` [..., outputs] added in its places."""
        return hidden.index_add(-1, self.write_index_map, update)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        reads = "q, k, v" if self.read_index_map is None else len(self.read_index_map)
        return f"{reads}, {len(self.write_index_map)}, form={self.form}"


class Reader(nn.Module):
    """One of q, k and v, where each selects for itself what it reads of [..., D] (arXiv:2410.11988, section 4.1).

    `norm` is over the selected features; None where all features were normed before.
    """

    read_index_map: Tensor

    def __init__(self, linear: nn.Linear, norm: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm
        self.register_buffer(_READ, torch.zeros(linear.in_features, dtype=torch.int64))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., outputs]."""
        part = _pick(hidden, self.read_index_map)
        return self.linear(part if self.norm is None else self.norm(part))  # type: ignore[no-any-return]


class Readers(nn.Module):
    """q, k and v where a stock block has one module for the three: `Reader`s by these names, their outputs side by side."""

    def __init__(self, readers: dict[str, Reader]) -> None:
        super().__init__()
        for name, reader in readers.items():
            self.add_module(name, reader)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., outputs of q, k and v]."""
        return torch.cat([reader(hidden) for reader in self.children()], -1)


def is_index_map(name: str) -> bool:
    """Whether a tensor of a checkpoint is an index map: whole numbers that are no parameters."""
    return name.endswith((f".{_READ}", f".{_WRITE}"))


@cache
def _lined_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The stock block class with another forward: the same modules, and a `Skip` or a `Select` on each residual connection."""

    class Lined(stock):  # type: ignore[valid-type, misc]  # a class known only at run time
        stock_class = stock
        parts: dict[str, Any]

        def attention_half(self, hidden: Tensor, **arguments: Any) -> Tensor:
            """The residual after attention; of a parallel block, after attention and MLP."""
            norms = self.parts["norms"]
            normed = self.skips[0].read(getattr(self, norms[0]), hidden)
            attended = _attend(self, normed, arguments)
            if len(norms) > 1:
                return self.skips[0].join(hidden, _dropped(self, attended))  # type: ignore[no-any-return]
            if len(self.skips) == 1:
                return self.skips[0].join(hidden, attended + _run(self, self.parts["mlp"], normed))  # type: ignore[no-any-return]
            second = self.skips[1].read(getattr(self, SECOND_NORM), hidden)
            return self.skips[1].join(self.skips[0].join(hidden, attended), _run(self, self.parts["mlp"], second))  # type: ignore[no-any-return]

        def mlp_half(self, hidden: Tensor) -> Tensor:
            """The residual after the MLP of a sequential block."""
            normed = self.skips[1].read(getattr(self, self.parts["norms"][1]), hidden)
            return self.skips[1].join(hidden, _dropped(self, _run(self, self.parts["mlp"], normed)))  # type: ignore[no-any-return]

        def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
            hidden = self.attention_half(hidden_states, **arguments)
            return hidden if len(self.parts["norms"]) == 1 else self.mlp_half(hidden)

    Lined.__name__ = Lined.__qualname__ = stock.__name__  # device maps name the classes that may not be split
    return Lined


def _attend(block: nn.Module, normed: Tensor, arguments: dict[str, Any]) -> Tensor:
    first, *rest = block.parts["attention"]  # type: ignore[index]
    return _run(block, rest, block.get_submodule(first)(hidden_states=normed, **arguments)[0])


def _dropped(block: nn.Module, written: Tensor) -> Tensor:
    """Dropout that a stock block (OPT) applies by a number of its own and not by a module."""
    share = getattr(block, "dropout", None)
    return dropout(written, share, training=block.training) if isinstance(share, float) else written


def _run(block: nn.Module, names: Iterable[str], hidden: Tensor) -> Tensor:
    for name in names:
        hidden = getattr(block, name)(hidden)
    return hidden


def block_with_widths(
    block_class: type[nn.Module], config: PreTrainedConfig, index: int, widths: dict[str, Any]
) -> nn.Module:
    """A block with `widths`, an entry of `config.pruned_widths`; its weights are not yet loaded."""
    block = _stock_block(getattr(block_class, "stock_class", block_class), config, index, widths)
    return _line_block(block, config, widths) if "attention" in widths else block


def _line_block(block: nn.Module, config: Any, widths: dict[str, Any]) -> nn.Module:
    """Give a stock block other widths of what it reads and writes, norms that go with them, and skips."""
    parts, attention, mlp, readers = config.pruned_residual, widths["attention"], widths["mlp"], widths.get("readers")
    inputs = dict.fromkeys("qkv", attention[0]) | dict.fromkeys(("gate", "up"), mlp[0])
    outputs = {"o": attention[1], "down": mlp[1]}
    selects = widths["skips"][0] in SELECT_FORMS
    if readers:
        _separate_readers(block, parts, dict(zip("qkv", readers, strict=True)), widths)
    for name, path in parts["matrices"].items():
        if not (readers and name in "qkv"):
            _resize_linear(
                block,
                path,
                inputs.get(name),
                outputs.get(name),
                bias=name in inputs and parts.get("reader_bias", False),
            )
    if selects:
        _part_norms(block, parts, widths)
    else:
        for path, width in zip(parts["norms"], (attention[0], mlp[0]), strict=False):  # a parallel block has one
            block.set_submodule(path, UnitNorm(width, config.hidden_size, parts["epsilon"]))
    block.__class__ = _lined_class(type(block))  # type: ignore[arg-type]  # a class is hashable
    block.parts = parts
    # beside a residual that stays whole, attention and MLP of a parallel block select for themselves
    ends = [attention, mlp] if selects else [attention, mlp][: len(parts["norms"])]
    reads = [None if readers else attention[0], mlp[0]]
    lines = zip(reads, ends, widths["skips"], strict=False)
    block.skips = nn.ModuleList(
        (Select(read, end[1], form) if selects else Skip(end[0], end[1], form)) for read, end, form in lines
    )
    return block


def _part_norms(block: nn.Module, parts: dict[str, Any], widths: dict[str, Any]) -> None:
    """The norms of a block that selects what it reads; one that attention and MLP of a parallel block share becomes two."""
    paths = parts["norms"]
    if len(paths) == 1:
        block.add_module(SECOND_NORM, copy.deepcopy(block.get_submodule(paths[0])))
    for part, path, form in zip(("attention", "mlp"), [*paths, SECOND_NORM], widths["skips"], strict=False):
        norm = block.get_submodule(path)
        if part == "attention" and "readers" in widths:
            if form == SELECT_FIRST:
                block.set_submodule(path, nn.Identity())  # q, k and v have norms of their own
        elif form == SELECT_FIRST:
            _narrow_norm(norm, widths[part][0])
        else:
            block.set_submodule(path, PartNorm(norm, widths[part][0], parts.get("norm")))


def _separate_readers(block: nn.Module, parts: dict[str, Any], inputs: dict[str, int], widths: dict[str, Any]) -> None:
    """Put a `Reader` in place of each of q, k and v, or `Readers` in place of the module that has all three."""
    paths = {name: parts["matrices"][name] for name in "qkv"}
    fused = len(set(paths.values())) == 1
    heads = {"q": widths["heads"], "k": widths["groups"], "v": widths["groups"]}
    readers = {}
    for name, path in paths.items():
        old: Any = block.get_submodule(path)
        outputs = old.out_features // sum(heads.values()) * heads[name] if fused else old.out_features
        norm = None
        if widths["skips"][0] == SELECT_FIRST:
            norm = copy.deepcopy(block.get_submodule(parts["norms"][0]))
            _narrow_norm(norm, inputs[name])
        readers[name] = Reader(nn.Linear(inputs[name], outputs, bias=old.bias is not None), norm)
    if fused:
        block.set_submodule(paths["q"], Readers(readers))
        return
    for name, path in paths.items():
        block.set_submodule(path, readers[name])


def _narrow_norm(norm: Any, width: int) -> None:
    """A stock norm for fewer features: it divides by their number."""
    for name, parameter in list(norm.named_parameters()):
        setattr(norm, name, nn.Parameter(torch.empty(width, dtype=parameter.dtype, device=parameter.device)))
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (width,)


def _resize_linear(module: nn.Module, path: str, inputs: int | None, outputs: int | None, *, bias: bool) -> None:
    old: Any = module.get_submodule(path)
    inputs, outputs, bias = inputs or old.in_features, outputs or old.out_features, bias or old.bias is not None
    if (inputs, outputs, bias) != (old.in_features, old.out_features, old.bias is not None):
        module.set_submodule(path, nn.Linear(inputs, outputs, bias=bias))


def _rotate_outer(model: nn.Module, config: Any) -> None:
    """Give embeddings, final norm and head the widths of the first and the last place of the residual."""
    parts = config.pruned_residual
    for path in parts["embeddings"]:
        table: Any = model.get_submodule(path)
        table.weight, table.embedding_dim = (
            nn.Parameter(torch.empty(table.num_embeddings, parts["enter"])),
            parts["enter"],
        )
    model.set_submodule(parts["final_norm"], UnitNorm(parts["leave"], config.hidden_size, parts["epsilon"]))
    _resize_linear(model, parts["head"], parts["leave"], None, bias=parts["head_bias"])


def _stock_block(
    block_class: type[nn.Module], config: PreTrainedConfig, index: int, widths: dict[str, Any]
) -> nn.Module:
    """A stock block with `widths` = {"heads": H, "groups": G, "ffn": F, ...}."""
    heads, groups, ffn = widths["heads"], widths["groups"], widths["ffn"]
    if type(config).model_type.removeprefix(PREFIX) == "opt":
        # it takes the width of a head from the hidden size: build the block dense, then narrow its attention
        block = block_class(BlockConfig(config, ffn_dim=ffn), index)
        _narrow_opt_attention(block.self_attn, heads)
        return block
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": width, "intermediate_size": ffn}
    return block_class(BlockConfig(config, **fields), index)


def _narrow_opt_attention(attention: Any, heads: int) -> None:
    if heads == attention.num_heads:
        return
    inner, width, bias = heads * attention.head_dim, attention.embed_dim, attention.enable_bias
    attention.num_heads = heads  # forgetting this gives no error: heads fold into time
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(width, inner, bias=bias))
    attention.out_proj = nn.Linear(inner, width, bias=bias)


class PrunedModel:
    """What the pruned classes add to the stock ones."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the stock class comes next in the order of bases
        if config.pruned_widths is None:
            raise ValueError(
                f"{config.model_type}: config.json lacks 'pruned_widths' (one entry a block); it is not a checkpoint of secateur"
            )
        blocks = self.get_decoder().layers  # type: ignore[attr-defined]
        if len(config.pruned_widths) != len(blocks):
            raise ValueError(
                f"{config.model_type}: 'pruned_widths' has {len(config.pruned_widths)} entries for {len(blocks)} blocks"
            )
        for index, widths in enumerate(config.pruned_widths):
            blocks[index] = block_with_widths(type(blocks[index]), config, index, widths)
        if "enter" in (config.pruned_residual or {}):
            _rotate_outer(self, config)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As the stock method; the code that loads the checkpoint goes with it."""
        self.config.auto_map = auto_map(type(self))  # type: ignore[attr-defined]
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(
            __file__, Path(save_directory) / f"{MODULE}.py"
        )  # first, so that a push to the hub takes it along
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


def auto_map(model_class: type[Any]) -> dict[str, str]:
    """The `auto_map` of config.json for a pruned class."""
    return {
        "AutoConfig": f"{MODULE}.{model_class.config_class.__name__}",
        "AutoModelForCausalLM": f"{MODULE}.{model_class.__name__}",
    }


@cache
def pruned_class(stock_type: str) -> Any:
    """The pruned class of a stock model type: `llama` gives `SecateurLlamaForCausalLM`, whose type is `secateur_llama`."""
    stock_config: Any = CONFIG_MAPPING[stock_type]
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]

    class Config(stock_config):  # type: ignore[misc]  # a class known only at run time
        model_type = PREFIX + stock_type
        pruned_widths: list[dict[str, Any]] | None = None
        pruned_residual: dict[str, Any] | None = None

    class Model(PrunedModel, stock_model):  # type: ignore[misc]
        config_class = Config

    for made, stock in ((Config, stock_config), (Model, stock_model)):
        made.__name__ = made.__qualname__ = f"Secateur{stock.__name__}"
        globals()[made.__name__] = made
    return Model


def __getattr__(name: str) -> Any:
    """The classes by name (`SecateurLlamaConfig`, ...), made when asked for: this is how `auto_map` reaches them."""
    for stock_type, stock_name in MODEL_FOR_CAUSAL_LM_MAPPING._config_mapping.items():
        if name in (f"Secateur{stock_name}", f"Secateur{MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping.get(stock_type)}"):
            pruned_class(stock_type)
            return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def register(stock_types: Iterable[str]) -> None:
    """Make the Auto classes of transformers know the pruned models of these stock types."""
    for stock_type in stock_types:
        model = pruned_class(stock_type)
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
