"""The tour in the documentation agrees with the code."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]


def test_the_order_of_imports_is_that_of_the_contract() -> None:
    order = " -> ".join(floor.replace("secateur.", "").replace(" | ", ", ") for floor in FLOORS)
    assert f"`{order}`" in (ROOT / "docs" / "tour.md").read_text().replace("\n", " "), f"docs/tour.md: write `{order}`"


def test_every_room_has_a_floor() -> None:
    package = ROOT / "src" / "secateur"
    rooms = {f"secateur.{path.stem}" for path in package.iterdir() if not path.name.startswith("__")}
    floors = {room for floor in FLOORS for room in floor.split(" | ")}
    assert rooms == floors, "pyproject.toml names every module and package of secateur, and no other"
