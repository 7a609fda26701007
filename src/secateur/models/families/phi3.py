"""Phi-3 and Phi-4 (mini and medium): as LLaMA, with q, k, v in one module and gate, up in another."""

from secateur.models.family import Family

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    matrices={
        "q": "self_attn.qkv_proj",
        "k": "self_attn.qkv_proj",
        "v": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_up_proj",
        "up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    },
    attention=("self_attn", "resid_attn_dropout"),
    mlp=("mlp", "resid_mlp_dropout"),
)
