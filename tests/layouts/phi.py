"""Phi: attention and MLP side by side; no gate."""

from tests.layouts import Layout

LAYOUT = Layout(
    blocks="model.layers",
    matrices={
        "q": ("self_attn.q_proj", slice(0, 32)),
        "k": ("self_attn.k_proj", slice(0, 16)),
        "v": ("self_attn.v_proj", slice(0, 16)),
        "o": ("self_attn.dense", slice(0, 32)),
        "up": ("mlp.fc1", slice(0, 48)),
        "down": ("mlp.fc2", slice(0, 32)),
    },
    skips=1,
)
