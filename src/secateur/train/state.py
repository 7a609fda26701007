"""The saved state of a training run, as one safetensors file: network, optimiser, noise, more tensors and a note.

The position in the text follows from the step and the seed. So, on a CPU, a resumed run gives the same bytes as one
that was not interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.models.save import disk, save_whole


def save_state(
    file: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    noise: torch.Generator | None,
    more: Mapping[str, Tensor],
    note: Mapping[str, Any],
) -> None:
    """Write the state, whole or not at all.

    Args:
        file: the file to write.
        network, optimizer: their states are saved.
        noise: the generator of random numbers; None where the run draws none.
        more: further tensors.
        note: further values, which JSON must be able to hold.

    Raises:
        SecateurError: the disk is full, or the folder cannot be written.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    tensors |= ({} if noise is None else {"noise": noise.get_state()}) | {
        f"more.{name}": tensor for name, tensor in more.items()
    }
    with disk(file.parent):
        save_whole(file, tensors, {"note": json.dumps(note)})


def read_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the note of a saved state."""
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # the handle has no iterator
        note: dict[str, Any] = json.loads(handle.metadata()["note"])
    return tensors, note


def restore_state(
    tensors: Mapping[str, Tensor], network: nn.Module, optimizer: torch.optim.Optimizer, noise: torch.Generator | None
) -> dict[str, Tensor]:
    """Load tensors of `read_state` into network, optimiser and noise; returns the further tensors saved with them."""
    network.load_state_dict(_under("network.", tensors))
    states: dict[int, dict[str, Any]] = {}
    for name, tensor in _under("optimizer.", tensors).items():
        number, key = name.split(".")
        states.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    if noise is not None:
        noise.set_state(tensors["noise"])
    return _under("more.", tensors)


def load_state(
    file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, noise: torch.Generator | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a saved state into network, optimiser and noise; returns the further tensors and the note."""
    tensors, note = read_state(file)
    return restore_state(tensors, network, optimizer, noise), note


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
