"""OPT: 4 key-value heads, as many as query heads; no gate; the MLP's modules lie in the block itself."""

from tests.layouts import Layout

LAYOUT = Layout(
    blocks="model.decoder.layers",
    matrices={
        "q": ("self_attn.q_proj", slice(0, 32)),
        "k": ("self_attn.k_proj", slice(0, 32)),
        "v": ("self_attn.v_proj", slice(0, 32)),
        "o": ("self_attn.out_proj", slice(0, 32)),
        "up": ("fc1", slice(0, 48)),
        "down": ("fc2", slice(0, 32)),
    },
    smooth={"activation_function": "gelu"},
)
