"""Table 3 of arXiv:2503.04377 as data: the fits of its figures 3a and 3b, SliceGPT on two models. RMSE is in y."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.predict.fit import Fit, given
from secateur.predict.laws import DEFAULT, Kind, find_law

SOURCE = "arXiv:2503.04377, table 3"


@dataclass(frozen=True)
class Published:
    """One row of the table.

    Attributes:
        model, dataset: the model that was pruned with SliceGPT, and the data set it was measured on.
        kind: "ppl" (y = ln PPL0 / ln PPL) or "acc" (y = ln(acc / acc0)).
        a, b, rmse: y = a s + b, and the error of that fit in y.
    """

    model: str
    dataset: str
    kind: Kind
    a: float
    b: float
    rmse: float

    def at(self, dense: float) -> Fit:
        """The law with these constants, for a dense model of this perplexity or accuracy."""
        return given(find_law(DEFAULT[self.kind], self.kind), (self.a, self.b), dense)


_LLAMA, _PHI = "Llama-3-8B-Instruct", "Phi-3-mini-4k-Instruct"

TABLE_3 = (
    Published(_LLAMA, "WikiText2", "ppl", -1.08, 0.96, 0.03),
    Published(_PHI, "WikiText2", "ppl", -0.90, 1.02, 0.01),
    Published(_LLAMA, "ARC-e", "acc", -2.14, 0.04, 0.05),
    Published(_PHI, "ARC-e", "acc", -1.84, 0.04, 0.04),
    Published(_LLAMA, "ARC-c", "acc", -2.02, -0.07, 0.09),
    Published(_PHI, "ARC-c", "acc", -1.88, -0.01, 0.02),
    Published(_LLAMA, "WinoGrande", "acc", -0.86, -0.02, 0.02),
    Published(_PHI, "WinoGrande", "acc", -0.66, -0.02, 0.02),
    Published(_LLAMA, "PIQA", "acc", -0.91, -0.01, 0.03),
    Published(_PHI, "PIQA", "acc", -0.90, 0.01, 0.01),
)
