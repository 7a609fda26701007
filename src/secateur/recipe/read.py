"""Read a recipe, and refuse what is wrong with it before any work: names, types, and files that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError, UsageError, unknown
from secateur.core.paths import to_path
from secateur.models.load import BUNDLED
from secateur.models.save import RECIPE, RECIPE_PATH
from secateur.recipe.fields import KINDS, PLACES, met, request_of
from secateur.recipe.notation import load
from secateur.text.files import file_hash
from secateur.text.specs import NAMED, TASK

TOP = ("model", "revision", "steps", "texts", "made")
_EXAMPLE = "as in `- prune: {method: wanda, sparsity: 0.5}`"


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        where: the step in words, `step 2 (heal)`.
        kind: `prune`, `heal`, `eval` or `report`.
        request: the settings, without a model; None for `report`.
        given: the fields that the recipe names.
    """

    where: str
    kind: str
    request: Any
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and found to be well formed.

    Attributes:
        file: where it was read.
        model, revision: what the first step works on.
        steps: the steps, in order.
        made: what its maker got: versions, the fingerprint of the model, the SHA-256 of each file of weights. None for
            a recipe that a person wrote.
        replaced: whether the model is not that of the file.
    """

    file: Path
    model: str
    revision: str | None
    steps: tuple[Step, ...]
    made: Mapping[str, Any] | None = field(default=None, compare=False)
    replaced: bool = False


def read_recipe(file: str | Path, *, model: str | None = None, revision: str | None = None) -> Recipe:
    """Read a recipe; look at nothing but its own files.

    Args:
        file: the recipe, or the folder of a result that holds one.
        model: takes the place of the model of the recipe, and of its revision.
        revision: the hub revision of `model`.

    Raises:
        UsageError: a name, a value or a text of the recipe is wrong; the message names the step.
        SecateurError: the file is not YAML; the message names the line.
    """
    file = to_path(file)
    if file.is_dir():
        file = next((place for place in (file / RECIPE_PATH, file / RECIPE) if place.is_file()), file / RECIPE_PATH)
    content = load(file)
    if content is None:
        raise UsageError(f"{file}: is empty; a recipe has a model and steps, {_EXAMPLE}")
    if not isinstance(content, dict):
        what = met(content).removeprefix("is ")
        raise UsageError(f"{file}: a recipe has names with values, `model: ...` and `steps: ...`; this is {what}")
    for name in content:
        if name not in TOP:
            raise UsageError(f"{file}: {unknown('entry', str(name), TOP)}")
    for name in ("model", "revision"):
        if name in content and not (isinstance(content[name], str) and content[name]):
            raise UsageError(f"{file}: {name} {met(content[name])}; text is expected, in quotes if it is a number")
    if model is None and revision is not None:
        raise UsageError("--revision belongs to --model: add it, or write the revision into the recipe")
    if model is None and "model" not in content:
        raise UsageError(f"{file}: model is missing: write `model: NAME` at the top, or give --model")
    texts = _mapping(content, "texts", file)
    return Recipe(
        file,
        _found(content["model"], file) if model is None else model,
        content.get("revision") if model is None else revision,
        _steps(content.get("steps"), texts, file),
        _mapping(content, "made", file) or None,
        replaced=model is not None,
    )


def _mapping(content: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    value = content.get(name) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{file}: {name} {met(value)}; names with values are expected")
    return value


def _steps(content: Any, texts: Mapping[str, Any], file: Path) -> tuple[Step, ...]:
    if not isinstance(content, list) or not content:
        raise UsageError(f"{file}: steps {met(content)}; a list is expected, a step a line, {_EXAMPLE}")
    steps = []
    for number, entry in enumerate(content, start=1):
        if isinstance(entry, dict) and len(entry) > 1:
            several = ", ".join(str(name) for name in entry)
            hint = "indent the options below it" if next(iter(entry)) in KINDS else "write the step before its options"
            raise UsageError(f"{file}, step {number}: one step is expected, this has {several}: {hint}, {_EXAMPLE}")
        if not isinstance(entry, str | dict) or not entry:
            raise UsageError(f"{file}, step {number}: {met(entry)}; a step is expected, {_EXAMPLE}")
        kind, given = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        if kind not in KINDS:
            raise UsageError(f"{file}, step {number}: {unknown('step', str(kind), KINDS)}")
        where = f"step {number} ({kind})"
        if not isinstance(given, dict | None):
            raise UsageError(f"{file}, {where}: {met(given)}; options are expected, {_EXAMPLE}")
        request, names = request_of(kind, given or {}, f"{file}, {where}")
        steps.append(Step(where, kind, _with_places(request, texts, file, where), names))
    _check_order(steps, file)
    return tuple(steps)


def _check_order(steps: list[Step], file: Path) -> None:
    """Refuse a report on nothing, and steps that need a model after one that leaves none."""
    if steps[0].kind == "report":
        raise UsageError(f"{file}, {steps[0].where}: there is nothing to report on yet: put it behind other steps")
    adapter = next((n for n, step in enumerate(steps) if getattr(step.request, "keep_adapter", False)), len(steps))
    for step in steps[adapter + 1 :]:
        if step.kind != "report":
            raise UsageError(
                f"{file}, {step.where}: {steps[adapter].where} writes an adapter and no model (keep_adapter), so no "
                "step but report can follow it"
            )


def _with_places(request: Any, texts: Mapping[str, Any], file: Path, where: str) -> Any:
    """Find the texts and folders that a step names, and compare the texts with their hashes."""
    found = {}
    for name in PLACES:
        value = getattr(request, name, None)
        if not value or (name != "against" and (value.startswith(TASK) or value.partition("@")[0] in NAMED)):
            continue
        place = _found(value, file)
        if name != "against" and not Path(place).expanduser().exists():
            known = f" (known: {', '.join(NAMED)})" if name != "include_path" else ""
            raise UsageError(
                f"{file}, {where}: {name}: no '{value}' beside the recipe or in the working folder{known}; "
                "put the file there, or write its path into the recipe"
            )
        if value in texts and file_hash(place) != texts[value]:
            raise UsageError(
                f"{file}, {where}: {name}: '{place}' is another file than the recipe was made with (its SHA-256 is not "
                f"{str(texts[value])[:16]}...); put that file there, or take it out of `texts` to run with this one"
            )
        found[name] = place
    return replace(request, **found) if found else request


def _found(name: str, file: Path) -> str:
    """Return the path of a file or folder beside the recipe, if there is one; otherwise the name as it is."""
    beside = file.parent / name
    if name == BUNDLED or Path(name).expanduser().is_absolute() or not beside.exists():
        return name
    return str(beside)


def written_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the content of the recipe that lies in a result; None if there is none of ours."""
    file = folder / RECIPE_PATH
    if not file.is_file():
        return None
    try:
        content = load(file)
    except SecateurError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        return None
    return content
