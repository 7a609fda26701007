"""The time of a dry run: the extrapolation on work that is counted, not timed, and what a rehearsal leaves behind."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur import api
from secateur.calibrate import stream
from secateur.cli.answer import answer
from secateur.core.errors import SecateurError
from secateur.core.progress import observed, track
from secateur.core.timing import Phases
from secateur.methods import find_method, method_names
from secateur.methods.disp_llm.masked import MaskedModel
from secateur.prune import estimate as estimates
from secateur.prune import rehearse
from secateur.prune.rehearse import Short, extrapolated
from tests.tiny import FAMILY_TYPES, able


class Ticks:
    """A clock that work advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


def _run(blocks: int, windows: int, steps: int, *, deep: bool) -> tuple[Phases, float]:
    """Work whose seconds are known: outside of tracks, blocks, and steps that hold blocks or run all of them at once."""
    clock = Ticks()
    phases = Phases(clock)
    with observed(phases), phases.whole():
        clock.take(5 + 2 * windows)
        for index in track(range(blocks), "work: blocks", blocks):
            clock.take(3 if index == blocks - 1 else 3 + 7 * windows)
        for _ in track(range(steps), "work: steps"):
            clock.take(1 + 4 * blocks if deep else 1)
            for _ in () if deep else track(range(blocks), "inner: blocks", blocks):
                clock.take(windows)
    return phases, clock.now


def test_blocks_and_windows_of_a_run_follow_from_two_short_ones() -> None:
    runs = [Short(2, windows, _run(2, windows, 1, deep=False)[0]) for windows in (1, 2)]
    expected = extrapolated(runs, blocks=9, windows=50, counts={"work: steps": 12})
    phases, seconds = _run(9, 50, 12, deep=False)
    assert expected.seconds == pytest.approx(seconds)
    assert expected.tracks["work: blocks"] == pytest.approx(sum(phases.phases["work: blocks"].runs[0]))
    assert expected.runs["inner: blocks"] == 12


def test_steps_of_the_whole_model_follow_from_two_depths() -> None:
    runs = [Short(blocks, 1, _run(blocks, 1, 2, deep=True)[0]) for blocks in (2, 6)]
    expected = extrapolated(runs, blocks=9, windows=1, counts={"work: steps": 100})
    assert expected.seconds == pytest.approx(_run(9, 1, 100, deep=True)[1])


def test_noise_gives_neither_negative_times_nor_more_than_in_proportion() -> None:
    quicker, slower = _run(2, 1, 1, deep=False)[0], _run(2, 2, 1, deep=False)[0]
    quicker.outside, slower.outside = 0.5, 4.0
    expected = extrapolated([Short(2, 1, quicker), Short(2, 2, slower)], blocks=9, windows=50, counts={})
    assert expected.outside == pytest.approx(4.0 * 50 / 2)
    quicker.outside, slower.outside = 4.0, 0.5
    expected = extrapolated([Short(2, 1, quicker), Short(2, 2, slower)], blocks=9, windows=50, counts={})
    assert expected.outside == 0.5


OPTIONS: dict[str, dict[str, Any]] = {
    "disp_llm": {"steps": 7, "batch": 2, "warm": 3, "unmet": "cut"},
    "llm_surgeon": {"shots": 3},
    "llm_pruner": {"keep_first": 0, "keep_last": 0},
    "search": {"uniform": True},  # every block loses something: one that keeps all needs no inputs of its matrices
}


def _default_pattern(method: str) -> dict[str, str]:
    options = find_method(method).options({})
    return {"pattern": options.pattern} if hasattr(options, "pattern") else {}


@pytest.mark.parametrize("modules", [None, "owl"])
@pytest.mark.parametrize("method", method_names())
def test_passes_over_the_tokens_are_those_of_the_run(
    method: str, modules: str | None, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the windows that pass through blocks advance the clock, so the estimate must be exact. Of `depth`, the text
    decides where the trials begin.
    """
    if find_method(method).says.CALIBRATION is None:
        pytest.skip("no tokens pass")
    if modules and (find_method(method).says.plan_block is None or method in ("magnitude", "heads")):
        pytest.skip("its matrices have no sparsity of their own")
    clock = Ticks()
    batches, loss = stream.Stream.batches, MaskedModel.loss

    def counted(self: stream.Stream, index: int) -> Any:
        for rows, arguments in batches(self, index):
            clock.take(rows.stop - rows.start)
            yield rows, arguments

    def counted_loss(self: MaskedModel, ids_BT: torch.Tensor, gate_N: torch.Tensor) -> torch.Tensor:
        clock.take(len(ids_BT) * (3 + self.model.config.num_hidden_layers))
        return loss(self, ids_BT, gate_N)

    monkeypatch.setattr(stream.Stream, "batches", counted)
    monkeypatch.setattr(MaskedModel, "loss", counted_loss)
    for module in (stream, rehearse):
        monkeypatch.setattr(module, "TOKENS_A_BATCH", 16)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 64, (9, 20)))
    folder = str(saved("llama", num_hidden_layers=9))
    request = api.Request(
        folder, method, sparsity=0.34, modules=modules, calibration=str(ids), options=OPTIONS.get(method, {})
    )
    said = api.estimate(api.prepare(request), clock)
    assert "seconds_unknown" not in said
    clock.now = 0.0
    api.prune(request, tmp_path / "out")
    assert clock.now > 0
    off = {"rel": 0.1} if method == "depth" else {"abs": 0.01}
    assert said["seconds_estimated"] == pytest.approx(clock.now, **off)


@pytest.mark.parametrize(
    ("method", "model_type"),
    [
        (method, model_type)
        for method in method_names()
        for model_type in able(method, FAMILY_TYPES, **_default_pattern(method))
    ],
)
def test_every_method_has_a_number_on_every_family(
    method: str, model_type: str, saved: Callable[..., Path], ids_file: str
) -> None:
    request = api.Request(str(saved(model_type)), method, sparsity=0.34, calibration=ids_file)
    if find_method(method).says.CALIBRATION is None:
        request = api.Request(request.model, method, sparsity=0.34)
    said = api.estimate(api.prepare(request))
    assert said["seconds_estimated"] is not None, said["seconds_unknown"]
    assert said["seconds_estimated"] >= 0


@pytest.mark.parametrize("settings", [{"modules": "auto"}, {"modules": "owl"}, {"pattern": "2:4", "sparsity": None}])
def test_so_have_the_ways_to_choose_a_sparsity(
    settings: dict[str, Any], saved: Callable[..., Path], ids_file: str
) -> None:
    request = api.Request(str(saved("llama")), "wanda", calibration=ids_file, **{"sparsity": 0.5, **settings})
    assert api.estimate(api.prepare(request))["seconds_estimated"] >= 0


@pytest.mark.parametrize(
    ("method", "options"),
    [("slicegpt", {}), ("disp_llm", {"steps": 2, "unmet": "cut"}), ("llm_pruner", {})],
)
def test_a_result_can_be_estimated_again(
    method: str, options: dict[str, Any], saved: Callable[..., Path], ids_file: str, tmp_path: Path
) -> None:
    request = api.Request(str(saved("llama")), method, sparsity=0.25, calibration=ids_file, options=options)
    api.prune(request, tmp_path / "out")
    again = api.Request(str(tmp_path / "out"), "wanda", sparsity=0.5, calibration=ids_file)
    assert api.estimate(api.prepare(again))["seconds_estimated"] >= 0


def test_nothing_is_left_behind(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch, work = saved("llama"), tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(work)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    lines: list[str] = []
    with api.progress_to(lines.append):
        for method in ("wanda", "slicegpt", "disp_llm"):
            api.estimate(api.prepare(api.Request(str(folder), method, sparsity=0.25, calibration=ids_file)))
    assert sorted(file.name for file in tmp_path.rglob("*")) == before
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert [line for line in lines if not line.startswith("warning")] == [
        "measuring 2 blocks of 3 to estimate the time"
    ] * 3


def test_where_a_rehearsal_fails_there_is_no_number_but_a_reason(
    saved: Callable[..., Path], ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise SecateurError("no room for more")

    monkeypatch.setattr(rehearse, "make_checkpoint", fail)
    said = api.estimate(api.prepare(api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file)))
    assert (said["seconds_estimated"], said["seconds_unknown"]) == (None, "no room for more")


def test_a_method_may_say_that_nothing_short_tells(saved: Callable[..., Path], ids_file: str, tmp_path: Path) -> None:
    request = api.Request(str(saved("llama")), "llm_surgeon", pattern="2:4", calibration=ids_file, options={"shots": 1})
    said = api.estimate(api.prepare(request))
    assert said["seconds_estimated"] is None
    assert "5 to 110 iterations" in said["seconds_unknown"]
    assert said["memory_unknown"] == said["seconds_unknown"]
    last = answer(said)[-1]
    assert "Nothing was written. The time and the memory are not known: with pattern 2:4 llm_surgeon adjusts" in last
    assert "memory unknown" not in last
    assert api.prune(request, tmp_path / "out")["sparsity_measured"] == pytest.approx(0.5)


def test_a_text_that_the_run_would_refuse_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(b"no array")
    request = api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=str(tmp_path / "ids.npy"))
    with pytest.raises(SecateurError, match=r"ids\.npy"):
        api.estimate(api.prepare(request))


@pytest.mark.parametrize(
    ("method", "blocks", "windows", "rough"),
    [
        ("wanda", 3, 6, True),
        ("slicegpt", 3, 6, True),
        ("llm_pruner", 3, 6, True),
        ("magnitude", 3, 6, True),
        ("wanda", 9, 9, False),
        ("magnitude", 16, 6, False),
    ],
)
def test_small_work_is_rehearsed_once_and_costs_less_than_the_run(
    method: str,
    blocks: int,
    windows: int,
    rough: bool,
    saved: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work is counted in blocks times windows, or in blocks where no text is read."""
    played: list[Short] = []
    play = rehearse._play

    def noted(*args: Any, **more: Any) -> Short:
        played.append(play(*args, **more))
        return played[-1]

    monkeypatch.setattr(rehearse, "_play", noted)
    monkeypatch.setattr(rehearse, "TOKENS_A_BATCH", 16)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, (windows, 20)))
    calibration = None if method == "magnitude" else str(tmp_path / "ids.npy")
    model = str(saved("llama", num_hidden_layers=blocks))
    said = api.estimate(api.prepare(api.Request(model, method, sparsity=0.25, calibration=calibration)))
    assert said.get("seconds_rough", False) is rough
    work = sum(short.blocks * max(1, short.windows) for short in played)
    assert work <= (blocks * windows if calibration else blocks) * (1 if rough else 0.5)
    assert (len(played) == 1) is rough
    last = answer(said)[-1]
    assert ("about: under " in last) is rough


def test_one_short_run_is_taken_to_grow_with_the_windows() -> None:
    phases = _run(2, 2, 1, deep=False)[0]
    expected = extrapolated([Short(2, 2, phases)], blocks=9, windows=6, counts={})
    assert expected.outside == pytest.approx(phases.outside * 3)
    assert expected.seconds >= _run(9, 6, 1, deep=False)[1]


@pytest.mark.parametrize(
    ("method", "options"), [("disp_llm", {"steps": 7, "batch": 2, "unmet": "cut"}), ("llm_surgeon", {"shots": 3})]
)
def test_memory_of_a_method_that_trains_is_measured_or_has_a_reason(
    method: str, options: dict[str, Any], saved: Callable[..., Path], ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {2: 1000, 6: 3000}
    blocks = 9
    request = api.Request(
        str(saved("llama", num_hidden_layers=blocks)), method, sparsity=0.25, calibration=ids_file, options=options
    )
    prepared = api.prepare(request)
    play = rehearse._play

    def with_peak(*args: Any, **more: Any) -> Short:
        short = play(*args, **more)
        assert short.memory is not None
        return replace(short, memory=peaks[short.blocks])

    monkeypatch.setattr(rehearse, "_play", with_peak)
    said = api.estimate(prepared)
    width = prepared.job.view.config.hidden_size * prepared.dtype.itemsize
    # the inputs of 10 places, for 6 windows; the short run kept those of 3
    expected = 4500 if method == "disp_llm" else 1000 + (10 - 3) * 6 * 20 * width
    assert said["memory_bytes"] == expected
    assert "memory_unknown" not in said
    monkeypatch.setattr(rehearse.PeakMemory, "peak", lambda _: None)
    monkeypatch.setattr(rehearse, "_play", play)
    said = api.estimate(prepared)
    assert said["memory_bytes"] is None
    assert "does not tell the peak" in answer(said)[-1]


def test_only_a_long_run_is_announced(
    saved: Callable[..., Path], ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = api.Request(str(saved("llama")), "wanda", sparsity=0.5, calibration=ids_file)
    lines: list[str] = []
    with api.progress_to(lines.append):
        api.prune(request, tmp_path / "short")
    assert lines == []
    monkeypatch.setattr(estimates, "_LONG", 0.0)
    with api.progress_to(lines.append):
        api.prune(request, tmp_path / "long")
    assert lines[0] == "measuring 2 blocks of 3 to estimate the time"
    assert lines[1].startswith("wanda: about 1 s, ")
    assert lines[1].endswith("of memory")
    assert sum(line.startswith("measuring") for line in lines) == 1, "one rehearsal, whatever it says at the start"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "long" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()
