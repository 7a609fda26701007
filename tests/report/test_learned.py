"""What was learned: variants, seeds and lambda are told apart, every figure is drawn where the records allow, and the
paper's tables stand beside them.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from secateur import api
from secateur.core.records import Record
from secateur.plan.plan import BlockPlan, Plan
from secateur.report import learned
from secateur.report.html import write_report
from secateur.report.published import published
from secateur.report.rows import collect
from tests.report.test_report import cloze, eval_record, prune_record, text_of

SPACES = {"attention_in": 16, "attention_out": 16, "mlp_in": 16, "mlp_out": 16, "ffn": 32}
DEFAULTS = vars(api.find_method("disp_llm").options({}))


def run(
    out: Path, sparsity: float, ppl: float, *, seed: int = 0, budget: float = 0.004, **options: Any
) -> list[Record]:
    step = list(range(20, 620, 20))
    learning = {
        "step": step,
        "loss": [4 - 0.01 * n for n in range(30)],
        "budget": [0.5] * 29 + [budget],
        "left": [1 - sparsity] * 30,
        "removed_half": 0.1,
    }
    name = out / "-".join(str(v) for v in (sparsity, seed, *options.values()))
    pruned = prune_record(
        "disp_llm",
        sparsity,
        name,
        pattern=None,
        seed=seed,
        options={**DEFAULTS, "steps": 600, **options},
        pruning_ratio=sparsity,
        learning=learning,
        seconds_by={"selection": 71.0},
    )
    shift = {"against": "tiny", "kl": 0.1, "top1_agreement": 0.5, "repetition": sparsity / 2, "repetition_dense": 0.02}
    return [pruned, eval_record(ppl, name, pruned, tasks=cloze(0.4), shift=shift)]


@pytest.fixture
def study(tmp_path: Path) -> list[Record]:
    records = [eval_record(10.0, "tiny", tasks=cloze(0.5))]
    for sparsity, ppl in ((0.3, 12.0), (0.5, 20.0)):
        records += (
            run(tmp_path, sparsity, ppl)
            + run(tmp_path, sparsity, ppl + 4, hypernetwork="none")
            + run(tmp_path, sparsity, ppl + 9, constrained=True)
        )
        records += run(tmp_path, sparsity, ppl + 1, seed=1)
        sliced = prune_record(
            "slicegpt", sparsity, tmp_path / f"sliced-{sparsity}", pattern=None, pruning_ratio=sparsity + 0.002
        )
        records += [sliced, eval_record(ppl + 5, tmp_path / f"sliced-{sparsity}", sliced, tasks=cloze(0.3))]
    records += run(tmp_path, 0.5, 31.0, strength=1.0, budget=0.2) + run(tmp_path, 0.5, 19.5, strength=8.0)
    draw = torch.Generator().manual_seed(0)
    blocks = []
    for index in range(3):
        keep = {
            space: torch.randperm(width, generator=draw)[: width // 2 + index].sort().values.int()
            for space, width in SPACES.items()
        }
        blocks.append(BlockPlan(index, keep=keep, of=SPACES, select="norm, select"))
    (tmp_path / "0.5-0").mkdir()
    Plan({"method": "disp_llm", "sparsity_measured": 0.5}, tuple(blocks)).save(tmp_path / "0.5-0")
    return records


def test_variants_seeds_and_lambda_are_told_apart(study: list[Record]) -> None:
    runs = learned.learned(collect(study))
    values = learned.perplexities(runs)
    assert values == {
        learned.FULL: {0.3: [12.0, 13.0], 0.5: [20.0, 21.0]},
        "without hypernetwork": {0.3: [16.0], 0.5: [24.0]},
        "constrained": {0.3: [21.0], 0.5: [29.0]},
    }
    found = learned.by_strength(runs)
    assert found is not None
    assert found[0] == 0.5
    assert [(r.strength, r.row.ppl, r.missed) for r in found[1]] == [
        (1.0, 31.0, True),
        (DEFAULTS["strength"], 20.0, False),
        (8.0, 19.5, False),
    ]


def test_the_page_has_every_figure_and_the_papers_tables(study: list[Record], tmp_path: Path) -> None:
    page, *plots = write_report(study, tmp_path / "site" / "report.html")
    drawn = {path.stem for path in plots}
    assert drawn >= {
        "ratios",
        "learning-ratios",
        "learning-variants",
        "learning-perplexity",
        "learning-lambda",
        "selections",
        "repetition",
        "blocks",
    }
    seen = text_of(page)
    for words in (
        f"20.50 ± {math.sqrt(0.5):.2f} (2)",
        "31.00 (NC)",
        "0.2000",
        "1 min 11 s",
        "without hypernetwork",
        "32.89",
        "NVIDIA A100",
        "arXiv:2410.11988, table 12",
        "the SliceGPT rows are its paper's, at 2048 tokens",
    ):
        assert words in seen, words


def test_throughput_is_drawn_from_bench_records(study: list[Record], tmp_path: Path) -> None:
    speedup = [{"batch": 1, "prefill": 1.4, "decode": 1.8}, {"batch": 16, "prefill": 1.5, "decode": 1.6}]
    bench = {"command": "bench", "method": "disp_llm", "pruning_ratio": 0.5, "speedup": speedup}
    page, *plots = write_report([*study, bench, {**bench, "speedup": None}], tmp_path / "report.html")
    assert "throughput" in {path.stem for path in plots}
    assert "disp_llm, decode, batch 1: 1.80 at 50%" in page.read_text("utf-8")


def test_records_without_learning_have_no_such_section(tmp_path: Path) -> None:
    pruned = prune_record("wanda", 0.5, tmp_path / "w")
    page, *plots = write_report([pruned, eval_record(12.0, tmp_path / "w", pruned)], tmp_path / "report.html")
    assert "What was learned" not in text_of(page)
    assert not [path for path in plots if path.stem.startswith("learning")]


def test_the_papers_tables_agree_with_themselves() -> None:
    tables = published("disp_llm")
    assert set(tables) == {"1", "2", "3", "4", *(str(n) for n in range(6, 16))}
    wrong = []  # the paper's own slips: means that are not of the numbers beside them
    for number, table in tables.items():
        assert all(len(row) == len(table.columns) for row in table.rows), number
        if table.columns[-1] == "mean":
            wrong += [(number, *row[:3]) for row in table.rows if abs(fmean(row[-6:-1]) - row[-1]) > 0.025]
    assert wrong == [("3", "Phi-1.5", 0.3, "SliceGPT"), ("7", "LLaMA-2 13B", 0.3, "SliceGPT")]
    assert tables["12"].rows[0] == (1, None)
