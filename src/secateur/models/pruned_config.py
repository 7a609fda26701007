"""The config.json of a pruned model: stock if a stock architecture can express the widths, otherwise of the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.models.family import Family
from secateur.models.runtime import PREFIX, auto_map, pruned_class
from secateur.models.view import BlockDims


def stock_problem(raw: Mapping[str, Any], family: Family, after: Sequence[BlockDims]) -> str | None:
    """Return the reason why no stock model has these widths, or None."""
    if (residual := after[0].residual) is not None:
        if residual.selected:
            return "its blocks read and write parts of the residual stream"
        return "its residual stream is rotated, and narrower than the hidden size"
    if any(dims.missing for dims in after):
        return "it has blocks without attention or without an MLP"
    if any(dims != after[0] for dims in after):
        return "the widths differ from block to block"
    dense_heads = getattr(_dense(raw, raw["model_type"].removeprefix(PREFIX)), family.heads)
    if after[0].heads != dense_heads and not family.stock_heads:
        return (
            f"stock {family.name} models take the width of a head from the hidden size, so they cannot have fewer heads"
        )
    try:
        stock = pruned_config(raw, family, after, stock=True)
        CONFIG_MAPPING[stock["model_type"]].from_dict(stock)
    except Exception as error:  # each configuration class has its own checks and errors
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        return f"the stock configuration refuses these widths: {reason}"
    return None


def pruned_config(raw: Mapping[str, Any], family: Family, after: Sequence[BlockDims], *, stock: bool) -> dict[str, Any]:
    """Return the content of config.json for the widths `after`.

    Args:
        raw: the config.json of the original.
        family: the family of the original.
        after: the sizes of each block.
        stock: whether the result is a stock model, see `stock_problem`.
    """
    stock_type = raw["model_type"].removeprefix(PREFIX)
    model_class = pruned_class(stock_type)
    config = dict(raw)
    if stock:
        return _stock_config(config, family, after[0], stock_type)
    config["model_type"] = PREFIX + stock_type
    config["architectures"] = [model_class.__name__]
    config["auto_map"] = auto_map(model_class)
    config["pruned_widths"] = [dims.widths() for dims in after]
    first, last = after[0].residual, after[-1].residual
    if first is not None and first.selected and "pruned_residual" not in raw:
        parts = {"norms": family.norms, "attention": family.attention, "mlp": family.mlp}
        config["pruned_residual"] = {name: list(value) for name, value in parts.items()} | {
            "matrices": dict(family.matrices)
        }
        if (
            family.norm.gain_offset
        ):  # needed only for an offset: other norms are read from the modules of the stock class
            norm = replace(family.norm, epsilon=family.norm.epsilon_of(_dense(raw, stock_type)))
            config["pruned_residual"]["norm"] = asdict(norm)
    elif first is not None and last is not None and not first.selected:
        config["pruned_residual"] = {**raw["pruned_residual"], "enter": first.attention[0], "leave": last.mlp[1]}
    return config


def drop_blocks(raw: Mapping[str, Any], config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Return the content of config.json for a model that has only some of the blocks.

    Args:
        raw: the config.json of the original.
        config: the same as an object. It has the kind of attention of each block, even if the file does not (sliding
            windows of Qwen).
        kept: the indices of the blocks that stay, ascending.
    """
    before = int(config.num_hidden_layers)
    if len(kept) == before:
        return dict(raw)
    per_block = {
        name: value
        for name, value in raw.items()
        if "layer" in name and isinstance(value, list) and len(value) == before
    }
    if getattr(config, "layer_types", None):
        per_block["layer_types"] = list(config.layer_types)
    content = {
        **raw,
        **{name: [value[index] for index in kept] for name, value in per_block.items()},
        "num_hidden_layers": len(kept),
    }
    if "max_window_layers" in raw:  # blocks from this index on have a window
        content["max_window_layers"] = sum(index < raw["max_window_layers"] for index in kept)
    if "pruned_widths" in raw:
        content["pruned_widths"] = [raw["pruned_widths"][index] for index in kept]
    return content


def _stock_config(config: dict[str, Any], family: Family, dims: BlockDims, stock_type: str) -> dict[str, Any]:
    config.pop("auto_map", None)  # a stock class needs no code, and the code of the original is not copied
    if config["model_type"] != stock_type:  # the original was a pruned model, and the result is a stock model again
        del config["pruned_widths"]
        config |= {"model_type": stock_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[stock_type]]}
    dense = _dense(config, stock_type)
    if dims.ffn != getattr(dense, family.ffn):
        config[family.ffn] = dims.ffn
    if dims.heads != getattr(dense, family.heads):
        config |= {family.heads: dims.heads, family.groups: dims.groups, "head_dim": dims.head_width}
    return config


def _dense(raw: Mapping[str, Any], stock_type: str) -> Any:
    """Return the stock configuration, without the widths of an earlier pruning."""
    return CONFIG_MAPPING[stock_type].from_dict(
        {key: value for key, value in raw.items() if key not in ("model_type", "pruned_widths", "pruned_residual")}
    )
