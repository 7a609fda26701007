"""Make the configuration of transformers from the metadata of a GGUF file. An architecture is one entry of `KNOWN`.

llama.cpp keeps some facts of a model in its metadata, some as tensors (the frequencies of stretched rotary positions),
and some in its code (the scale of Gemma's attention, the window of every sixth block). A key that is not understood is
refused: the model would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.core.errors import SecateurError
from secateur.models.gguf.file import GgufFile

Fields = dict[str, Any]

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_RMS_EPSILON, _EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_ROPE = ("freq_base", "dimension_count", "scaling.type", "scaling.factor", "scaling.original_context_length")
_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
_UNDERSTOOD = (
    *_SIZES,
    *(f"rope.{key}" for key in _ROPE),
    *_BETAS,
    "rope.scaling.finetuned",  # says nothing about the function
    "attention.key_length",
    "attention.value_length",
    "vocab_size",  # the embedding says it
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True, 1),
    "rope.scale_linear": (1,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "pooling_type": (0, 1, 3),  # none, mean, last: what is done with the hidden states
    "tensor_data_layout": ("Meta AI original pth",),  # the order of the rows of q and k, which all files of llama have
}
"""Values of keys that change nothing."""
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
STRETCHED = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_LLAMA3_LENGTHS = (8192, 4096, 2048, 16384, 32768)  # those that models were trained with before the stretching
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_PHI3_LENGTH = 4096
_GEMMA3_27B_BLOCKS = 62
_GEMMA3_EVERY, _GEMMA3_LOCAL_BASE = 6, 10000.0


@dataclass(frozen=True)
class Architecture:
    """How the files of one architecture differ from its model in transformers.

    Attributes:
        model_type: the type in config.json.
        fields: makes the fields of the configuration that `config_of` does not know, from the file and those it knows.
        keys: the keys of the metadata that `fields` reads.
        tensors: the tensors that `fields` reads.
        epsilon: the key of the epsilon of its norms, and its name in the configuration.
        partly_turned: whether the rotary positions may turn a part of each head.
        permuted: whether the rows of q and k are in the order of llama.cpp, pairs side by side.
        norms_plus_one: whether the gains of norms are stored with the one that the model adds.
    """

    model_type: str
    fields: Callable[[GgufFile, Fields], Fields]
    keys: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    epsilon: tuple[str, str] = (_RMS_EPSILON, "rms_norm_eps")
    partly_turned: bool = False
    permuted: bool = False
    norms_plus_one: bool = False


def config_of(file: GgufFile) -> Fields:
    """Return the fields of config.json, except the dtype.

    Raises:
        SecateurError: an unknown architecture, a missing key, a key that is not understood, or blocks of unequal width.
    """
    known = architecture_of(file)
    _refuse_experts(file)
    _refuse_unknown_keys(file, known)
    common: Fields = {name: _size(file, key) for key, name in _SIZES.items()}
    key, name = known.epsilon
    common[name] = _needed(file, key)
    common["vocab_size"] = _tensor_shape(file, "token_embd.weight")[0]
    common["tie_word_embeddings"] = "output.weight" not in file.tensors
    base = file.get("rope.freq_base", file.get("rope.global.freq_base", 10000.0))
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": base}
    common |= {ours: file.metadata.get(f"tokenizer.ggml.{theirs}") for theirs, ours in _IDS.items()}
    if not known.partly_turned:
        _refuse_partial_rotation(file, common)
    return {"model_type": known.model_type, **common, **known.fields(file, common)}


def architecture_of(file: GgufFile) -> Architecture:
    """Return the entry of the file's architecture.

    Raises:
        SecateurError: there is none.
    """
    if file.architecture not in KNOWN:
        raise SecateurError(
            f"{file.path}: architecture '{file.architecture}' cannot be imported (known: {', '.join(sorted(KNOWN))})"
        )
    return KNOWN[file.architecture]


def _needed(file: GgufFile, key: str) -> Any:
    value = file.get(key)
    if value is None:
        raise SecateurError(f"{file.path}: its metadata lacks {file.architecture}.{key}; convert the model again")
    return value


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    """Return a size: a whole number above 0, the same in all blocks."""
    if key == "attention.head_count_kv" and file.get(key) is None:
        key = "attention.head_count"
    value = _needed(file, key) if default is None else file.get(key, default)
    if isinstance(value, list):
        if len(set(value)) > 1:
            raise SecateurError(
                f"{file.path}: its blocks have unequal sizes ({key}: {value}), which a {file.architecture} model of "
                "transformers cannot hold; import the model that it was made from"
            )
        value = value[0] if value else 0
    if not isinstance(value, int) or value < 1:
        raise SecateurError(
            f"{file.path}: its metadata says {file.architecture}.{key} = {value!r}, and a size is a whole number above "
            "0; convert the model again"
        )
    return value


def _tensor_shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise SecateurError(f"{file.path}: has no tensor {name}; convert the model again")
    return file.tensors[name].shape


def _refuse_experts(file: GgufFile) -> None:
    if file.get("expert_count"):
        raise SecateurError(
            f"{file.path}: a mixture of {file.get('expert_count')} experts, which is not supported; give a dense model"
        )


def _refuse_unknown_keys(file: GgufFile, known: Architecture) -> None:
    prefix = f"{file.architecture}."
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in (*_UNDERSTOOD, known.epsilon[0], *known.keys) or value in _NEUTRAL.get(name, ()):
            continue
        raise SecateurError(
            f"{file.path}: its metadata says {key} = {value}, which secateur does not know for this architecture, so "
            "the imported model might compute something else; please report it"
        )


def _has(file: GgufFile, name: str) -> bool:
    return f"blk.0.{name}" in file.tensors


def _head_width(file: GgufFile, common: Fields) -> int:
    return _size(file, "attention.key_length", max(1, common["hidden_size"] // common["num_attention_heads"]))


def _refuse_partial_rotation(file: GgufFile, common: Fields) -> None:
    width = _head_width(file, common)
    turned = file.get("rope.dimension_count")
    own_width = file.architecture == "llama" and file.get("attention.key_length") is None  # it states the width itself
    if turned not in (None, width) and not own_width:
        raise SecateurError(
            f"{file.path}: rotary positions turn {turned} of the {width} numbers of a head, which a "
            f"{file.architecture} model of transformers cannot hold"
        )


def _needs_whole_heads(file: GgufFile, common: Fields) -> None:
    """Refuse a width of heads that the configuration of transformers cannot state."""
    width = _head_width(file, common)
    if width * common["num_attention_heads"] != common["hidden_size"]:
        raise SecateurError(
            f"{file.path}: {common['num_attention_heads']} heads of {width} do not make the width "
            f"{common['hidden_size']}, which a {file.architecture} model of transformers needs; "
            "give a file of the unpruned model"
        )


def _llama(file: GgufFile, common: Fields) -> Fields:
    width = _size(file, "attention.key_length", file.get("rope.dimension_count", _head_width(file, common)))
    if _has(file, "attn_q.bias") and not _has(file, "attn_output.bias"):
        raise SecateurError(
            f"{file.path}: q, k and v have biases and o has none, which a llama model of transformers cannot hold"
        )
    return {
        "head_dim": width,
        "attention_bias": _has(file, "attn_q.bias"),
        "mlp_bias": _has(file, "ffn_up.bias"),
        "rope_parameters": _scaled(file, common["rope_parameters"], width),
    }


def _qwen2(file: GgufFile, common: Fields) -> Fields:
    _needs_whole_heads(file, common)
    return {"rope_parameters": _scaled(file, common["rope_parameters"], _head_width(file, common))}


def _qwen3(file: GgufFile, common: Fields) -> Fields:
    width = _head_width(file, common)
    return {
        "head_dim": width,
        "attention_bias": _has(file, "attn_q.bias"),
        "rope_parameters": _scaled(file, common["rope_parameters"], width),
    }


def _phi2(file: GgufFile, common: Fields) -> Fields:
    _needs_whole_heads(file, common)
    share = file.get("rope.dimension_count", _head_width(file, common)) / _head_width(file, common)
    rope = {**_scaled(file, common["rope_parameters"], _head_width(file, common)), "partial_rotary_factor": share}
    return {"rope_parameters": rope}


def _phi3(file: GgufFile, common: Fields) -> Fields:
    _needs_whole_heads(file, common)
    width = _head_width(file, common)
    rope = {**common["rope_parameters"], "partial_rotary_factor": file.get("rope.dimension_count", width) / width}
    trained = _size(file, "rope.scaling.original_context_length", _PHI3_LENGTH)
    found = [name for name in (SHORT, LONG) if name in file.tensors]
    if len(found) == 1:
        raise SecateurError(
            f"{file.path}: has {found[0]} and not the other of the two factors; convert the model again"
        )
    if found:
        factors = {"short_factor": file.read(SHORT).tolist(), "long_factor": file.read(LONG).tolist()}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": trained, **factors}
        if (attention := file.get("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = attention
    else:
        if file.get("rope.scaling.attn_factor") not in (None, *_NEUTRAL["rope.scaling.attn_factor"]):
            raise SecateurError(f"{file.path}: has rope.scaling.attn_factor without {SHORT}; convert the model again")
        rope = _scaled(file, rope, width)
    window = file.get("attention.sliding_window") or None
    return {"rope_parameters": rope, "original_max_position_embeddings": trained, "sliding_window": window}


def _gemma3(file: GgufFile, common: Fields) -> Fields:
    width, blocks = _head_width(file, common), common["num_hidden_layers"]
    window = file.get("attention.sliding_window") or None
    every = file.get("attention.sliding_window_pattern", _GEMMA3_EVERY)
    if isinstance(every, list):
        slides = [bool(slide) for slide in every]
    else:
        every = _size(file, "attention.sliding_window_pattern", _GEMMA3_EVERY)
        slides = [(block + 1) % every != 0 for block in range(blocks)]
    if window is None:
        slides = [False] * blocks
    local = file.get("rope.freq_base_swa", file.get("rope.local.freq_base", _GEMMA3_LOCAL_BASE))
    whole_heads = common["hidden_size"] // common["num_attention_heads"]
    return {
        "head_dim": width,
        "query_pre_attn_scalar": whole_heads if blocks == _GEMMA3_27B_BLOCKS else width,
        "final_logit_softcapping": file.get("final_logit_softcapping"),
        **({} if window is None else {"sliding_window": window}),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": {
            "full_attention": _scaled(file, common["rope_parameters"], width),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _scaled(file: GgufFile, rope: Fields, head_width: int) -> Fields:
    """Return the rotary parameters with their stretching: linear, yarn, or that of Llama 3, which is kept as a tensor.

    Raises:
        SecateurError: another one.
    """
    factor = file.get("rope.scaling.factor")
    kind = file.get("rope.scaling.type", "none" if factor is None else "linear")  # as llama.cpp reads it
    if kind not in ("none", "linear", "yarn"):
        raise SecateurError(
            f"{file.path}: {file.architecture}.rope.scaling.type is {kind!r} (known: none, linear, yarn)"
        )
    stretches = kind != "none" and factor not in (None, 0, 1)
    if STRETCHED in file.tensors and STRETCHED in architecture_of(file).tensors:
        if stretches:
            raise SecateurError(
                f"{file.path}: stretches rotary positions twice, by {STRETCHED} and by {kind} scaling; "
                "config.json can say one"
            )
        return {**rope, **_llama3(file, rope["rope_theta"], head_width)}
    if not stretches:
        return rope
    more = {}
    if kind == "yarn":
        more = {name: file.get(key) for key, name in _BETAS.items() if file.get(key) is not None}
        if (trained := file.get("rope.scaling.original_context_length")) is not None:
            more["original_max_position_embeddings"] = int(trained)
    return {**rope, "rope_type": kind, "factor": factor, **more}


def _llama3(file: GgufFile, theta: float, head_width: int) -> Fields:
    """Find the numbers of Llama 3's stretching that give the stored divisors of the frequencies."""
    stored = file.read(STRETCHED).ravel().astype(np.float64)
    width = 2 * len(stored)
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    factor = float(round(stored.max(), 6))
    for length in _LLAMA3_LENGTHS:
        between = (length / waves - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
        divisors = 1 / (np.clip(between, 0, 1) * (1 - 1 / factor) + 1 / factor)
        if width == head_width and np.allclose(divisors, stored, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    raise SecateurError(
        f"{file.path}: the divisors in {STRETCHED} are none that Llama 3's stretching of rotary positions gives "
        f"(largest: {factor:g}), so config.json cannot say them"
    )


KNOWN: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _llama, tensors=(STRETCHED,), permuted=True),
    "qwen2": Architecture("qwen2", _qwen2),
    "qwen3": Architecture("qwen3", _qwen3),
    "phi2": Architecture("phi", _phi2, epsilon=(_EPSILON, "layer_norm_eps"), partly_turned=True),
    "phi3": Architecture(
        "phi3",
        _phi3,
        ("attention.sliding_window", "rope.scaling.attn_factor"),
        tensors=(SHORT, LONG),
        partly_turned=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _gemma3,
        (
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "rope.freq_base_swa",
            "rope.local.freq_base",
            "rope.global.freq_base",
            "final_logit_softcapping",
        ),
        norms_plus_one=True,
    ),
}
