"""Gemma 3, the text model (270M, 1B): gains of 1 + w, norms before and after attention and MLP.

The residual stream can neither be rotated nor selected from: what attention and MLP write passes through a norm first,
which divides by the mean square of all features.
"""

from transformers import PreTrainedConfig

from secateur.models.family import Family, Norm


def _refuse(config: PreTrainedConfig) -> str | None:
    if getattr(config, "use_bidirectional_attention", False):
        return (
            "with use_bidirectional_attention it is an encoder, where each token sees the ones after it; use a causal "
            "language model"
        )
    return None


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    matrices={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm=Norm(gain_offset=1.0),
    logit_cap="final_logit_softcapping",
    refuse=_refuse,
)
