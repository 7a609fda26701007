"""Task results of dense and pruned models beside those of lm-eval's own Hugging Face backend on the same checkpoints.

Each model is evaluated dense, after Wanda at 50% (a stock checkpoint) and after SliceGPT at 25% (one of secateur's own
classes), with the task files of `python tools/real_models.py fetch`, which `make real` runs.

    python benchmarks/tasks_against_lm_eval.py --models bundled smollm2 --limit 100
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import table

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.real_models import MODELS, TASKS, cache_folder, missing

PRUNED: dict[str, dict[str, Any]] = {
    "dense": {},
    "wanda 50%": {"method": "wanda", "sparsity": 0.5},
    "slicegpt 25%": {"method": "slicegpt", "sparsity": 0.25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled"])
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, "secateur_cloze"])
    options = parser.parse_args()
    if why := missing("tasks", "data"):
        parser.exit(2, f"{why}\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in map(_place, options.models):
            for name, how in PRUNED.items():
                rows += compare(model, name, how, Path(folder), options)
    table(
        ("checkpoint", "task", "n", "acc", "lm-eval", "acc_norm", "lm-eval", "largest difference of a log-probability"),
        [tuple(_cells(row)) for row in rows],
    )
    same = all(row["acc"] == row["lm_eval_acc"] and row["acc_norm"] == row["lm_eval_acc_norm"] for row in rows)
    print("equal" if same else "NOT equal")
    print(json.dumps({"benchmark": "tasks_against_lm_eval", "equal": same, "rows": rows}))


def _place(model: str) -> str:
    """Return the folder of a model of the cache, by its short name; other names as they are."""
    return str(cache_folder() / "models" / MODELS[model].folder) if model in MODELS else model


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str) -> str:
        return "" if row[key] is None else f"{row[key]:.4f}"

    return [
        row["checkpoint"],
        row["task"],
        str(row["n"]),
        *(number(key) for key in ("acc", "lm_eval_acc", "acc_norm", "lm_eval_acc_norm")),
        f"{row['difference']:.1e}",
    ]


def compare(
    model: str, name: str, how: dict[str, Any], folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from secateur import api
    from secateur.evaluate.answers import Answers
    from secateur.evaluate.harness import load_tasks, run_tasks
    from secateur.models.load import load_model, open_checkpoint

    target = model
    if how:
        target = str(folder / f"{Path(model).name}-{how['method']}")
        api.prune(api.Request(model, calibration="builtin", samples=32, seqlen=256, **how), Path(target))
    checkpoint = open_checkpoint(target)
    ours = load_model(checkpoint, device=_cpu(), dtype=_float32())
    theirs = HFLM(
        pretrained=str(checkpoint.folder), device="cpu", dtype="float32", batch_size=16
    )  # a process that has imported secateur needs no remote code
    rows = []
    for task in options.tasks:
        loaded = load_tasks([task], cache_folder() / "tasks", options.limit)
        answers = Answers()
        mine = run_tasks(loaded, ours, checkpoint.tokenizer(), answers).results[task]
        logps = [response[0] for instance in loaded.found["tasks"][task].instances for response in instance.resps]
        said = evaluate(lm=theirs, task_dict=loaded.found, limit=options.limit, bootstrap_iters=0)["results"][task]
        others = [response[0] for instance in loaded.found["tasks"][task].instances for response in instance.resps]
        rows.append(
            {
                "checkpoint": f"{Path(model).name} {name}",
                "task": task,
                "n": mine["n"],
                "acc": mine["acc"],
                "acc_norm": mine["acc_norm"],
                "lm_eval_acc": said["acc,none"],
                "lm_eval_acc_norm": said.get("acc_norm,none"),
                "difference": max(abs(a - b) for a, b in zip(logps, others, strict=True)),
            }
        )
    return rows


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _float32() -> Any:
    import torch

    return torch.float32


if __name__ == "__main__":
    main()
