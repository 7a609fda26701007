"""Phi-3: q, k and v in one module, gate and up in another."""

from tests.layouts import Layout

LAYOUT = Layout(
    blocks="model.layers",
    matrices={
        "q": ("self_attn.qkv_proj", slice(0, 32)),
        "k": ("self_attn.qkv_proj", slice(32, 48)),
        "v": ("self_attn.qkv_proj", slice(48, 64)),
        "o": ("self_attn.o_proj", slice(0, 32)),
        "gate": ("mlp.gate_up_proj", slice(0, 48)),
        "up": ("mlp.gate_up_proj", slice(48, 96)),
        "down": ("mlp.down_proj", slice(0, 32)),
    },
)
