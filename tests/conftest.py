"""Fixtures: tiny random models of every family, made on the fly. The network is off."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import VOCABULARY, tiny_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("tests have no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def windows() -> torch.Tensor:
    """Calibration token ids [6, 20]."""
    return torch.randint(0, VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ids_file(tmp_path: Path, windows: torch.Tensor) -> str:
    file = tmp_path / "ids.npy"
    np.save(file, windows.numpy())
    return str(file)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny model and return its folder: `saved("opt", tied=True)`."""

    def save(model_type: str, **how: Any) -> Path:
        folder = tmp_path / f"dense-{model_type}"
        tiny_model(model_type, **how).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """`with interrupted_at("block-00001"): api.prune(...)` ends as Ctrl-C does, when one of these parts of the
    checkpoint is to be written.
    """
    from secateur.models.save import CheckpointWriter

    write = CheckpointWriter.write

    @contextmanager
    def interrupted(*parts: str) -> Iterator[None]:
        def stop(self: CheckpointWriter, name: str, *args: Any) -> None:
            if name in parts:
                raise KeyboardInterrupt
            write(self, name, *args)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "write", stop)
            with pytest.raises(KeyboardInterrupt):
                yield

    return interrupted
