"""`secateur inspect`: what was removed, block by block; parameters, bytes and FLOPs of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from secateur.core.records import Record
from secateur.evaluate.maps import linear_maps
from secateur.models.load import open_checkpoint
from secateur.models.runtime import is_index_map
from secateur.models.view import BlockView, zero_rows
from secateur.plan.plan import read_plan_json


def inspect(model: str | Path, revision: str | None = None) -> Record:
    """Describe a checkpoint, pruned or not. One block at a time is read.

    Returns:
        A record with `blocks` (sizes, parameters, zeros and all-zero rows of every matrix; `residual` has the widths
        and adapters of a sliced model), totals, `bytes` on disk, and `flops_per_token`: two for each weight of a
        product, the head and adapters included, attention over the context left out.
    """
    model = str(model)
    checkpoint = open_checkpoint(model, revision)
    view = checkpoint.view()
    blocks = [_block(block) for block in view.iterate()]
    outer = {name: int(view.source.read(name).count_nonzero()) for name in view.outer_names()}
    parameters = view.parameters()
    plan = read_plan_json(checkpoint.folder)
    return {
        "command": "inspect",
        "model": model,
        "family": view.family.name,
        "model_type": view.config.model_type,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "parameters": parameters,
        "parameters_blocks": view.matrix_parameters(),
        "nonzero": sum(outer.values()) + sum(block["nonzero"] for block in blocks),
        "zero_rows": sum(matrix["zero_rows"] for block in blocks for matrix in block["matrices"].values()),
        "bytes": sum(file.stat().st_size for file in {file for file, _ in checkpoint.index.values()}),
        "flops_per_token": sum(linear_map.flops() for linear_map in linear_maps(view)),
        "blocks": blocks,
        "pruned": {
            key: plan[key] for key in ("model", "method", "options", "sparsity", "sparsity_measured", "pruning_ratio")
        }
        if plan
        else None,
        "out": str(Path(model)),
    }


def _block(block: BlockView) -> dict[str, Any]:
    matrices = {name: _matrix(block, name) for name in block.names}
    tensors = [tensor for name, tensor in block.tensors.items() if not is_index_map(name)]
    nonzero = sum(int(tensor.count_nonzero()) for tensor in tensors)
    parameters = sum(tensor.numel() for tensor in tensors)
    dims = block.dims
    return {
        "index": block.index,
        "heads": dims.heads,
        "groups": dims.groups,
        "ffn": dims.ffn,
        "residual": asdict(dims.residual) if dims.residual else None,
        "parameters": parameters,
        "nonzero": nonzero,
        "matrices": matrices,
    }


def _matrix(block: BlockView, name: str) -> dict[str, Any]:
    weight_OI: torch.Tensor = block.matrix(name)
    zeros = weight_OI.numel() - int(weight_OI.count_nonzero())
    return {
        "shape": list(weight_OI.shape),
        "zeros": zeros,
        "sparsity": zeros / max(1, weight_OI.numel()),
        "zero_rows": zero_rows(weight_OI),
    }
