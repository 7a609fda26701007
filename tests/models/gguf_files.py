"""GGUF files of tiny models, written as llama.cpp's converter writes them, with names and orders stated here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi": "phi2",
    "phi3": "phi3",
    "gemma3_text": "gemma3",
}


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring rows i and i + width / 2 of each head side by side, row by row."""
    width = len(rows) // heads
    order = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


def stored_name(name: str, architecture: str) -> str:
    stem, _, suffix = name.rpartition(".")
    names = {**NAMES, **(GEMMA_NAMES if architecture == "gemma3" else {})}
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{suffix}"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{names[inner]}.{suffix}"


def alphabet() -> list[str]:
    """The 64 tokens of a byte-level vocabulary: letters, the space, one merge, a special and an added token."""
    letters = [chr(code) for code in range(ord("A"), ord("z") + 1)]
    return ["<pad>", "<s>", "</s>", *letters, "Ġ", "ab", "<think>"]


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    *,
    kind: Kind = Kind.F32,
    keys: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    kinds: dict[str, Kind] | None = None,
    pre: str = "gpt-2",
    tokenizer: dict[str, int | bool] | None = None,
) -> Path:
    """Write a model of a known architecture.

    Args:
        model: the model in memory.
        file: where.
        kind: the type of the matrices; vectors are float32.
        keys: more keys of the architecture, without its name; None removes one.
        without: tensors to leave out.
        extra: more tensors.
        kinds: tensor -> its type, where it is another one.
        pre: how the tokenizer splits text.
        tokenizer: more keys of the tokenizer, without `tokenizer.ggml.`.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    epsilon = "attention.layer_norm_epsilon" if architecture == "phi2" else "attention.layer_norm_rms_epsilon"
    about: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        epsilon: float(config.layer_norm_eps if architecture == "phi2" else config.rms_norm_eps),
    }
    if architecture in ("qwen3", "gemma3"):
        about |= {"attention.key_length": width, "attention.value_length": width}
    if architecture == "gemma3":
        about |= {"attention.sliding_window": config.sliding_window}
    for key, value in {**about, **(keys or {})}.items():
        _add_key(writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer, pre)
    for key, value in (tokenizer or {}).items():
        _add_key(writer, f"tokenizer.ggml.{key}", value)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        stored = stored_name(name, architecture)
        if name in tied or stored in without:
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleaved(tensor, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        _add_tensor(
            writer, stored, tensor.float().numpy(), (kinds or {}).get(stored, kind if tensor.dim() > 1 else Kind.F32)
        )
    for stored, numbers in (extra or {}).items():
        _add_tensor(writer, stored, numbers, Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None:
        add[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens = alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    special, added, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
    writer.add_token_types([special if t.startswith("<") else normal for t in tokens[:-1]] + [added])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _add_tensor(writer: gguf.GGUFWriter, name: str, numbers: np.ndarray[Any, Any], kind: Kind) -> None:
    if kind in (Kind.F32, Kind.F16):
        writer.add_tensor(name, numbers.astype(np.float16 if kind == Kind.F16 else np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
