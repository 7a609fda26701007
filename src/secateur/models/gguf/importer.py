"""Write a GGUF file as a Hugging Face folder, so that a model of which only that file is left can be pruned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from secateur.core import records
from secateur.core.errors import SecateurError, UsageError, reason
from secateur.core.progress import track
from secateur.models.companions import IMPORTED
from secateur.models.gguf.config import architecture_of, config_of
from secateur.models.gguf.file import GgufFile, open_gguf
from secateur.models.gguf.tensors import is_quantised, matching, natural_dtype, pieces
from secateur.models.gguf.tokenizer import write_tokenizer
from secateur.models.load import build_skeleton, open_checkpoint
from secateur.models.save import refuse_inside, write_weights, written_folder

Facts = dict[str, Any]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def import_gguf(path: Path, out: Path, *, dtype: str = "auto", overwrite: bool = False) -> Facts:
    """Write a folder that transformers loads, tokenizer included, from a GGUF file. It reads some rows at a time.

    Args:
        path: the file, whole: a split model is joined first.
        out: the folder to write.
        dtype: the dtype of the weights, or auto: that of the file's matrices, and bfloat16 if they are quantised.
        overwrite: replace `out`.

    Returns:
        `architecture`, `model_type`, `params`, `dtype`, `stored` (type in the file -> number of tensors), `dequantised`
        (whether any of them was quantised), `bytes_before`, `bytes_after`.

    Raises:
        UsageError: no such file, a wrong dtype, `out` exists, or the package gguf is missing.
        SecateurError: the file cannot be imported; the message says why.
    """
    if dtype not in ("auto", *_DTYPES):
        raise UsageError(f"--dtype {dtype}: not one of auto, {', '.join(_DTYPES)}")
    file = open_gguf(path)
    refuse_inside(out, {"the file": path})
    config, skeleton = _described(file)
    names = matching(skeleton, file)
    chosen = natural_dtype(file, list(names.values())) if dtype == "auto" else _DTYPES[dtype]
    config.dtype = chosen
    state = skeleton.state_dict()
    shapes = {name: tuple(state[name].shape) for name in names}
    params = sum(tensor.numel() for tensor in skeleton.parameters())
    facts = {
        "architecture": file.architecture,
        "model_type": config.model_type,
        "params": params,
        "dtype": str(chosen).removeprefix("torch."),
        "stored": file.kinds(),
        "dequantised": is_quantised(file),
        "bytes_before": path.stat().st_size,
    }
    with written_folder(out, overwrite, needed=params * chosen.itemsize) as folder:
        write_weights(folder, shapes, chosen, _read(file, names, skeleton, chosen))
        write_tokenizer(file, folder, config.max_position_embeddings)
        _write_texts(file, folder, config, facts)
        checkpoint = open_checkpoint(str(folder), ignore_unknown=False)
        facts["bytes_after"] = checkpoint.weight_bytes()
    return facts


def _described(file: GgufFile) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Return the configuration and the model without weights.

    Raises:
        SecateurError: transformers refuses the configuration.
    """
    fields = config_of(file)
    try:
        config = AutoConfig.for_model(**fields)
        skeleton = build_skeleton(config)
    except Exception as error:
        raise SecateurError(
            f"{file.path}: transformers cannot build the {fields['model_type']} model that its metadata describes "
            f"({reason(error)})"
        ) from error
    config.architectures = [type(skeleton).__name__]
    return config, skeleton


def _read(
    file: GgufFile, names: Mapping[str, str], skeleton: PreTrainedModel, dtype: torch.dtype
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Yield the name of each tensor of the model, and its rows."""
    known, config = architecture_of(file), skeleton.config
    heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    for name, stored in track(names.items(), "tensors", len(names)):
        yield name, pieces(file, stored, known, heads, dtype)


def _write_texts(file: GgufFile, folder: Path, config: PreTrainedConfig, facts: Facts) -> None:
    ends = [file.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    ids = {
        "bos_token_id": getattr(config, "bos_token_id", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": getattr(config, "pad_token_id", None),
    }
    GenerationConfig(**{key: value for key, value in ids.items() if value is not None}).save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / IMPORTED).parent.mkdir()
    about = {"file": file.path.name, "secateur": records.version(), **facts}
    (folder / IMPORTED).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(file, facts), "utf-8")


def _card(file: GgufFile, facts: Facts) -> str:
    about = file.metadata
    front = {
        "base_model": about.get("general.base_model.0.repo_url", "").removeprefix("https://huggingface.co/"),
        "library_name": "transformers",
        "license": about.get("general.license"),
        "pipeline_tag": "text-generation",
    }
    head = "\n".join(f"{key}: {value}" for key, value in front.items() if value)
    name = about.get("general.name", file.path.stem)
    stored = ", ".join(f"{kind} ({count} tensors)" for kind, count in facts["stored"].items())
    lost = (
        "The weights were dequantised, so they are those of the file and not those of the model before quantisation."
        if facts["dequantised"]
        else "The weights were not quantised."
    )
    return (
        f"---\n{head}\n---\n# {name}, imported from {file.path.name}\n\n"
        f"Made by secateur {records.version()}: `secateur import {file.path.name} --out DIR`. "
        f"The file stores {stored}; the weights here are {facts['dtype']}. {lost}\n"
    )
