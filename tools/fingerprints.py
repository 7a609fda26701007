"""SHA-256 of every file that each method writes, for each pattern and family.

Two runs with equal lines wrote equal bytes.

    python tools/fingerprints.py --out before.json      # before a change that should change nothing
    python tools/fingerprints.py --against before.json  # after it: names what differs, and exits with 1

The models are tiny random ones of every model type (in float32, tied in bfloat16), and the bundled model. Everything
is seeded. Results also depend on the version of torch and on the machine, so compare on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny models are those of the tests

import numpy as np
import torch

from secateur import api
from secateur.core.errors import SecateurError
from secateur.core.progress import track
from secateur.methods import find_method, method_names
from tests.folders import contents
from tests.tiny import MODEL_TYPES, VOCABULARY, tiny_model

PATTERNS = (None, "unstructured", "2:4", "rows", "columns")


def cases() -> list[tuple[str, str | None]]:
    """Every method with every pattern that it takes."""
    found = []
    for name in method_names():
        has = "pattern" in find_method(name).options_class.__dataclass_fields__
        found += [(name, pattern) for pattern in PATTERNS if (pattern is not None) == has]
    return found


def request(model: str, method: str, pattern: str | None, calibration: str, **more: Any) -> api.Request:
    """A prune that takes moments."""
    sparsity = None if ":" in (pattern or "") else 0.5 if method != "llm_surgeon" else 0.3
    return api.Request(
        model,
        method,
        sparsity=sparsity,
        pattern=pattern,
        calibration=calibration,
        options=find_method(method).says.QUICK,
        **more,
    )


def fingerprints(folder: Path) -> dict[str, dict[str, str] | str]:
    """Run -> path in the result -> SHA-256; a refusal is its message."""
    ids = folder / "ids.npy"
    np.save(ids, torch.randint(3, VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(3)).numpy())
    runs: dict[str, api.Request] = {}
    for model_type in MODEL_TYPES:
        for dtype in (torch.float32, torch.bfloat16):
            dense = folder / f"{model_type}-{dtype}".replace("torch.", "")
            tiny_model(model_type, tied=dtype == torch.bfloat16, dtype=dtype).save_pretrained(dense)
            for method, pattern in cases():
                runs[f"{dense.name} {method} {pattern or ''}".strip()] = request(str(dense), method, pattern, str(ids))
    for method, pattern in cases():
        runs[f"bundled {method} {pattern or ''}".strip()] = request(
            "bundled", method, pattern, "builtin", samples=4, seqlen=64
        )
    found: dict[str, dict[str, str] | str] = {}
    for label, asked in track(runs.items(), "fingerprints: runs", len(runs)):
        out = folder / "out"
        try:
            api.prune(asked, out, overwrite=True)
            found[label] = contents(out)
        except SecateurError as error:
            found[label] = str(error).replace(str(folder), "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the fingerprints here")
    parser.add_argument("--against", type=Path, help="compare with these")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprints(Path(folder))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    files = sum(len(value) for value in found.values() if isinstance(value, dict))
    print(f"{len(found)} runs, {files} files, {sum(isinstance(value, str) for value in found.values())} refused")
    if given.against:
        before = json.loads(given.against.read_text())
        different = [label for label in sorted(before.keys() | found.keys()) if before.get(label) != found.get(label)]
        for label in different:
            old, new = before.get(label), found.get(label)
            if isinstance(old, dict) and isinstance(new, dict):
                print(label, sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)))
            else:
                print(
                    label,
                    *(value if isinstance(value, str) else "written" if value else "not run" for value in (old, new)),
                    sep=" | ",
                )
        print(f"{len(different)} runs differ" if different else "all equal")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
