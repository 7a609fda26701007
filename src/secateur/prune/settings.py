"""The settings of a run, the identity of its source files, and the check of its output folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.models.load import Checkpoint
from secateur.models.save import refuse_inside
from secateur.prune.prepare import Prepared
from secateur.text.specs import holds_ids
from secateur.text.windows import calibration_facts


def prepared_settings(prepared: Prepared, windows: Tensor | None) -> dict[str, Any]:
    """Return the settings that decide the result; the plan and the record repeat them."""
    request = prepared.request
    calibration = None
    if windows is not None:
        assert prepared.calibration is not None
        calibration = calibration_facts(prepared.calibration, windows, prepared.form)
    return {
        "model": request.model,
        "model_revision": prepared.checkpoint.revision,
        "model_fingerprint": prepared.checkpoint.fingerprint(),
        "method": request.method,
        "options": asdict(prepared.job.options),
        "seed": request.seed,
        "sparsity": prepared.sparsity,
        "params_removed": request.params_removed,
        "modules": request.modules,
        "pattern": None if prepared.pattern is None else str(prepared.pattern),
        "calibration": calibration,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }


def resolved(prepared: Prepared, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run decided for fields of its request, as its recipe holds it; None leaves a field out.

    Args:
        prepared: the request, checked against its model.
        settings: from `prepared_settings`.
    """
    request, text = prepared.request, settings["calibration"] and prepared.calibration
    drawn = text is not None and not holds_ids(text)  # token ids are used as given, whatever is asked for
    return {
        "sparsity": None if request.params_removed is not None else prepared.sparsity,
        "pattern": settings["pattern"],
        "calibration": text,
        "samples": prepared.samples if drawn else None,
        "seqlen": prepared.seqlen if drawn else None,
        "text_field": request.text_field if drawn else None,
        "dtype": settings["dtype"],
        "options": {name: value for name, value in settings["options"].items() if name != "pattern"},
    }


def identity(checkpoint: Checkpoint) -> str:
    """Return a hash of the names, sizes and times of the weight files, without reading them.

    A resumed run must start from the same files.
    """
    files = sorted({file for file, _ in checkpoint.index.values()})
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([checkpoint.raw_config, facts]).encode()).hexdigest()


def refuse_out(out: Path, checkpoint: Checkpoint, spec: str | None, records_file: Path) -> None:
    """Raise UsageError if `out` is around or inside the model, or around the text `spec` or the records."""
    precious = {"the model": checkpoint.folder, "the records": records_file}
    if spec is not None and (text := Path(spec).expanduser()).is_file():
        precious["the calibration text"] = text
    refuse_inside(out, precious)
