"""Perplexity, the cloze task and the shift, against direct computation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from secateur import api
from secateur.core.errors import SecateurError
from secateur.evaluate import continuations
from secateur.evaluate import perplexity as module
from secateur.evaluate.answers import Answers
from secateur.evaluate.cloze import CHANCE, cloze_items, evaluate_cloze, items_hash
from secateur.evaluate.perplexity import perplexity
from secateur.evaluate.shift import functionality_shift, repetition_rate
from secateur.models import loss
from tests.text.letters import Letters
from tests.tiny import MODEL_TYPES, some_ids, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_the_mean_loss_of_whole_logits(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_LOGITS_BYTES", 4 * 64 * 7)  # seven positions at a time
    monkeypatch.setattr(module, "_TOKENS_A_BATCH", 48)
    model = tiny_model(model_type, dtype=dtype)
    windows = [*some_ids(7, 16), some_ids(1, 5)[0]]
    losses = [cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:], reduction="sum").item() for w in windows]
    tokens = 7 * 15 + 4
    measured = perplexity(model, windows)
    assert measured.ppl == pytest.approx(math.exp(sum(losses) / tokens), rel=1e-5 if dtype == torch.float32 else 3e-2)
    assert (measured.windows, measured.tokens) == (8, tokens)


def test_a_loss_that_is_not_finite_names_the_window() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = torch.nan
    windows = [torch.full((8,), 5), torch.full((8,), 5), torch.full((8,), 60)]
    with pytest.raises(SecateurError, match="loss of window 2 is not finite"):
        perplexity(model, windows)


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOKENS_A_BATCH", 16)
    model, windows, file = tiny_model("llama"), list(some_ids(6, 16)), tmp_path / "progress.json"
    whole = perplexity(model, windows)
    real, calls = module.window_losses, []

    def stop(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "window_losses", stop)
        with pytest.raises(KeyboardInterrupt):
            perplexity(model, windows, progress=file)
    assert len(json.loads(file.read_text())) == 3
    calls.clear()
    monkeypatch.setattr(module, "window_losses", lambda *args: (calls.append(1), real(*args))[1])
    assert perplexity(model, windows, progress=file) == whole
    assert len(calls) == 3
    assert perplexity(model, windows, progress=file) == whole
    assert len(calls) == 3, "what is finished is not measured again until the caller has its record"


def test_the_shift_against_direct_computation() -> None:
    dense, pruned = tiny_model("llama"), tiny_model("llama", seed=4)
    windows = list(some_ids(5, 40))
    shift = functionality_shift(dense, pruned, windows, None)
    p, q = (log_softmax(torch.cat([m(w[None]).logits[0, :-1] for w in windows]), -1) for m in (dense, pruned))
    assert shift["kl"] == pytest.approx(kl_div(q, p, log_target=True, reduction="sum").item() / len(p), rel=1e-4)
    assert shift["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    same = functionality_shift(dense, dense, windows, None)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert (same["top1_agreement"], same["repetition"]) == (1.0, same["repetition_dense"])
    with pytest.raises(SecateurError, match="vocabulary of 64 tokens, this model one of 32"):
        functionality_shift(dense, tiny_model("llama", vocab_size=32), windows, None)


def test_repetition_counts_four_grams_seen_before() -> None:
    assert repetition_rate(torch.arange(20)[None]) == 0
    assert repetition_rate(torch.zeros(1, 20)) == pytest.approx(16 / 17)
    assert repetition_rate(torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]])) == pytest.approx(1 / 5)


def test_cloze_items_are_fair_and_fixed() -> None:
    items = cloze_items(200)
    assert items == cloze_items(200)
    assert items_hash(items) != items_hash(cloze_items(200, seed=1))
    for item in items:
        assert len(set(item.choices)) == 4
        assert item.context.endswith("\n")
    positions = [item.answer for item in items]
    assert all(30 <= positions.count(i) <= 75 for i in range(4)), "the right answer is anywhere"


def test_a_random_model_is_at_chance_on_the_cloze_task_and_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", vocab_size=128)

    class Ascii(Letters):
        def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [b % 128 for b in super().__call__(text, verbose, add_special_tokens)["input_ids"]]}

    real, batches, items = continuations._scores, [], cloze_items(100)

    def stop(*args: Any) -> Any:
        batches.append(1)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(continuations, "_scores", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate_cloze(model, Ascii(), items, Answers(tmp_path / "answers"))  # type: ignore[arg-type]
        interrupted = len(batches)
        resumed = evaluate_cloze(model, Ascii(), items, Answers(tmp_path / "answers"))  # type: ignore[arg-type]
        asked = len(batches) - interrupted
        assert evaluate_cloze(model, Ascii(), items, Answers(tmp_path / "answers")) == resumed  # type: ignore[arg-type]
        assert len(batches) == interrupted + asked, "all was known"
        batches.append(1)
        result, answers = evaluate_cloze(model, Ascii(), items)  # type: ignore[arg-type]
        assert len(batches) == interrupted + asked + 1 + asked + 2
    assert (result, answers) == resumed
    assert abs(result["acc"] - CHANCE) < 4 * result["stderr"]
    assert (result["n"], len(answers)) == (100, 100)


def test_evaluating_on_the_calibration_file_warns(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.prune(api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file), tmp_path / "out")
    record = api.evaluate(api.EvalRequest(str(tmp_path / "out"), text=ids_file))
    assert "warning: the model was calibrated on" in capsys.readouterr().err
    assert (record["method"], record["sparsity"]) == ("wanda", 0.5)
    assert record["ppl_protocol"]["tokens"] == 6 * 19
    assert "perplexity" in (tmp_path / "out" / "README.md").read_text()
