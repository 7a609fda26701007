"""OPT 125m to 66b: LayerNorm, learned positions, biases, no gate; its heads fill the hidden size, so stock models
cannot have fewer.
"""

from transformers import PreTrainedConfig

from secateur.models.family import Family, Norm


def _refuse(config: PreTrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "OPT with the norm after the residual (OPT-350m) is post-norm, which no method here handles; use another "
            "size of OPT"
        )
    if config.word_embed_proj_dim != config.hidden_size:
        return (
            f"OPT with projected embeddings (word_embed_proj_dim {config.word_embed_proj_dim}, hidden size "
            f"{config.hidden_size}) "
            "is not handled; use another size of OPT"
        )
    if config._remove_final_layer_norm:
        return (
            "OPT saved without its final norm (before transformers 4.20) is not handled; save it again with a newer "
            "transformers"
        )
    return None


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    matrices={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    mlp=("fc1", "activation_fn", "fc2"),
    norm=Norm(centred=True, epsilon=1e-5),
    groups="num_attention_heads",
    ffn="ffn_dim",
    stock_heads=False,
    refuse=_refuse,
)
