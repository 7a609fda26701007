"""Phi 1, 1.5 and 2: parallel residual with one LayerNorm, partial rotary embedding, biases, in the head too."""

from transformers import PreTrainedConfig

from secateur.models.family import Family, Norm


def _refuse(config: PreTrainedConfig) -> str | None:
    if config.qk_layernorm:
        return (
            "Phi with qk_layernorm has norms tied to the number of heads, which are not handled; Phi 1, 1.5 and 2 "
            "have none"
        )
    return None


FAMILY = Family(
    name="phi",
    model_types=("phi",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.final_layernorm",
    head="lm_head",
    norms=("input_layernorm",),
    matrices={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    attention=("self_attn", "resid_dropout"),
    mlp=("mlp", "resid_dropout"),
    parallel=True,
    norm=Norm(centred=True, epsilon="layer_norm_eps"),
    refuse=_refuse,
)
