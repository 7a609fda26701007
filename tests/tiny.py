"""Tiny random models of any model type that a family describes, with no list to edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.models.family import all_families
from tests.layouts import layout_of

VOCABULARY = 64
HIDDEN, HEADS, GROUPS, FFN, BLOCKS, LENGTH = 32, 4, 2, 48, 3, 64

MODEL_TYPES = sorted(t for family in all_families().values() for t in family.model_types)
FAMILY_TYPES = sorted(family.model_types[0] for family in all_families().values())


def able(method: str, among: Sequence[str] = MODEL_TYPES, **options: Any) -> list[str]:
    """The model types that a method can prune with these options."""
    return [model_type for model_type in among if not layout_of(model_type).refusal(method, **options)]


_SIZES = {
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HIDDEN // HEADS,
    "intermediate_size": FFN,
    "ffn_dim": FFN,
    "num_hidden_layers": BLOCKS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "original_max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(model_type: str, **fields: Any) -> Any:
    """Every size that this configuration class has; dropout off."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    sizes = {key: value for key, value in _SIZES.items() if hasattr(default, key)}
    off = {
        key: 0.0
        for key in ("attention_dropout", "resid_pdrop", "embd_pdrop", "dropout", "layerdrop")
        if hasattr(default, key)
    }
    own = layout_of(model_type).fields if model_type in MODEL_TYPES else {}
    return config_class(**{**sizes, **off, **own, **fields})


def tiny_model(
    model_type: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A random model whose weights, norms and biases are all far from zero, so that nothing cancels by accident."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, tie_word_embeddings=tied, **fields), attn_implementation="sdpa"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    if dtype == torch.float64:  # constants, such as the scale of an embedding, have the dtype that a model is built in
        wide = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa", dtype=dtype)
        wide.load_state_dict(model.state_dict())
        model = wide
    return model.to(dtype).eval()


def some_ids(rows: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
