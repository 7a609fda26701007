"""Pruned model classes: the stock classes, with blocks of different widths.

This file is copied into a checkpoint as `modeling_secateur.py`. So it imports only torch and transformers, and without
secateur the checkpoint loads with `trust_remote_code=True`. If secateur is installed, `import secateur` registers the
same classes, and no remote code is needed.

`config.pruned_widths` holds one entry per block, `{"heads": H, "groups": G, "ffn": F}`: the numbers of query heads,
key-value heads and feed-forward units. Every block is the stock block, built from a configuration with these widths.
A block without heads has no attention, and one without feed-forward units has no MLP: only the bias of their output is
left, if the family has one.

In a model with a narrower residual stream (SliceGPT, arXiv:2401.15024), `config.pruned_residual` describes the stream.
Each entry of `pruned_widths` then has more fields: `"attention": [in, out]` and `"mlp": [in, out]`, the widths of the
residual that attention and MLP read and write, and `"skips"`, the forms of the two residual connections (one in a
parallel block). The modules inside a block are the stock ones. The parts between them change: norms have no gain, and a
`Skip` leads from one basis of the residual to the next. With `"tied"` the head is the embedding, and the last norm is a
`MappedNorm`.

Where gains are stored with an offset, as w of 1 + w (Gemma), `pruned_residual` has `"norm"`: that offset, the epsilon,
and whether norms subtract the mean.

In a model whose blocks read and write parts of a whole residual (DISP-LLM, arXiv:2410.11988, algorithm 1), the same
fields give the widths of the parts. A `Select` takes the place of a `Skip`. It holds the features to read and the
features to write, as index maps in the safetensors file. With `"readers": [q, k, v]` these three select for themselves,
and a `Reader` takes the place of each. docs/inference.md has the speed of this.
"""

from __future__ import annotations

import copy
import shutil
import warnings
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
SECOND_NORM = "mlp_norm"  # the second norm of a parallel block in which attention and MLP norm different features
_READ, _WRITE = "read_index_map", "write_index_map"
_OUTPUTS = ("o_proj", "out_proj", "dense")  # the names of the output projection of attention


class BlockConfig:
    """A view of a configuration: some fields have the values of one block, all others come from the original."""

    def __init__(self, config: PreTrainedConfig, **fields: Any) -> None:
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)


class UnitNorm(nn.Module):
    """x / sqrt(sum(x^2) / D + epsilon), without gain, for a residual with `width` of D directions left.

    The mean square is over the original D, and removed directions count as zero. Over `width` it would grow by D /
    width.
    """

    def __init__(self, width: int, original: int, epsilon: float) -> None:
        super().__init__()
        self.width, self.scale, self.epsilon = width, (original / width) ** 0.5, epsilon * original / width

    def forward(self, hidden_BTW: Tensor) -> Tensor:
        """Map [..., width] to the same shape; 16-bit input is normed in float32."""
        normed = rms_norm(hidden_BTW, (self.width,), eps=self.epsilon)
        return normed if self.scale == 1 else normed * self.scale

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"{self.width}, scale={self.scale:.4g}, eps={self.epsilon:.3g}"


class MappedNorm(nn.Module):
    """The last norm of a sliced model whose head is the embedding: a `UnitNorm`, then a map to that basis."""

    def __init__(self, norm: UnitNorm, width: int) -> None:
        super().__init__()
        self.norm, self.map = norm, nn.Linear(norm.width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., leave] to [..., enter], which the table of the embedding reads."""
        return self.map(self.norm(hidden))  # type: ignore[no-any-return]


class Skip(nn.Module):
    """A residual connection from one basis of the residual stream to the next.

    Three forms of the same map, [..., inputs] to [..., outputs], chosen by size when a model is pruned:

    - `None`: the identity. If the widths differ, zeros are appended or the last features dropped. No parameters.
    - a number k: the identity minus a product of rank k, x - (x L) R^T, with L [inputs, k] and R [outputs, k]. Between
      equal widths the map is symmetric, and R is L.
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
        """Map [..., inputs] to [..., outputs]."""
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
        """Return the input of attention or MLP."""
        return norm(hidden)  # type: ignore[no-any-return]

    def join(self, hidden: Tensor, update: Tensor) -> Tensor:
        """Return the residual after the connection."""
        return self(hidden) + update  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"{self.inputs}, {self.outputs}, form={self.form}"


def _pick(hidden: Tensor, index_map: Tensor) -> Tensor:
    """Map [..., D] to the selected features [..., W].

    On a CPU a gather takes a sixth of the time of an `index_select` along the last of three dimensions.
    """
    return hidden.gather(-1, index_map.expand(*hidden.shape[:-1], -1))


class PartNorm(nn.Module):
    """A norm over all features that returns some of them: [..., D] to [..., width].

    Gain and bias belong to the selected features. A norm without them is one fused operation in torch, and the steps
    after it touch only the selected features.
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
            self.centred, self.epsilon = described["centred"], described["epsilon"]
            self.gain_offset = described["gain_offset"]
        parameters = dict(norm.named_parameters())
        for name in ("weight", "bias"):
            like = parameters.get(name)
            self.register_parameter(
                name, None if like is None else nn.Parameter(torch.empty(width, dtype=like.dtype, device=like.device))
            )

    def forward(self, hidden: Tensor, index_map: Tensor) -> Tensor:
        """Map [..., D] to [..., width]; 16-bit input is normed in float32."""
        unit = (layer_norm if self.centred else rms_norm)(hidden, hidden.shape[-1:], eps=self.epsilon)
        part = _pick(unit, index_map)
        if self.weight is None:
            return part
        gain = self.weight + self.gain_offset if self.gain_offset else self.weight
        return part * gain if self.bias is None else torch.addcmul(self.bias, part, gain)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"{0 if self.weight is None else len(self.weight)}, centred={self.centred}, eps={self.epsilon:.3g}"


class Select(nn.Module):
    """A residual connection that keeps all features, around a part that reads `inputs` and writes `outputs` of them.

    Two forms: `"norm, select"` norms all features and then selects. `"select, norm"` selects first, so the norm is over
    the selected features only, divides by their number, and has one gain for each (arXiv:2410.11988, algorithm 1).

    Args:
        inputs: the number of features to read; None if q, k and v select for themselves, see `Reader`.
        outputs: the number of features to write.
        form: one of `SELECT_FORMS`.
    """

    read_index_map: Tensor | None
    write_index_map: Tensor

    def __init__(self, inputs: int | None, outputs: int, form: str) -> None:
        super().__init__()
        self.form = form
        # int64, because index_add along the last dimension with int32 maps has no fast path on a CPU: 30 times as long
        self.register_buffer(_READ, None if inputs is None else torch.zeros(inputs, dtype=torch.int64))
        self.register_buffer(_WRITE, torch.zeros(outputs, dtype=torch.int64))

    def read(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """Return the input of attention or MLP: [..., D] to [..., inputs]."""
        if self.read_index_map is None:
            return norm(hidden)  # type: ignore[no-any-return]
        if self.form == SELECT_FIRST:
            return norm(_pick(hidden, self.read_index_map))  # type: ignore[no-any-return]
        return norm(hidden, self.read_index_map)  # type: ignore[no-any-return]

    def join(self, hidden: Tensor, update: Tensor) -> Tensor:
        """Return [..., D] with `update` [..., outputs] added to the features that are written."""
        return hidden.index_add(-1, self.write_index_map, update)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        reads = "q, k, v" if self.read_index_map is None else len(self.read_index_map)
        return f"{reads}, {len(self.write_index_map)}, form={self.form}"


class Reader(nn.Module):
    """One of q, k and v, if each selects for itself what it reads of [..., D] (arXiv:2410.11988, section 4.1).

    `norm` is over the selected features; None if all features were normed before.
    """

    read_index_map: Tensor

    def __init__(self, linear: nn.Linear, norm: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm
        self.register_buffer(_READ, torch.zeros(linear.in_features, dtype=torch.int64))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., D] to [..., outputs]."""
        part = _pick(hidden, self.read_index_map)
        return self.linear(part if self.norm is None else self.norm(part))  # type: ignore[no-any-return]


class Readers(nn.Module):
    """Three `Reader`s named q, k and v, in place of one fused module; their outputs are concatenated."""

    def __init__(self, readers: dict[str, Reader]) -> None:
        super().__init__()
        for name, reader in readers.items():
            self.add_module(name, reader)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., D] to [..., outputs of q, k and v]."""
        return torch.cat([reader(hidden) for reader in self.children()], -1)


def is_index_map(name: str) -> bool:
    """Whether a tensor of a checkpoint is an index map: integers, which are not parameters."""
    return name.endswith((f".{_READ}", f".{_WRITE}"))


@cache
def _lined_class(stock: type[nn.Module]) -> type[nn.Module]:
    """Return the stock block class with another forward: a `Skip` or `Select` on each residual connection."""

    class Lined(stock):  # type: ignore[valid-type, misc]  # a class known only at run time
        stock_class = stock
        parts: dict[str, Any]

        def attention_half(self, hidden: Tensor, **arguments: Any) -> Tensor:
            """Return the residual after attention; in a parallel block, after attention and MLP."""
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
            """Return the residual after the MLP of a sequential block."""
            normed = self.skips[1].read(getattr(self, self.parts["norms"][1]), hidden)
            return self.skips[1].join(hidden, _dropped(self, _run(self, self.parts["mlp"], normed)))  # type: ignore[no-any-return]

        def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
            hidden = self.attention_half(hidden_states, **arguments)
            return hidden if len(self.parts["norms"]) == 1 else self.mlp_half(hidden)

    Lined.__name__ = Lined.__qualname__ = stock.__name__  # device maps list by name the classes that must not be split
    return Lined


def _attend(block: nn.Module, normed: Tensor, arguments: dict[str, Any]) -> Tensor:
    first, *rest = block.parts["attention"]  # type: ignore[index]
    return _run(block, rest, block.get_submodule(first)(hidden_states=normed, **arguments)[0])


def _dropped(block: nn.Module, written: Tensor) -> Tensor:
    """Apply the dropout that a stock block (OPT) stores as a number and not as a module."""
    share = getattr(block, "dropout", None)
    return dropout(written, share, training=block.training) if isinstance(share, float) else written


def _run(block: nn.Module, names: Iterable[str], hidden: Tensor) -> Tensor:
    for name in names:
        hidden = getattr(block, name)(hidden)
    return hidden


def block_with_widths(
    block_class: type[nn.Module], config: PreTrainedConfig, index: int, widths: dict[str, Any]
) -> nn.Module:
    """Build a block with `widths`, an entry of `config.pruned_widths`, without its weights."""
    block = _stock_block(getattr(block_class, "stock_class", block_class), config, index, widths)
    return _line_block(block, config, widths) if "attention" in widths else block


def _line_block(block: nn.Module, config: Any, widths: dict[str, Any]) -> nn.Module:
    """Give a stock block other widths to read and write, matching norms, and skips."""
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
        for path, width in zip(parts["norms"], (attention[0], mlp[0]), strict=False):  # a parallel block has one norm
            block.set_submodule(path, UnitNorm(width, config.hidden_size, parts["epsilon"]))
    block.__class__ = _lined_class(type(block))  # type: ignore[arg-type]  # a class is hashable
    block.parts = parts
    # If the residual stays whole, attention and MLP of a parallel block select separately.
    ends = [attention, mlp] if selects else [attention, mlp][: len(parts["norms"])]
    reads = [None if readers else attention[0], mlp[0]]
    lines = zip(reads, ends, widths["skips"], strict=False)
    block.skips = nn.ModuleList(
        (Select(read, end[1], form) if selects else Skip(end[0], end[1], form)) for read, end, form in lines
    )
    return block


def _part_norms(block: nn.Module, parts: dict[str, Any], widths: dict[str, Any]) -> None:
    """Set the norms of a block that selects what it reads; a norm shared by attention and MLP becomes two."""
    paths = parts["norms"]
    if len(paths) == 1:
        block.add_module(SECOND_NORM, copy.deepcopy(block.get_submodule(paths[0])))
    for part, path, form in zip(("attention", "mlp"), [*paths, SECOND_NORM], widths["skips"], strict=False):
        norm = block.get_submodule(path)
        if part == "attention" and "readers" in widths:
            if form == SELECT_FIRST:
                block.set_submodule(path, nn.Identity())  # q, k and v have their own norms
        elif form == SELECT_FIRST:
            _narrow_norm(norm, widths[part][0])
        else:
            block.set_submodule(path, PartNorm(norm, widths[part][0], parts.get("norm")))


def _separate_readers(block: nn.Module, parts: dict[str, Any], inputs: dict[str, int], widths: dict[str, Any]) -> None:
    """Replace each of q, k and v by a `Reader`, or their fused module by `Readers`."""
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
    """Narrow a stock norm to `width` features; it then divides by their number."""
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
    """Give embeddings, final norm and head the widths of the residual at its start and its end."""
    parts = config.pruned_residual
    for path in parts["embeddings"]:
        table: Any = model.get_submodule(path)
        table.weight, table.embedding_dim = (
            nn.Parameter(torch.empty(table.num_embeddings, parts["enter"])),
            parts["enter"],
        )
    norm, reads = UnitNorm(parts["leave"], config.hidden_size, parts["epsilon"]), parts["leave"]
    if parts.get("tied"):
        model.set_submodule(parts["final_norm"], MappedNorm(norm, parts["enter"]))
        reads = parts["enter"]
    else:
        model.set_submodule(parts["final_norm"], norm)
    _resize_linear(model, parts["head"], reads, None, bias=parts["head_bias"])


def _stock_block(
    block_class: type[nn.Module], config: PreTrainedConfig, index: int, widths: dict[str, Any]
) -> nn.Module:
    """Build a stock block with `widths` = {"heads": H, "groups": G, "ffn": F, ...}."""
    heads, groups, ffn = widths["heads"], widths["groups"], widths["ffn"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # torch says so of a part that is gone
        if type(config).model_type.removeprefix(PREFIX) == "opt":
            # OPT takes the width of a head from the hidden size: build the block dense, then narrow its attention.
            block = block_class(BlockConfig(config, ffn_dim=ffn), index)
            if heads:
                _narrow_opt_attention(block.self_attn, heads)
        else:
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            fields = {"num_attention_heads": heads or 1, "num_key_value_heads": groups or 1}
            block = block_class(BlockConfig(config, **fields, head_dim=width, intermediate_size=ffn), index)
        if not heads:
            _empty_attention(block)
    return block


def _narrow_opt_attention(attention: Any, heads: int) -> None:
    if heads == attention.num_heads:
        return
    inner, width, bias = heads * attention.head_dim, attention.embed_dim, attention.enable_bias
    attention.num_heads = heads  # without this line the result is wrong, but no error is raised
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(width, inner, bias=bias))
    attention.out_proj = nn.Linear(inner, width, bias=bias)


def _empty_attention(block: nn.Module) -> None:
    """Take all heads from the attention of a block. Its projections stay, with no rows or no columns."""
    (attention,) = (child for child in block.children() if hasattr(child, "layer_idx"))
    linears = {name: child for name, child in attention.named_children() if isinstance(child, nn.Linear)}
    output = next((name for name in linears if name in _OUTPUTS), None)
    if output is None:
        raise ValueError(f"{type(attention).__name__}: none of its modules is called {', '.join(_OUTPUTS)}")
    for name, old in linears.items():
        ends = (0, old.out_features) if name == output else (old.in_features, 0)
        setattr(attention, name, nn.Linear(*ends, bias=old.bias is not None))
    attention.__class__ = _empty_class(type(attention), output)  # type: ignore[arg-type]  # a class is hashable


@cache
def _empty_class(stock: type[nn.Module], output: str) -> type[nn.Module]:
    """Return the stock attention class with the forward of an attention that has no heads."""

    class Empty(stock):  # type: ignore[valid-type, misc]  # a class known only at run time
        def forward(
            self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any
        ) -> tuple[Tensor, None]:
            if past_key_values is not None:  # the cache of a block also counts the tokens that were seen
                seen = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
                past_key_values.update(seen, seen, self.layer_idx)
            return getattr(self, output)(hidden_states[..., :0]), None

    Empty.__name__ = Empty.__qualname__ = stock.__name__
    return Empty


class PrunedModel:
    """The base class with the additions of the pruned classes to the stock classes."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the stock class comes next in the order of bases
        if config.pruned_widths is None:
            raise ValueError(
                f"{config.model_type}: config.json lacks 'pruned_widths' (one entry a block); "
                "it is not a checkpoint of secateur"
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
        """Save as the stock method does, and add the code that loads the checkpoint."""
        self.config.auto_map = auto_map(type(self))  # type: ignore[attr-defined]
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        # copied first, so that a push to the hub includes it
        shutil.copyfile(__file__, Path(save_directory) / f"{MODULE}.py")
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


def auto_map(model_class: type[Any]) -> dict[str, str]:
    """Return the `auto_map` of config.json for a pruned class."""
    return {
        "AutoConfig": f"{MODULE}.{model_class.config_class.__name__}",
        "AutoModelForCausalLM": f"{MODULE}.{model_class.__name__}",
    }


@cache
def pruned_class(stock_type: str) -> Any:
    """Return the pruned class of a stock model type: `llama` gives `SecateurLlamaForCausalLM`."""
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
    """Make a class at its first use by name (`SecateurLlamaConfig`, ...): `auto_map` reaches the classes this way."""
    for stock_type, stock_name in MODEL_FOR_CAUSAL_LM_MAPPING._config_mapping.items():
        if name in (f"Secateur{stock_name}", f"Secateur{MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping.get(stock_type)}"):
            pruned_class(stock_type)
            return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def register(stock_types: Iterable[str]) -> None:
    """Register the pruned models of these stock types with the Auto classes of transformers."""
    for stock_type in stock_types:
        model = pruned_class(stock_type)
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
