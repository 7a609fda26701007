"""The curve of a learning run stays small and keeps its means."""

from secateur.methods.disp_llm.history import FIELDS, POINTS, history


def test_a_long_run_is_averaged_to_few_points() -> None:
    seen = [{"step": 20.0 * n, "loss": float(n), "budget": 2.0 * n, "left": 10.0 * n} for n in range(1, 501)]
    found = history(seen, 100)
    assert {len(found[name]) for name in ("step", *FIELDS)} == {125}
    assert POINTS >= 125
    assert [found["step"][0], found["step"][-1]] == [80, 10_000]
    assert [found[name][0] for name in FIELDS] == [2.5, 5, 0.25]
    assert history([], 100) == {"step": [], "loss": [], "budget": [], "left": []}
