"""Gemma 3: windows and full attention, a soft-cap behind the head, norms between the matrices and the residual."""

from tests.layouts import Layout

NORM_AFTER = "a norm (post_attention_layernorm) stands between what attention and MLP write and the residual stream"

LAYOUT = Layout(
    blocks="model.layers",
    matrices={
        "q": ("self_attn.q_proj", slice(0, 32)),
        "k": ("self_attn.k_proj", slice(0, 16)),
        "v": ("self_attn.v_proj", slice(0, 16)),
        "o": ("self_attn.o_proj", slice(0, 32)),
        "gate": ("mlp.gate_proj", slice(0, 48)),
        "up": ("mlp.up_proj", slice(0, 48)),
        "down": ("mlp.down_proj", slice(0, 32)),
    },
    fields={
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,  # shorter than the windows of calibration
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 3.0,
    },
    smooth={"final_logit_softcapping": 30.0},
    gain_offset=1.0,
    refuses={
        "slicegpt": NORM_AFTER,
        "disp_llm": NORM_AFTER,
        "llm_surgeon pattern=rows": NORM_AFTER,
        "llm_pruner mode=channel": NORM_AFTER,
    },
)
