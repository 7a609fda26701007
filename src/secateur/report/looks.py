"""The look of each method: one colour and one marker, the same in every plot of every report.

Built-in methods take colours and markers in the order of their names. The look of another method comes from the letters
of its name, so it does not depend on what else a report has, or on the machine that draws it. `COLOURS`
are those of Okabe and Ito (jfly.uni-koeln.de/color), chosen to be told apart with any colour vision; methods have six
more. The marker says the same again for print.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.methods import built_in_methods

Fill = Literal["full", "none", "left", "bottom", "right", "top"]
Dash = str | tuple[int, tuple[int, ...]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*"

# A report may have every method. Grey and brown come where the names of two simple baselines are.
_COLOURS = (
    "#999933",
    "#009E73",
    "#8C6D31",
    "#D55E00",
    "#332288",
    "#7F7F7F",
    "#882255",
    "#CC79A7",
    "#0072B2",
    "#E69F00",
    "#56B4E9",
    "#6644EE",
)
_MARKERS = "hs*D<Pv^oX>p"
_FILLS: tuple[Fill, ...] = ("full", "left", "bottom", "right", "top")
_DASHES: tuple[Dash, ...] = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_CHANGED_DASHES: tuple[Dash, ...] = ("--", (0, (2, 1)), (0, (7, 2)))


@dataclass(frozen=True)
class Look:
    """How a curve is drawn.

    Attributes:
        colour, marker: those of the method.
        fill: how much of a marker is filled: it tells variants of one method apart. Changed after pruning: none.
        dash: the line, which does the same.
    """

    colour: str
    marker: str
    fill: Fill = "full"
    dash: Dash = "-"

    @property
    def points(self) -> dict[str, Any]:
        """The options of `Axes.plot` for points."""
        hollow = {"markerfacecolor": "white"} if self.fill == "none" else {"fillstyle": self.fill}
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecoloralt": "white",
            "markeredgewidth": 1.2,
            **hollow,
        }


def look(method: str) -> Look:
    """The look of a method; that of `slicegpt + LoRA` is that of `slicegpt`, hollow and dashed."""
    name, changed, _ = method.partition(" + ")
    known = built_in_methods()
    if name in known:
        nth = known.index(name)
        colour, marker = nth, nth + nth // len(_COLOURS)
    else:
        letters = zlib.crc32(name.encode())
        colour = letters % len(_COLOURS)
        marker = colour + 1 + letters // len(_COLOURS) % (len(_MARKERS) - 1)  # never that of a built-in method
    drawn = Look(_COLOURS[colour % len(_COLOURS)], _MARKERS[marker % len(_MARKERS)])
    return Look(drawn.colour, drawn.marker, "none", "--") if changed else drawn


def looks(methods: Sequence[str]) -> list[Look]:
    """The looks of curves, given the method of each: those of one method differ in the fill of markers and the dash."""
    count: dict[str, int] = {}
    found = []
    for method in methods:
        first, changed = look(method), " + " in method
        key = method.partition(" + ")[0] + " +" * changed
        nth = count[key] = count.get(key, -1) + 1
        fill, dashes = (first.fill, _CHANGED_DASHES) if changed else (_FILLS[nth % len(_FILLS)], _DASHES)
        found.append(Look(first.colour, first.marker, fill, dashes[nth % len(dashes)]))
    return found
