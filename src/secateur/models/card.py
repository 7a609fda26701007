"""The model card of a pruned checkpoint: what was pruned, how, and what it measured."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from secateur.core import records
from secateur.core.names import shown
from secateur.models.load import Checkpoint

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCES = {
    "apache-2.0": "Apache License Version 2.0",
    "mit": "Permission is hereby granted, free of charge",
    "gpl-3.0": "GNU GENERAL PUBLIC LICENSE Version 3",
    "cc-by-4.0": "Creative Commons Attribution 4.0",
}
_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"


def model_card(
    checkpoint: Checkpoint, settings: Mapping[str, Any], facts: Mapping[str, Any], not_stock: str | None, counted: str
) -> str:
    """The README.md of a checkpoint; it holds nothing that varies between equal runs, and no folder of this machine.

    Args:
        checkpoint: the original, or what was healed.
        settings: what decided the result; `model` is the original.
        facts: what came out.
        not_stock: why the result is no stock architecture, or None.
        counted: what the sparsity is a fraction of, see `plan.quantity.words_of`.
    """
    known = front_matter(checkpoint.folder)
    name = shown(settings["model"])
    base = _base_model(checkpoint, settings["model"], known)
    calibration = settings["calibration"]
    rows = {
        "base model": name if base == name else f"{base} ({name})",
        "method": f"{settings['method']} ({', '.join(f'{k}={v}' for k, v in settings['options'].items())})",
        "parameters": f"{facts['params_after']:,} of {facts['params_before']:,} ({facts['pruning_ratio']:.2%} removed)",
        "not zero": f"{facts['nonzero_after']:,}",
        "sparsity": f"{facts['sparsity_measured']:.4f} of {counted}",
        "modules": settings["modules"] or "all matrices of the blocks",
        "weights that stay": "changed, to make up for those that went" if facts.get("updated") else "as they were",
        "calibration": f"{_text(calibration)}, seed {settings['seed']}" if calibration else "none needed",
    }
    if heal := facts.get("heal"):
        rows["healed"] = (
            f"LoRA of rank {heal['rank']}, alpha {heal['alpha']:g}, on {heal['targets']}, {heal['steps']} steps of {heal['batch']} from "
            f"{_text(heal['calibration'])}, seed {heal['seed']}"
            + (", kept apart" if heal["keep_adapter"] else ", merged")
        )
    loading = _loading(checkpoint, not_stock, adapter=bool(heal and heal["keep_adapter"]))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    front = [
        f"base_model: {base}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *_licence(checkpoint.folder, known),
    ]
    head = "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {name}, pruned with {settings['method']}",
            "",
            f"Made by secateur {records.version()}.",
        ]
    )
    return f"{head}\n\n| | |\n|---|---|\n{table}\n\n{loading}\n\n{_BEGIN}\n{_END}\n"


def _text(calibration: Mapping[str, Any]) -> str:
    """A text by its name and hash: that of its file, or of its token ids where it is none."""
    whose, sha256 = (
        ("file", calibration["file_sha256"]) if calibration.get("file_sha256") else ("token ids", calibration["sha256"])
    )
    return f"{shown(calibration['spec'])} (SHA-256 of its {whose} {sha256[:16]}...), {calibration['samples']} x {calibration['seqlen']} tokens"


def front_matter(folder: Path) -> dict[str, Any]:
    """The metadata of the card in a folder; empty where there is none that can be read."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        found = metadata_load(file)
    except Exception:  # the card is prose of somebody else: one that is no YAML costs its metadata, not the run
        return {}
    return found if isinstance(found, dict) else {}


def _base_model(checkpoint: Checkpoint, model: str, known: Mapping[str, Any]) -> str:
    """The hub's name of the original, where its name, its configuration or its card tells it; else the name it was given by."""
    told = known.get("base_model")
    candidates = [model, checkpoint.raw_config.get("_name_or_path"), *(told if isinstance(told, list) else [told])]
    return next(
        (
            name
            for name in candidates
            if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists()
        ),
        shown(model),
    )


def _licence(folder: Path, known: Mapping[str, Any]) -> list[str]:
    """The lines of the front matter that say the licence: those of the original's card, else what its LICENSE file begins with."""
    lines = [
        f"{name}: {known[name]}"
        for name in ("license", "license_name", "license_link")
        if isinstance(known.get(name), str)
    ]
    file = next((file for file in sorted(folder.glob("LICEN[CS]E*")) if file.is_file()), None)
    if lines or file is None:
        return lines
    head = " ".join(file.read_text("utf-8", errors="replace")[:2000].split())
    found = next((name for name, words in _LICENCES.items() if words in head), None)
    return [f"license: {found}"] if found else ["license: other", f"license_link: {file.name}"]


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
    if (
        card.is_symlink()
        or not os.access(card, os.W_OK)
        or not os.access(folder, os.W_OK)
        or _BEGIN not in (text := card.read_text("utf-8"))
    ):
        return  # none of ours, or not to be written to, such as a file of the hub's cache
    head, _, rest = text.partition(_BEGIN)
    middle, _, tail = rest.partition(_END)
    protocol = record["ppl_protocol"]
    text = f"{shown(protocol['spec'])} (SHA-256 of its token ids {protocol['sha256'][:16]}...)"
    what = f"perplexity, {text}, windows of {protocol['seqlen']} tokens ({protocol['tokens']:,} predicted)"
    lines = [line for line in middle.strip().splitlines() if not line.startswith(f"- {what}:")]
    found = f"{record['ppl']:.4f}" if math.isfinite(record["ppl"]) else f"infinite ({record['loss']:.1f} nats a token)"
    lines.append(f"- {what}: {found}")
    temporary = folder / f".README.{os.getpid()}.tmp"
    temporary.write_text(f"{head}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{tail}", "utf-8")
    temporary.rename(card)
