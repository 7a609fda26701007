"""A model with a few of its own blocks: true shapes and weights, to rehearse work that grows with the depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from secateur.calibrate.stream import make_computed_tables
from secateur.models.load import Checkpoint, build_skeleton
from secateur.models.pruned_config import drop_blocks


def miniature(checkpoint: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """Return a checkpoint with some blocks of another one, numbered from 0, and everything outside the blocks.

    Args:
        checkpoint: the whole model, which is not read.
        kept: the indices of the blocks, ascending.
    """
    view = checkpoint.view()
    raw = drop_blocks(checkpoint.raw_config, checkpoint.config, kept)
    config = type(checkpoint.config).from_dict(raw)
    own = {name: name for name in view.outer_names()}
    for place, index in enumerate(kept):
        prefix = view.block_prefix(index)
        inside = (name for name in checkpoint.index if name.startswith(prefix))
        own |= {view.block_prefix(place) + name.removeprefix(prefix): name for name in inside}
    return replace(
        checkpoint,
        config=config,
        raw_config=raw,
        index={name: checkpoint.index[old] for name, old in own.items()},
        shapes={name: checkpoint.shapes[old] for name, old in own.items()},
    )


def in_memory(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a miniature, which has no folder of its own, as `load_model` loads a whole model."""
    model = build_skeleton(checkpoint.config, dtype)
    kept = set(model.state_dict())
    state = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name in checkpoint.names()
        if name in kept
        for tensor in (checkpoint.read(name),)
    }
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    make_computed_tables(model, device)
    model.eval()
    return model
