"""Pruned model classes: the stock ones, with blocks whose widths differ.

This file is copied into a checkpoint as `modeling_secateur.py`, so it imports nothing but torch and transformers, and a
checkpoint loads with `trust_remote_code=True` where secateur is not installed. Where it is, `import secateur` registers the same
classes and no remote code is needed.

`config.pruned_widths` holds one entry a block, `{"heads": H, "groups": G, "ffn": F}`: query heads, key-value heads, feed-forward
units. Every block is the stock block, built from a configuration that has that block's widths.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

MODULE = "modeling_secateur"
PREFIX = "secateur_"


class BlockConfig:
    """A view of a configuration in which a few fields have the values of one block; all else follows the original."""

    def __init__(self, config: PreTrainedConfig, **fields: Any) -> None:
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)


def block_with_widths(block_class: type[nn.Module], config: PreTrainedConfig, index: int, widths: dict[str, int]) -> nn.Module:
    """A stock block with `widths` = {"heads": H, "groups": G, "ffn": F}, its weights not yet loaded."""
    heads, groups, ffn = widths["heads"], widths["groups"], widths["ffn"]
    if hasattr(config, "ffn_dim"):  # OPT takes the width of a head from the hidden size: build the block dense, then narrow its attention
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
            raise ValueError(f"{config.model_type}: config.json lacks 'pruned_widths' (one entry a block); it is not a checkpoint of secateur")
        blocks = self.get_decoder().layers  # type: ignore[attr-defined]
        if len(config.pruned_widths) != len(blocks):
            raise ValueError(f"{config.model_type}: 'pruned_widths' has {len(config.pruned_widths)} entries for {len(blocks)} blocks")
        for index, widths in enumerate(config.pruned_widths):
            blocks[index] = block_with_widths(type(blocks[index]), config, index, widths)
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As the stock method; the code that loads the checkpoint goes with it."""
        self.config.auto_map = auto_map(type(self))  # type: ignore[attr-defined]
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / f"{MODULE}.py")  # first, so that a push to the hub takes it along
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


def auto_map(model_class: type[Any]) -> dict[str, str]:
    """The `auto_map` of config.json for a pruned class."""
    return {"AutoConfig": f"{MODULE}.{model_class.config_class.__name__}", "AutoModelForCausalLM": f"{MODULE}.{model_class.__name__}"}


@cache
def pruned_class(stock_type: str) -> Any:
    """The pruned class of a stock model type: `llama` gives `SecateurLlamaForCausalLM`, whose type is `secateur_llama`."""
    stock_config: Any = CONFIG_MAPPING[stock_type]
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]

    class Config(stock_config):  # type: ignore[misc]  # a class known only at run time
        model_type = PREFIX + stock_type
        pruned_widths: list[dict[str, int]] | None = None

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
