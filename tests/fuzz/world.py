"""Small whole inputs to damage, made once: checkpoints of every model type, texts in every format, records, plans and
an interrupted run.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur import api
from tests.tiny import VOCABULARY, tiny_model

WORDS = ["the", "a", "tree", "is", "cut", "by", "hand", "in", "spring", "and", "grows"]


@cache
def root() -> Path:
    return Path(mkdtemp(prefix="secateur-fuzz-"))


def checkpoint(model_type: str, *, tied: bool = False) -> Path:
    """A tiny model with a tokenizer of words."""
    return _checkpoint(model_type, tied)


@cache
def _checkpoint(model_type: str, tied: bool) -> Path:
    folder = root() / f"{model_type}-{tied}"
    tiny_model(model_type, tied=tied).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: 3 + n for n, word in enumerate(WORDS)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@cache
def ids() -> Path:
    file = root() / "ids.npy"
    np.save(file, torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0)).numpy())
    return file


@cache
def texts() -> dict[str, Path]:
    """One text in every format that is read."""
    rows = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(40)) for i in range(6)]
    folder = root() / "texts"
    folder.mkdir()
    lines = "\n".join(json.dumps({"text": row}) for row in rows)
    (folder / "t.jsonl").write_text(lines)
    (folder / "t.json").write_text(json.dumps([{"instruction": row, "output": row} for row in rows]))
    (folder / "t.txt").write_text("\n".join(rows))
    (folder / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "t.txt.bz2").write_bytes(bz2.compress("\r\n".join(rows).encode()))
    (folder / "t.json.xz").write_bytes(lzma.compress(lines.encode()))
    parquet.write_table(pa.table({"text": rows}), folder / "t.parquet")
    np.save(folder / "t.npy", np.load(ids()))
    save_file({"ids": torch.from_numpy(np.load(ids()))}, folder / "t.safetensors")
    return {file.name: file for file in sorted(folder.iterdir())}


@cache
def sweep() -> Path:
    """A folder with records of a dense model, of pruned ones and of a comparison, and the pruned checkpoints."""
    out = root() / "sweep"
    request = api.Request(str(checkpoint("llama")), "wanda", calibration=str(ids()))
    measure = api.EvalRequest(str(checkpoint("llama")), text=str(ids()))
    list(api.sweep(request, [0.2, 0.4, 0.6], out, measure))
    for name, method, options in (("rows", "magnitude", {"pattern": "rows"}), ("sliced", "slicegpt", {})):
        asked = api.Request(str(checkpoint("llama")), method, sparsity=0.3, calibration=str(ids()), options=options)
        api.prune(asked, out / name, records_file=out / "records.jsonl")
        api.evaluate(api.EvalRequest(str(out / name), text=str(ids())), records_file=out / "records.jsonl")
    return out


@cache
def interrupted() -> tuple[Path, Path]:
    """The files that an interrupted prune left, and the result of an uninterrupted one."""
    from secateur.models.save import CheckpointWriter

    request = api.Request(str(checkpoint("llama")), "wanda", sparsity=0.5, calibration=str(ids()))
    folder = root() / "interrupted"
    folder.mkdir()
    api.prune(request, folder / "whole")
    write = CheckpointWriter.write

    def stop(self: CheckpointWriter, name: str, *args: object) -> None:
        if name == "block-00001":
            raise KeyboardInterrupt
        write(self, name, *args)  # type: ignore[arg-type]

    CheckpointWriter.write = stop  # type: ignore[method-assign]
    try:
        api.prune(request, folder / "out")
    except KeyboardInterrupt:
        pass
    finally:
        CheckpointWriter.write = write  # type: ignore[method-assign]
    return folder / "out.partial", folder / "whole"
