"""Write the recipe that lies in a result: the model and every step that made it, with what decides the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from secateur.core import records
from secateur.core.names import shown
from secateur.models.load import Checkpoint
from secateur.recipe.fields import ELSEWHERE, OPTION_OF, PLACES
from secateur.recipe.notation import dump
from secateur.recipe.read import written_recipe
from secateur.text.files import file_hash

_NOISE = ("device", "spill", "checkpointing")  # where and how it was computed, which does not decide the result
# Of heal: a text for this alone need not travel with a recipe.
_MEASURING = ("text", "protocol", "eval_seqlen", "limit")
_QUIET = ("text_field", "prompt_form")  # written only where it is not the default
_VERSIONS = ("python", "torch", "transformers", "tokenizers", "numpy")
_HEAD = """\
# This makes the checkpoint that it lies in again, to the byte with the versions below:
#     secateur run recipe.yaml --out DIR
"""


def step_of(
    kind: str, request: Any, resolved: Mapping[str, Any], known: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a step as a recipe has it, and the SHA-256 of the texts it names.

    Args:
        kind: the step.
        request: its settings.
        resolved: fields that the run decided, such as a default of the method; None leaves a field out.
        known: the texts of the steps before. Another text of the same name is named with its folder.
    """
    options: dict[str, Any] = {}
    texts: dict[str, str] = dict(known or {})
    for field in fields(request):
        if field.name in ELSEWHERE or field.name in _NOISE or (kind == "heal" and field.name in _MEASURING):
            continue
        if kind == "heal" and field.name == "evaluate":
            options["eval"] = False
            continue
        value = resolved.get(field.name, getattr(request, field.name))
        if value is None or (value is False and field.default is False) or value in ((), [], {}, ""):
            continue
        if field.name in _QUIET and value == field.default:
            continue
        plain = _plain(field.name, value)
        if field.name in PLACES and (sha256 := file_hash(str(value))) is not None:
            if texts.get(plain, sha256) != sha256:
                plain = f"{Path(value).absolute().parent.name}/{plain}"
            texts[plain] = sha256
        options[OPTION_OF[kind].get(field.name, field.name)] = plain
    return {kind: options}, texts


def _plain(name: str, value: Any) -> Any:
    """Return a value as YAML has it, without folders of this machine."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    is_path = name in PLACES or isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
    return shown(str(value)) if is_path else value


def recipe_text(
    kind: str,
    request: Any,
    resolved: Mapping[str, Any],
    checkpoint: Checkpoint,
    device: str,
    weights: Mapping[str, str],
) -> str:
    """Return the recipe of a result. Equal runs give equal text, without folders of this machine.

    Args:
        kind, request, resolved: the step that made it; see `step_of`.
        checkpoint: what the step worked on. If that is a result with a recipe, its steps come first.
        device: where it was computed.
        weights: the SHA-256 of each file of weights.
    """
    before = written_recipe(checkpoint.folder) or {}
    step, texts = step_of(kind, request, resolved, before.get("texts"))
    made_before = before.get("made") if isinstance(before.get("made"), dict) else None
    model = before.get("model") or shown(checkpoint.name)
    revision = before.get("revision") if before else checkpoint.revision
    versions = records.versions()
    return _HEAD + dump(
        {
            "model": model,
            **({} if revision is None else {"revision": revision}),
            "steps": [*before.get("steps", []), step],
            **({"texts": texts} if texts else {}),
            "made": {
                "secateur": records.version(),
                **{name: versions[name] for name in _VERSIONS},
                "device": device,
                "model_fingerprint": (made_before or {}).get("model_fingerprint") or checkpoint.fingerprint(),
                "weights": dict(weights),
            },
        }
    )
