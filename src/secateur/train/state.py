"""The state of an interrupted learning run, as one safetensors file: network, optimiser, noise, and what was seen.

The position in the text follows from the step and the seed. With it, a resumed run gives the same bytes on a CPU as one that was not interrupted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def save_state(file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, noise: torch.Generator, note: dict[str, Any]) -> None:
    """Write the state, whole or not at all. `note` is what JSON can say."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    tensors["noise"] = noise.get_state()
    temporary = file.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"note": json.dumps(note)})
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.rename(file)


def load_state(file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, noise: torch.Generator) -> dict[str, Any]:
    """Put a saved state in place, and return its note."""
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # the handle has no iterator
        note: dict[str, Any] = json.loads(handle.metadata()["note"])
    network.load_state_dict({name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")})
    states: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            states.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    noise.set_state(tensors["noise"])
    return note
