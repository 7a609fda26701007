"""The model card of a pruned checkpoint: the model, the method, and the measurements."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from secateur.core import records
from secateur.core.names import shown
from secateur.models.companions import IMPORTED
from secateur.models.load import Checkpoint
from secateur.models.save import PLAN_PATH, RECIPE_PATH

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL = ("checkpoints", "ckpt", "data", "model", "models", "out", "output", "outputs", "results", "runs", "tmp")
"""First parts of names that look like hub names, but are folders of a training run."""
_LICENCES = {
    "apache-2.0": "Apache License Version 2.0, January 2004",
    "gpl-3.0": "GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007",
    "cc-by-4.0": "Creative Commons Attribution 4.0 International",
}
"""Licence -> how its text begins."""
_MIT_BEGINS, _MIT_SHA256 = "Permission is hereby granted, free of charge", "0cf21bdfd1964a97"
_LONGEST_NOTICE = 120  # words before the text of the MIT licence: its name and the holders of the copyright
_SEEN = 0.0005  # a share of zeros below this is no finding
_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"


def model_card(
    checkpoint: Checkpoint, settings: Mapping[str, Any], facts: Mapping[str, Any], not_stock: str | None, counted: str
) -> str:
    """Return the README.md of a checkpoint. Equal runs give equal text, without folder names of this machine.

    Args:
        checkpoint: the original, or the checkpoint that was changed after pruning.
        settings: the settings that decided the result; `model` is the original.
        facts: the facts about the result.
        not_stock: the reason why the result is no stock architecture, or None.
        counted: the quantity that the sparsity is a fraction of, in the words of `plan.quantity.words_of`.
    """
    known = front_matter(checkpoint.folder)
    name = shown(settings["model"])
    base = _base_model(checkpoint, settings["model"], known)
    calibration = settings["calibration"]
    rows = {
        "base model": name if base == name else f"{base} ({name})",
        **_how_much(settings, facts, counted),
        "method": f"{settings['method']} ({', '.join(f'{k}={v}' for k, v in settings['options'].items())})",
        "modules": settings["modules"] or "all matrices of the blocks",
        "weights that stay": _weights_that_stay(facts),
        "calibration": f"{_text(calibration)}, seed {settings['seed']}" if calibration else "none needed",
    }
    if origin := _imported(checkpoint.folder):
        rows["base weights"] = origin
    if mended := facts.get("reconstruct"):
        rows["reconstructed"] = (
            f"block by block towards the dense model, {mended['steps']} steps of {mended['batch']:,} tokens a block "
            f"from {_text(mended['calibration'])}, seed {mended['seed']}"
        )
    if heal := facts.get("heal"):
        rows["healed"] = (
            f"LoRA of rank {heal['rank']}, alpha {heal['alpha']:g}, on {heal['targets']}, "
            f"{heal['steps']} steps of {heal['batch']} from {_text(heal['calibration'])}, seed {heal['seed']}"
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
            f"Made by secateur {records.version()}: `secateur run {RECIPE_PATH} --out DIR` makes it again.",
        ]
    )
    return f"{head}\n\n| | |\n|---|---|\n{table}\n\n{loading}\n\n{_BEGIN}\n{_END}\n"


def _how_much(settings: Mapping[str, Any], facts: Mapping[str, Any], counted: str) -> dict[str, str]:
    """Return how much is gone: of all parameters first, then of what the method removes from, by its name."""
    before, after, nonzero = (int(facts[name]) for name in ("params_before", "params_after", "nonzero_after"))
    asked, removed = settings.get("params_removed"), 1 - after / before
    rows = {"removed": "nothing", "zeroed": "nothing"}
    if after != before:
        rows["removed"] = f"{removed:.1%} of all parameters" + (
            f" (asked for: {asked:.1%})" if asked is not None and f"{asked:.1%}" != f"{removed:.1%}" else ""
        )
    if records.zeroes(facts) and (after - nonzero) / before >= _SEEN:
        rows["zeroed"] = f"{(after - nonzero) / before:.1%} of all parameters, {after - nonzero:,} zeros"
    if facts.get("sparsity_of") != "parameters":
        done = "zeroed" if facts.get("sparsity_of") == "weights" else "removed"
        rows[counted.removeprefix("the ")] = f"{facts['sparsity_measured']:.1%} {done}"
    return rows | {"parameters": f"{after:,}" + (f", before {before:,}" if after != before else "")}


def _weights_that_stay(facts: Mapping[str, Any]) -> str:
    """Return what became of the weights that stay: by pruning and reconstruction, and by a healing that was merged."""
    heal = facts.get("heal")
    healed = heal is not None and not heal["keep_adapter"]
    if facts.get("updated"):
        return "changed, to make up for those that went" + (", and then by healing" if healed else "")
    return "changed by healing" if healed else "as they were"


def _imported(folder: Path) -> str | None:
    """Return what became of weights that came from a GGUF file; None if they did not."""
    file = folder / IMPORTED
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text("utf-8"))
        done = "dequantised from" if about["dequantised"] else "imported from"
        return f"{done} {about['file']} ({', '.join(about['stored'])})"
    except (ValueError, KeyError, TypeError):  # somebody else changed the file
        return None


def _text(calibration: Mapping[str, Any]) -> str:
    """Return a text by its name and a hash: of its file, or of its token ids if it is not a file."""
    if calibration.get("file_sha256"):
        hashed, sha256 = "file", calibration["file_sha256"]
    else:
        hashed, sha256 = "token ids", calibration["sha256"]
    name = f"{shown(calibration['spec'])} (SHA-256 of its {hashed} {sha256[:16]}...)"
    size = f"{calibration['samples']} x {calibration['seqlen']} tokens"
    return f"{name}, {size}" + (", in the chat template" if calibration.get("form") == "chat" else "")


def front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata of the card in a folder; empty if the folder has none that can be read."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        metadata = metadata_load(file)
    except Exception:  # somebody else wrote the card: if it is not valid YAML, go on without its metadata
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _base_model(checkpoint: Checkpoint, model: str, known: Mapping[str, Any]) -> str:
    """Return the hub name of the original, where that is known; otherwise the name that the user gave.

    It is known from that name, from a folder of the hub's cache, from our own card if the checkpoint was healed, and
    from the title or configuration of the original. `base_model` in the card of the original is its parent.
    """
    parents = known.get("base_model")
    parents = parents if isinstance(parents, list) else [parents]
    ours = (checkpoint.folder / PLAN_PATH).is_file()
    configured = checkpoint.raw_config.get("_name_or_path")
    candidates = [
        model,
        *_in_cache(checkpoint.folder),
        *(parents if ours else [_title(checkpoint.folder)]),
        None if configured in parents else configured,  # saved after a fine-tuning, it is still the parent's name
    ]
    return next((name for name in candidates if isinstance(name, str) and _is_hub_name(name)), shown(model))


def _is_hub_name(name: str) -> bool:
    owner, _, own = name.partition("/")
    return (
        bool(_HUB_NAME.fullmatch(name))
        and not Path(name).exists()
        and owner not in _LOCAL
        and not own.startswith("checkpoint-")
    )


def _in_cache(folder: Path) -> list[str]:
    """Return the hub name that a folder of the hub's cache has: `models--ORG--NAME/snapshots/REVISION`."""
    parts = folder.resolve().parts
    return [part.removeprefix("models--").replace("--", "/", 1) for part in parts if part.startswith("models--")]


def _title(folder: Path) -> str | None:
    """Return the first heading of the card in a folder."""
    file = folder / "README.md"
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []
    return next((line[2:].strip() for line in lines if line.startswith("# ")), None)


def _licence(folder: Path, known: Mapping[str, Any]) -> list[str]:
    """Return the licence lines of the front matter, from the card of the original or from its LICENSE file.

    A file that says more or less than a known licence is `other`.
    """
    lines = [
        f"{name}: {known[name]}"
        for name in ("license", "license_name", "license_link")
        if isinstance(known.get(name), str)
    ]
    file = next((file for file in sorted(folder.glob("LICEN[CS]E*")) if file.is_file()), None)
    if lines or file is None:
        return lines
    text = " ".join(file.read_text("utf-8", errors="replace").split())
    licence = next((name for name, words in _LICENCES.items() if text.startswith(words)), None)
    if licence is None and _is_mit(text):
        licence = "mit"
    return [f"license: {licence}"] if licence else ["license: other", f"license_link: {file.name}"]


def _is_mit(text: str) -> bool:
    """Whether a text is the MIT licence, after its name and the holders of the copyright, and nothing else."""
    notice, _, rest = text.partition(_MIT_BEGINS)
    words = " ".join(re.findall(r"\w+", (_MIT_BEGINS + rest).lower()))
    return len(notice.split()) <= _LONGEST_NOTICE and hashlib.sha256(words.encode()).hexdigest().startswith(_MIT_SHA256)


def _loading(checkpoint: Checkpoint, not_stock: str | None, *, adapter: bool) -> str:
    """Return how to load the checkpoint, as code that runs inside its folder."""
    if adapter:
        return (
            "An adapter in peft's form, without the model: `PeftModel.from_pretrained(model, folder)` puts it on the "
            "checkpoint that it was trained on."
        )
    words = "A stock architecture, which loads as it is:"
    if not_stock:
        words = (
            f"The blocks are not those of a stock architecture ({not_stock}): load with `trust_remote_code=True`, "
            "or without it after `import secateur`."
        )
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
    """Add the perplexity of an evaluation to the card that secateur wrote; replace the line of the same protocol."""
    card = folder / "README.md"
    if (
        card.is_symlink()
        or not os.access(card, os.W_OK)
        or not os.access(folder, os.W_OK)
        or _BEGIN not in (text := card.read_text("utf-8"))
    ):
        return  # not written by secateur, or read-only, such as a file of the hub's cache
    head, _, rest = text.partition(_BEGIN)
    middle, _, tail = rest.partition(_END)
    protocol = record["ppl_protocol"]
    text = f"{shown(protocol['spec'])} (SHA-256 of its token ids {protocol['sha256'][:16]}...)"
    label = f"perplexity, {text}, windows of {protocol['seqlen']} tokens ({protocol['tokens']:,} predicted)"
    lines = [line for line in middle.strip().splitlines() if not line.startswith(f"- {label}:")]
    value = f"{record['ppl']:.4f}" if math.isfinite(record["ppl"]) else f"infinite ({record['loss']:.1f} nats a token)"
    lines.append(f"- {label}: {value}")
    temporary = folder / f".README.{os.getpid()}.tmp"
    temporary.write_text(f"{head}{_BEGIN}\n" + "\n".join(lines) + f"\n{_END}{tail}", "utf-8")
    temporary.rename(card)
