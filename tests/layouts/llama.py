"""LLaMA and its look-alikes: every matrix is a module."""

from tests.layouts import Layout

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
)
