"""The model card of a pruned checkpoint: what was pruned, how, and what it measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.models.load import Checkpoint

_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"


def model_card(checkpoint: Checkpoint, settings: Mapping[str, Any], facts: Mapping[str, Any], not_stock: str | None) -> str:
    """The README.md of a checkpoint; it holds nothing that varies between equal runs. `checkpoint` is the original, or what was healed."""
    name = Path(settings["model"]).name if Path(settings["model"]).is_dir() else settings["model"]
    calibration = settings["calibration"]
    rows = {
        "base model": name,
        "method": f"{settings['method']} ({', '.join(f'{k}={v}' for k, v in settings['options'].items())})",
        "sparsity asked, measured": f"{settings['sparsity']}, {facts['sparsity_measured']:.4f} of the targeted matrices",
        "modules": settings["modules"] or "all matrices of the blocks",
        "parameters": f"{facts['params_after']:,} of {facts['params_before']:,} (pruning ratio {facts['pruning_ratio']:.4f})",
        "not zero": f"{facts['nonzero_after']:,}",
        "weights that stay": "changed, to make up for those that went" if facts.get("updated") else "as they were",
        "calibration": f"{calibration['spec']}, {calibration['samples']} x {calibration['seqlen']} tokens, seed {settings['seed']}"
        if calibration
        else "none needed",
    }
    if heal := facts.get("heal"):
        data = heal["calibration"]
        rows["healed"] = (
            f"LoRA of rank {heal['rank']}, alpha {heal['alpha']:g}, on {heal['targets']}, {heal['steps']} steps of {heal['batch']} from "
            f"{data['spec']} ({data['samples']} x {data['seqlen']} tokens), seed {heal['seed']}" + (", kept apart" if heal["keep_adapter"] else ", merged")
        )
    loading = _loading(checkpoint, not_stock, adapter=bool(heal and heal["keep_adapter"]))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    licence = _licence(checkpoint.folder)
    front = [f"base_model: {name}", "library_name: transformers", "pipeline_tag: text-generation", *([f"license: {licence}"] if licence else [])]
    head = "\n".join(["---", *front, "---", f"# {name}, pruned with {settings['method']}", "", f"Made by secateur {records.version()}."])
    return f"{head}\n\n| | |\n|---|---|\n{table}\n\n{loading}\n\n{_BEGIN}\n{_END}\n"


def _loading(checkpoint: Checkpoint, not_stock: str | None, *, adapter: bool) -> str:
    """How to load it, as code that runs where this folder is."""
    if adapter:
        return "An adapter in peft's form, without the model: `PeftModel.from_pretrained(model, folder)` puts it on the checkpoint that it was trained on."
    words = "A stock architecture, which loads as it is:"
    if not_stock:
        words = f"The blocks are not those of a stock architecture ({not_stock}): load with `trust_remote_code=True`, or without it after `import secateur`."
    trust = ", trust_remote_code=True" if not_stock else ""
    tokenizer = any(checkpoint.folder.glob("tokenizer*"))
    code = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if tokenizer else ''}",
        "",
        'folder = "."  # where this file is',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        *([f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"] if tokenizer else []),
    ]
    return "\n".join([words, "", "```python", *code, "```"])


def note_measurement(folder: Path, record: Mapping[str, Any]) -> None:
    """Add what an evaluation found to the card of a checkpoint that secateur wrote; the same protocol again replaces its line."""
    card = folder / "README.md"
    if card.is_symlink() or not os.access(card, os.W_OK) or not os.access(folder, os.W_OK) or _BEGIN not in (text := card.read_text("utf-8")):
        return  # none of ours, or not to be written to, such as a file of the hub's cache
    head, _, rest = text.partition(_BEGIN)
    middle, _, tail = rest.partition(_END)
    protocol = record["ppl_protocol"]
    what = f"perplexity, {protocol['spec']}, windows of {protocol['seqlen']} tokens ({protocol['tokens']:,} predicted)"
    lines = [line for line in middle.strip().splitlines() if not line.startswith(f"- {what}:")]
    lines.append(f"- {what}: {record['ppl']:.4f}")
    temporary = folder / f".README.{os.getpid()}.tmp"
    temporary.write_text(f"{head}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{tail}", "utf-8")
    temporary.rename(card)


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8"), re.DOTALL) if card.is_file() else None
    licence = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return licence[1] if licence else None
