"""Healing: merged weights, zeros that stay zero, resumed runs, and refusals."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur import api
from secateur.cli.answer import answer
from secateur.evaluate.perplexity import perplexity
from secateur.heal import heal as heal_module
from secateur.heal import lora
from secateur.heal import tune as tuning
from secateur.heal.data import answers_alone, shown_row
from secateur.heal.lora import add_adapters
from secateur.report.rows import collect
from secateur.report.tables import settings
from secateur.text.instructions import alpaca_prompt
from secateur.text.windows import IGNORE
from tests.folders import contents
from tests.tiny import FAMILY_TYPES, able, some_ids, tiny_model

ASKED: dict[str, dict[str, Any]] = {
    "wanda": {"sparsity": 0.5},
    "slicegpt": {"sparsity": 0.25},
    "disp_llm": {"sparsity": 0.2, "options": {"unmet": "cut", "steps": 2, "separate": True}},
}
ABLE = [(m, f) for i, f in enumerate(FAMILY_TYPES) for j, m in enumerate(ASKED) if (i + j) % 2 == 0]
CASES = [(m, f) for m, f in ABLE if f in able(m)]  # each family with a runtime model if it has one, each method twice
ASKED |= {"llm_pruner": {"sparsity": 0.25}, "shortgpt": {"sparsity": 0.5}, "sparsegpt": {"sparsity": 0.5}}
CASES += [("llm_pruner", "llama"), ("shortgpt", "llama"), ("sparsegpt", "opt")]


@pytest.fixture
def pruned(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> Callable[..., Path]:
    """Prune a tiny model: `pruned("opt", "wanda")`."""

    def prune(model_type: str, method: str, **how: Any) -> Path:
        out = tmp_path / f"{method}-{model_type}"
        asked = how or ASKED[method]
        api.prune(api.Request(str(saved(model_type, dtype=torch.bfloat16)), method, calibration=ids_file, **asked), out)
        return out

    return prune


@pytest.fixture
def quick(ids_file: str) -> api.HealRequest:
    return api.HealRequest("", ids_file, steps=4, batch=2, lr=1e-2, rank=4, seqlen=20, save_every=2, text=ids_file)


@pytest.mark.parametrize(("method", "model_type"), CASES)
def test_healing_trains_what_it_writes(
    method: str, model_type: str, pruned: Callable[..., Path], quick: api.HealRequest, windows: Any, tmp_path: Path
) -> None:
    """Perplexity falls (the tiny model is healed on what it is measured on), and the record, the plan and the files
    agree; zeros are the same bits.
    """
    folder = pruned(model_type, method)
    record = api.heal(replace(quick, model=str(folder)), tmp_path / "healed")
    assert record["ppl"] < record["ppl_before"]
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (folder, tmp_path / "healed"))
    assert type(before) is type(after)
    assert after.dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "healed", dtype=torch.float32)
    assert perplexity(wide, list(windows)).ppl == pytest.approx(record["ppl"], rel=1e-6)
    changed = 0
    for name, tensor in after.state_dict().items():
        old = before.state_dict()[name]
        assert tensor.shape == old.shape
        zeros = old == 0
        assert torch.equal(tensor[zeros].to(old.dtype).view(torch.int16), old[zeros].view(torch.int16)), (
            f"{name}: zeros are no longer the same bits"
        )
        changed += not torch.equal(tensor.to(old.dtype), old)
    view = api.view_model(before)
    assert changed == view.blocks * len(set(view.family.matrices.values()))
    plan, pruning = (
        json.loads((path / "secateur" / "plan.json").read_text()) for path in (tmp_path / "healed", folder)
    )
    assert (plan["method"], plan["blocks"], plan["heal"]["rank"]) == (method, pruning["blocks"], 4)
    assert api.read_plan(tmp_path / "healed").blocks == api.read_plan(folder).blocks
    assert record["nonzero_after"] == plan["nonzero_after"] == sum(int(p.count_nonzero()) for p in after.parameters())
    measured = api.evaluate(api.EvalRequest(str(tmp_path / "healed"), text=quick.text))
    assert measured["heal"] == plan["heal"]
    assert [row.get("method") for row in collect([measured])] == [f"{method} + LoRA"]
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "| healed | LoRA of rank 4" in card
    made_up = "changed, to make up for those that went, and then by healing"
    assert f"| weights that stay | {made_up if plan['updated'] else 'changed by healing'} |" in card
    gained = record["heal"]["training_loss"]
    assert gained[0] == record["heal"]["losses"][0] > gained[1]
    table = settings(collect([measured]))
    place = [head for head, *_ in table.heads].index("Weights updated")
    assert [row[place].text for row in table.rows] == ["yes"]


def test_n_of_m_stays(pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path) -> None:
    folder = pruned("phi3", "wanda", pattern="2:4")
    api.heal(replace(quick, model=str(folder)), tmp_path / "healed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    for path in ("self_attn.qkv_proj", "mlp.down_proj"):
        weight = model.get_submodule(f"model.layers.1.{path}").weight
        assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2


def test_the_masked_forward_is_that_of_the_merged_weights() -> None:
    model, other = (tiny_model("llama", dtype=torch.float64) for _ in range(2))
    path = "model.layers.1.mlp.up_proj"
    for each in (model, other):
        each.get_submodule(path).weight.data[:, ::2] = 0
    adapters = add_adapters(model, [path], rank=3, alpha=6, seed=0, masked=True)
    torch.testing.assert_close(model(some_ids()).logits, other(some_ids()).logits)
    for parameter in adapters.trainable:
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    weight = other.get_submodule(path).weight
    left, right = (adapters.layers[path].lora_B["default"].weight, adapters.layers[path].lora_A["default"].weight)
    expected = weight + (weight != 0) * (left @ right * 2.0)
    weight.data = adapters.merged(path, weight.data)
    torch.testing.assert_close(weight.data, expected.data)
    torch.testing.assert_close(model(some_ids()).logits, other(some_ids()).logits)


def test_a_resumed_run_has_the_same_bytes(
    pruned: Callable[..., Path],
    quick: api.HealRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = replace(quick, model=str(pruned("llama", "slicegpt")))
    whole = api.heal(request, tmp_path / "whole")
    count, real = [0], tuning.next_token_loss

    def interrupted(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 4 + 4:  # the loss before any step is of four batches
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "next_token_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.heal(request, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    resumed = api.heal(request, tmp_path / "resumed", resume=True)
    assert resumed["ppl"] == whole["ppl"]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert api.heal(request, tmp_path / "resumed", resume=True) == resumed | {"seconds": resumed["seconds"]}
    with pytest.raises(api.UsageError, match=r"had lr = 0\.01"):
        api.heal(replace(request, lr=0.02), tmp_path / "resumed", resume=True)
    assert api.heal(replace(request, limit=1), tmp_path / "resumed", resume=True) == resumed
    assert "the perplexity in its record had windows = " in capsys.readouterr().err
    with pytest.raises(api.UsageError, match=r'had method = "slicegpt", this one has "wanda"'):
        api.heal(replace(request, model=str(pruned("llama", "wanda"))), tmp_path / "resumed", resume=True)


def test_divergence_keeps_the_last_good_state(
    pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(quick, model=str(pruned("llama", "wanda")))
    count, real = [0], tuning.next_token_loss

    def broken(*args: Any) -> Any:
        count[0] += 1
        return real(*args) * (float("nan") if count[0] == 4 + 3 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "next_token_loss", broken)
        with pytest.raises(
            api.SecateurError,
            match=r"not finite .* by step 4; the state of step 2 is kept: .* --resume and a smaller --lr",
        ):
            api.heal(request, tmp_path / "healed")
    assert not (tmp_path / "healed").exists()
    record = api.heal(replace(request, lr=5e-3), tmp_path / "healed", resume=True)
    assert record["heal"]["lrs"] == [1e-2, 5e-3]
    assert record["ppl"] < record["ppl_before"]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "next_token_loss", lambda *given: real(*given) + next(rises))
        rises = iter([0.0] * 4 + [0.0, 0.0, 5.0, 5.0])
        with pytest.raises(api.SecateurError, match=r"rose to .* from .* by step 4; the state of step 2 is kept"):
            api.heal(request, tmp_path / "risen")
        rises = iter([0.0] * 4 + [5.0, 5.0])
        with pytest.raises(api.SecateurError, match=r"rose to .* from .* by step 2; use a smaller --lr"):
            api.heal(request, tmp_path / "hopeless")
        patch.setattr(tuning, "next_token_loss", lambda *given: real(*given) * float("inf"))
        with pytest.raises(api.SecateurError, match=r"not finite .* by step 0; use a smaller --lr"):
            api.heal(request, tmp_path / "hopeless")
    assert not list(tmp_path.glob("hopeless*"))


def test_rows_that_differ_are_no_divergence(
    pruned: Callable[..., Path],
    quick: api.HealRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With batch 1 each step reads another row, and some rows are harder by nats."""
    request = replace(quick, model=str(pruned("llama", "wanda")), batch=1, steps=12, save_every=1)
    real = tuning.next_token_loss
    monkeypatch.setattr(tuning, "next_token_loss", lambda *given: real(*given) + 4.0 * (int(given[1].sum()) % 3 == 0))
    assert api.heal(request, tmp_path / "healed")["ppl"] > 0


def test_a_diverged_run_goes_on_with_a_smaller_lr(
    pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the state that is kept is a bad one already: it is not stopped again for what was there before."""
    asked = replace(quick, model=str(pruned("llama", "wanda")), batch=1, steps=20, save_every=2, schedule="constant")
    real = tuning.next_token_loss

    def worse_with_large_adapters(model: Any, *args: Any) -> Any:
        largest = max(float(p.detach().abs().max()) for name, p in model.named_parameters() if "lora_B" in name)
        return real(model, *args) + 5.0 * (largest > 0.5)

    monkeypatch.setattr(tuning, "next_token_loss", worse_with_large_adapters)
    with pytest.raises(api.SecateurError, match=r"rose to .* by step \d+; the state .* --resume and a smaller --lr"):
        api.heal(replace(asked, lr=0.2), tmp_path / "healed")
    record = api.heal(replace(asked, lr=1e-4), tmp_path / "healed", resume=True)
    assert record["heal"]["lrs"] == [0.2, 1e-4]


def test_a_worse_result_is_said_to_be_worse(
    pruned: Callable[..., Path],
    quick: api.HealRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = tuning.next_token_loss
    monkeypatch.setattr(tuning, "next_token_loss", lambda *given: -real(*given))  # it learns to be wrong
    record = api.heal(replace(quick, model=str(pruned("llama", "wanda")), lr=0.1), tmp_path / "healed")
    assert record["ppl"] > record["ppl_before"]
    assert (
        f"warning: healing made it worse: perplexity {record['ppl']:.2f}, before {record['ppl_before']:.2f}"
        in capsys.readouterr().err
    )


def test_only_a_matrix_that_pruning_zeroed_has_the_masked_forward() -> None:
    """A few zeros are there by chance, unless it is known that pruning made them; many are never by chance."""
    paths = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")]
    both = [tiny_model("llama", dtype=torch.float64) for _ in range(2)]
    for model in both:
        for path in paths[:2]:
            model.get_submodule(path).weight.data[0, 0] = 0
        model.get_submodule(paths[2]).weight.data[0] = 0
    adapters = add_adapters(both[0], paths, rank=3, alpha=6, seed=0, masked=True, zeroed={paths[0]})
    assert ["forward" in vars(adapters.layers[path]) for path in paths] == [True, False, True]
    for parameter in adapters.trainable:
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    for path in paths:
        weight = both[1].get_submodule(path).weight
        weight.data = adapters.merged(path, weight.data)
    assert [bool(both[1].get_submodule(path).weight[0, 0] == 0) for path in paths] == [True, False, True]
    torch.testing.assert_close(both[0](some_ids()).logits, both[1](some_ids()).logits)
    none = add_adapters(tiny_model("llama"), paths, rank=3, alpha=6, seed=0, masked=False, zeroed=paths)
    assert not none.masked


@pytest.mark.parametrize("twice", [False, True])
def test_few_zeros_that_pruning_made_stay(
    twice: bool, pruned: Callable[..., Path], quick: api.HealRequest, ids_file: str, tmp_path: Path
) -> None:
    """Fewer than 1% of a matrix, also where another pruning followed that zeroes nothing."""
    folder = pruned("llama", "magnitude", sparsity=0.005)
    if twice:
        again = api.Request(str(folder), "magnitude", sparsity=0.25, options={"pattern": "rows"}, modules="mlp=0.25")
        api.prune(again, folder := tmp_path / "twice")
    api.heal(replace(quick, model=str(folder)), tmp_path / "healed")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "healed"))
    shares = []
    for name, old in before.state_dict().items():
        assert bool((after.state_dict()[name][old == 0] == 0).all()), name
        if name.endswith("_proj.weight"):
            shares.append(float((old == 0).float().mean()))
    assert 0 < max(shares) < 0.01


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers for a property by its old name
def test_an_adapter_kept_apart_loads_with_peft(
    pruned: Callable[..., Path], quick: api.HealRequest, windows: torch.Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = pruned("opt", "disp_llm")
    record = api.heal(replace(quick, model=str(folder), keep_adapter=True, targets=("q", "mlp")), tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    healed = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    assert perplexity(healed, list(windows)).ppl == pytest.approx(record["ppl"], rel=1e-5)
    assert record["ppl"] < record["ppl_before"]
    with pytest.raises(api.SecateurError, match="holds a LoRA adapter, not a model"):
        api.evaluate(api.EvalRequest(str(tmp_path / "adapter")))


def test_answers_alone_count(tmp_path: Path) -> None:
    class Letters:
        eos_token_id, is_fast = 0, False

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    rows = [{"instruction": "add", "input": "1 1", "output": "two"}, {"instruction": "say", "output": "hello"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = answers_alone(str(tmp_path / "rows.json"), Letters(), samples=2, seqlen=200, seed=0)  # type: ignore[arg-type]
    said = sorted("".join(chr(i) for i in label[label != IGNORE].tolist()) for label in found.label_ST)
    assert said == ["hello\0", "two\0"]
    assert found.tokens == len("hello\0two\0")
    text = "".join(chr(i) for i in found.ids_ST[0].tolist()[1:]).rstrip("\0")
    assert text.startswith("### Instruction:\n")
    with pytest.raises(api.SecateurError, match="0 instructions whose answers begin within 5 tokens, but 2"):
        answers_alone(str(tmp_path / "rows.json"), Letters(), samples=2, seqlen=5, seed=0)  # type: ignore[arg-type]
    (tmp_path / "rows.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(
        api.SecateurError, match=r"rows.jsonl, line 1: a row of instructions needs .*'output' .*has question, answer"
    ):
        answers_alone(str(tmp_path / "rows.jsonl"), Letters(), samples=1, seqlen=5, seed=0)  # type: ignore[arg-type]


def test_memory_goes_back_between_blocks_and_before_the_result_is_read(
    pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained weights are gone when the result is loaded, and each forward of a block begins with a small heap."""
    given, seen = [0], list[Any]()
    load = heal_module.load_model

    def counted() -> None:
        given[0] += 1

    def loaded(*args: Any, **how: Any) -> Any:
        assert [alive for alive in seen if alive() is not None] == []
        model = load(*args, **how)
        seen.append(weakref.ref(model.get_submodule("model.layers.0.mlp.up_proj").weight))
        return model

    monkeypatch.setattr(lora, "give_back", counted)
    monkeypatch.setattr(heal_module, "load_model", loaded)
    steps = 3
    asked = replace(quick, model=str(pruned("llama", "wanda")), steps=steps, save_every=steps)
    gc.disable()
    try:
        api.heal(asked, tmp_path / "healed")
    finally:
        gc.enable()
    assert len(seen) == 2
    assert given[0] == 3 * (4 * steps)  # in each of three blocks: loss before, forward, recomputed, loss after
    api.heal(replace(asked, checkpointing=False), tmp_path / "again")
    assert given[0] == 3 * (4 * steps)


class _Slow:
    """A tokenizer that knows no offsets."""

    eos_token_id, is_fast = 1, False

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, text: str, verbose: bool) -> Any:
        return self.inner(text, verbose=verbose)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_answers_are_tokenised_with_what_is_before_them(ends: bool, fast: bool, tmp_path: Path) -> None:
    """As of LLaMA: words begin with a mark, a text begins with one, and the tokenizer may end it."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁": 3} | {
        letter: 4 + i for i, letter in enumerate(ascii_letters + "#:\n")
    }
    found = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    found.post_processor = processors.TemplateProcessing(
        "<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    rows = [{"instruction": "say", "output": "hello you"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    if not fast:
        tokenizer = _Slow(tokenizer)
    (ids,), (label,) = (
        t.tolist()
        for t in vars(answers_alone(str(tmp_path / "rows.json"), tokenizer, samples=1, seqlen=99, seed=0)).values()
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=found)(alpaca_prompt(rows[0]))["input_ids"]
    assert ids == (whole if ends else [*whole, 1])
    assert (
        found.decode([i for i in label if i != IGNORE], skip_special_tokens=False).replace(" ", "") == "hello▁you</s>"
    )
    assert label.index(found.token_to_id("h")) == len(ids) - len("hello you") - 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"targets": ("q", "experts")},
            r"--targets: 'experts' matches no linear module of family llama \(known: q, k, v, o, gate",
        ),
        ({"rank": 0}, "--rank 0: a count of at least 1"),
        ({"schedule": "linear"}, r"unknown --schedule 'linear' \(allowed: cosine, constant\)"),
        ({"calibration": "builtin", "completion_only": True}, "no tokenizer|holds no instructions"),
        ({"rank": 9999}, r"--rank 9999: .* give at most 32"),
        ({"seqlen": 9999}, r"--seqlen 9999 is outside \[2, 64\]"),
        ({"evaluate": False}, r"--text .*ids.npy says what to measure, and --no-eval measures nothing: drop one"),
    ],
)
def test_wrong_requests_are_refused_before_the_work(
    wrong: dict[str, Any], words: str, pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path
) -> None:
    with pytest.raises(api.SecateurError, match=words):
        api.heal(replace(quick, model=str(pruned("llama", "wanda")), **wrong), tmp_path / "healed")
    assert not list(tmp_path.glob("healed*"))


@pytest.mark.parametrize(
    ("where", "words"),
    [("wanda-llama/healed", "lies inside the model"), (".", "holds the model"), ("text", "holds the calibration text")],
)
def test_an_output_around_what_is_needed_is_refused(
    where: str, words: str, pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path
) -> None:
    folder = pruned("llama", "wanda")
    text = tmp_path / "text" / "ids.npy"
    text.parent.mkdir()
    text.write_bytes(Path(str(quick.calibration)).read_bytes())
    with pytest.raises(api.UsageError, match=words):
        api.heal(replace(quick, model=str(folder), calibration=str(text)), tmp_path / where, overwrite=True)
    assert text.is_file()
    assert (folder / "model.safetensors").is_file()


def test_a_model_of_others_is_refused(saved: Callable[..., Path], quick: api.HealRequest, tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match=r"has no plan of secateur"):
        api.heal(replace(quick, model=str(saved("llama"))), tmp_path / "healed")


TEXT = "The dog barks at the moon, and the moon says nothing. " * 40


@pytest.fixture
def letters(pruned: Callable[..., Path]) -> Path:
    """A pruned tiny model with a tokenizer of letters."""
    folder = pruned("llama", "magnitude", sparsity=0.3)
    found = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(ascii_letters + " .,")}, unk_token="."))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=found, unk_token=".").save_pretrained(folder)
    return folder


def test_the_window_of_the_evaluation_is_not_that_of_the_training(
    letters: Path, quick: api.HealRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    asked = replace(quick, model=str(letters), text=str(text), seqlen=20, eval_seqlen=8, limit=3)
    record = api.heal(asked, tmp_path / "healed")
    assert record["ppl_protocol"]["seqlen"] == 8
    assert record["heal"]["calibration"]["seqlen"] == 20
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("measuring perplexity on")]
    assert said.startswith("measuring perplexity on text.txt (protocol text, 3 windows of 8 tokens); --text, --proto")
    assert said.endswith("; --no-eval skips it")
    with pytest.raises(api.UsageError, match=r"windows of 999 tokens .* give --eval-seqlen"):
        api.heal(replace(asked, eval_seqlen=999), tmp_path / "other")


def test_without_an_evaluation_nothing_is_measured_and_nothing_claims_it(
    pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, file = pruned("llama", "wanda"), tmp_path / "healed", tmp_path / "records.jsonl"
    api.evaluate(api.EvalRequest(str(folder), text=quick.text))
    asked = replace(quick, model=str(folder), text=None, evaluate=False)
    with monkeypatch.context() as patch:
        patch.setattr("secateur.heal.heal.perplexity", None)
        record = api.heal(asked, out)
    assert not {"ppl", "ppl_before", "loss", "loss_before", "ppl_protocol"} & record.keys()
    assert answer(record)[0].startswith("healed, perplexity not measured, ")
    assert answer(record)[-2:] == [
        f"Next: secateur eval {out} --text TEXT_FILE --no-shift --against {record['model']}",
        "      TEXT_FILE: text that was not used for calibration or healing.",
    ]
    assert "- perplexity, " not in (out / "README.md").read_text()
    rows = {Path(str(row.get("out"))).name: row for row in collect(api.find_records([file]))}
    assert rows["wanda-llama"].ppl is not None
    assert (rows["healed"].protocol, rows["healed"].cost) == (None, None)
    page = api.write_report(api.find_records([file]), tmp_path / "r.html")[0].read_text()
    assert "1 checkpoint without a perplexity (healed): run &#39;secateur eval DIR&#39;" in page
    assert api.heal(asked, out, resume=True) == record, "a finished run is as it is"
    said: list[str] = []
    with api.progress_to(said.append):
        api.heal(replace(asked, evaluate=True, text=quick.text), out, resume=True)
    assert said[-1] == f"warning: its record has no perplexity; 'secateur eval {out}' measures it"
    again = api.heal(replace(asked, evaluate=True, text=quick.text), tmp_path / "measured")
    weights = [(path / "model.safetensors").read_bytes() for path in (out, tmp_path / "measured")]
    assert weights[0] == weights[1], "measuring changes nothing"
    measured = api.evaluate(api.EvalRequest(str(out), text=quick.text))
    assert measured["ppl"] == again["ppl"]
    rows = {Path(str(row.get("out"))).name: row for row in collect(api.find_records([file]))}
    assert rows["healed"].ppl == measured["ppl"]


ROWS = [{"instruction": "Add.", "input": "It", "output": "Two.\nOk."}] * 4


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("form", ["chat", "plain"])
def test_a_row_is_shown_as_text_before_the_training(
    form: str,
    alone: bool,
    letters: Path,
    quick: api.HealRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(letters)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}. {{ m.content }}. {% endfor %}"
    tokenizer.save_pretrained(letters)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    asked = replace(
        quick, model=str(letters), calibration=str(rows), samples=2, prompt_form=form, completion_only=alone
    )
    api.heal(replace(asked, seqlen=60 if alone else 20), tmp_path / "healed")
    said = capsys.readouterr().err.splitlines()
    answer_of_it = r"Two.\nOk."
    whole = {
        "chat": r'in the chat template: "user. Add.\n\nIt. assistant. ' + answer_of_it + '. "',
        "plain": r'in the plain form: "### Instruction:\nAdd.\n\n### Input:\nIt\n\n### Response:\n'
        + answer_of_it
        + '"',
    }
    assert said.count(f"rows.json, row 1 {whole[form]}") == 1
    learned = [line for line in said if line.startswith("learned of it (--completion-only): ")]
    end = "." if form == "chat" else ""  # "." is the special token that ends the turn
    assert learned == [f'learned of it (--completion-only): "{answer_of_it}{end}"'] * alone


def test_a_long_row_is_cut(tmp_path: Path) -> None:
    class Plain:
        eos_token = "</s>"

    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "x" * 500, "output": "y\x1b" * 300}]))
    first, second = shown_row(str(tmp_path / "rows.json"), Plain(), "plain", answers=True)  # type: ignore[arg-type]
    assert len(first) < 280
    assert r"### Instruction:\nxxx" in first
    assert r"xxx\n\n### Response:\ny" in first
    assert first.count(" ... ") == 2
    assert "\x1b" not in second
    assert second.endswith('" and </s>')


def test_an_interrupted_run_is_said_before_the_work(
    pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "healed.partial"
    partial.mkdir()
    (partial / "journal.json").write_text("{}")
    request = replace(quick, model=str(pruned("llama", "wanda")))
    monkeypatch.setattr("secateur.heal.heal.open_checkpoint", None)
    with pytest.raises(api.UsageError, match=r"an interrupted run lies in .*healed.partial'"):
        api.heal(request, tmp_path / "healed")


def test_the_original_is_named_by_its_path(pruned: Callable[..., Path], quick: api.HealRequest, tmp_path: Path) -> None:
    """A plan has its name alone. The advice must work as it is, after healing what was healed too."""
    folder, runs = pruned("llama", "wanda"), tmp_path / "elsewhere"
    dense = api.find_records([tmp_path / "records.jsonl"])[0]["model"]
    assert Path(dense).is_absolute()
    first = api.heal(replace(quick, model=str(folder)), runs / "first")
    second = api.heal(replace(quick, model=str(runs / "first")), tmp_path / "second" / "again")
    measured = api.evaluate(api.EvalRequest(str(runs / "first"), text=quick.text))
    assert {first["model"], second["model"], measured["model"]} == {dense}
    again = f"Next: secateur eval {tmp_path / 'second' / 'again'} --text {quick.text}"
    assert answer(second)[-1] == f"{again} --no-shift --against {dense}"
    plan = json.loads((runs / "first" / "secateur" / "plan.json").read_text())
    assert plan["model"] == Path(dense).name, "plans and cards hold no folders"
    for file in (tmp_path, runs, tmp_path / "second"):
        (file / "records.jsonl").write_text("{ broken\n")
    alone = api.evaluate(api.EvalRequest(str(folder), text=quick.text), records_file=tmp_path / "new.jsonl")
    assert alone["model"] == Path(dense).name
    (*_, last) = answer({**first, "model": Path(dense).name})
    assert last == f"Next: secateur eval {runs / 'first'} --text {quick.text}"
