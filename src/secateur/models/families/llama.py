"""LLaMA 1 to 3, and the look-alikes that the same description serves: Mistral, Qwen2 (biases on q, k, v), Qwen3 (q and
k norms).
"""

from secateur.models.family import Family

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    matrices={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
)
