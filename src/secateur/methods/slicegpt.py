"""SliceGPT: rotate the residual stream to its principal directions and cut off the weakest (representation dimension).

From arXiv:2401.15024, section 3, as both arXiv:2503.04377 and DISP-LLM use it. In canonical form
(`models/canonical.py`) a rotation of the residual stream changes nothing, since a norm without gain commutes with it. A
place is a point of the residual stream: before the first block, between attention and MLP, after a block. At every
place the directions are the eigenvectors of the second moment of the residual, computed in float64 on the already
sliced network. All weights that read or write there are rotated, and lose the columns or rows of the removed
directions. Each residual connection then needs an adapter Q_prev^T Q_next from one basis to the next.

An adapter is what `Place.skip` holds, in the form `Place.form`; `runtime.Skip` runs it. `_with_adapter` makes it.

Width: floor((1 - s) D), rounded down to a multiple of `round`. The sparsity that is reached is 1 - width / D. The head
is rotated, and sliced only with `slice_head`. Parallel blocks (Phi) have one place and one adapter a block. Norms
divide by the original D.

A head that is the embedding stays it (`head=auto`), which neither the paper nor the authors' code does: one table E B
serves both. The first basis B then comes from two second moments, of what enters the blocks and of what the dense head
reads (`join_ends`). A map M leads from the last basis to the table: of all maps the one whose logits E B M u are
nearest to E G Q u, with the gain G and the last basis Q (`cut/rotate.py`).

Differences from the authors' code:
- No mean is subtracted where the model has RMSNorm, and the model's own epsilon is used.
- Each half of a block runs once, not twice.
- Adapters are small. The basis inside a kept subspace is free, so each basis is turned to lie as close to the previous
  one as it can, by the polar factor of the adapter. The adapter is then the identity minus a product of rank at most
  D - width, stored as that product where this is smaller. The last adapter, before an unsliced head, is the identity
  and needs no weights. The function is the same; `adapters=dense` gives the authors' form.

Shape letters: D residual, W kept directions, K removed directions, I and O inputs and outputs of an adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.calibrate.statistics import TOKENS_A_DIRECTION, SecondMoment
from secateur.core.errors import HopelessError, UsageError
from secateur.models.canonical import why_not_tied
from secateur.models.view import BlockDims, ModelView, Residual
from secateur.plan.plan import Place
from secateur.plan.quantity import WIDTH

CALIBRATION = "wikitext2"
REMOVES = WIDTH
_LEAVING = 3.0  # the weight of what a tied head reads beside what enters the blocks; see docs/lab-log.md
DEMO = [{"sparsities": [0.1, 0.25, 0.4], "heal": True}]


@dataclass(frozen=True)
class SliceGPT:
    """Options.

    Attributes:
        round: every width is a multiple of this number, and at least one multiple.
        energy: a share of the mean square, instead of --sparsity: every place gets the smallest width that keeps it.
            With 0, --sparsity decides.
        signal: the input of the principal component analysis: `residual` (the authors' code), or `normed` (the paper's
            text), where each token is divided by its root mean square, so that a few tokens of large norm do not
            decide.
        slice_head: whether the input of the head is sliced too.
        orientation: the basis inside the first kept subspace: `pca`, or `random` (from the seed; it spreads outliers
            over all features).
        adapters: the form of the adapters: `aligned` (small), or `dense` (the authors' form).
        head: what becomes of a head that is the embedding: it stays `tied` (one table of the first width for both, and
            a map to it from the last basis), or it gets rows of its `own` in the last basis, as in the authors' code,
            and the model grows by a table; `auto` keeps it tied where that can be.
    """

    round: int = 8
    energy: float = 0.0
    signal: str = "residual"
    slice_head: bool = False
    orientation: str = "pca"
    adapters: str = "aligned"
    head: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("signal", ("residual", "normed")),
            ("orientation", ("pca", "random")),
            ("adapters", ("aligned", "dense")),
            ("head", ("auto", "tied", "own")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"slicegpt: unknown {name} '{getattr(self, name)}' (allowed: {', '.join(allowed)})")
        if self.round < 1:
            raise UsageError(f"slicegpt: round is {self.round}; widths are multiples of it, so use 1 or more")
        if not 0 <= self.energy < 1:
            raise UsageError(
                f"slicegpt: energy {self.energy:g} is outside (0, 1); it is the share of the mean square to keep, such"
                " as 0.99 (0 means that --sparsity decides)"
            )


def keeps_tied(view: ModelView, options: SliceGPT) -> bool:
    """Return whether the head is the embedding and stays it."""
    return options.head == "tied" or (options.head == "auto" and why_not_tied(view) is None)


def check(view: ModelView, sparsity: float | None, options: SliceGPT) -> None:
    """Refuse impossible requests before the work begins.

    Raises:
        UsageError: no sparsity is given, or both a sparsity and `energy`, or no direction would be left; or the head of
            this model cannot stay tied.
    """
    if options.head == "tied" and (why := why_not_tied(view)) is not None:
        raise UsageError(f"slicegpt: head=tied: {why}; leave out --set head=tied")
    if options.energy:
        if sparsity is not None:
            raise UsageError(
                f"--sparsity does not go with --set energy={options.energy:g}: with energy the widths follow from the"
                " spectrum; give only one of the two"
            )
    elif sparsity is None:
        raise UsageError("slicegpt needs --sparsity S, --params-removed R, or --set energy=E")
    else:
        width_after(view.config.hidden_size, sparsity, options)


def width_after(hidden: int, sparsity: float, options: SliceGPT) -> int:
    """Return the width of a place: floor((1 - s) D), rounded down to a multiple of `round`; D at s = 0.

    Raises:
        UsageError: no direction would be left.
    """
    if sparsity == 0:
        return hidden
    width = math.floor((1 - sparsity) * hidden + 1e-9) // options.round * options.round
    if width == 0:
        most = math.floor(10_000 * (1 - options.round / hidden)) / 10_000
        raise UsageError(
            f"slicegpt: sparsity {sparsity:g} of {hidden} directions leaves {(1 - sparsity) * hidden:.3g}, rounded down"
            f" to a multiple of {options.round}: 0;"
            f" use {f'at most --sparsity {most:g}, or ' if most > 0 else ''}a smaller --set round=N"
        )
    return width


def new_moment(hidden: int, device: torch.device, options: SliceGPT) -> SecondMoment:
    """Make the statistic that the driver collects at every place."""
    return SecondMoment(hidden, device, normed=options.signal == "normed")


def join_ends(entering: SecondMoment, leaving: SecondMoment, options: SliceGPT) -> None:
    """Let the first basis serve a tied head too: it must span what enters the blocks and what the head reads."""
    entering.join(leaving, _LEAVING)


def plan_place(moment: SecondMoment, before: Place | None, sparsity: float, options: SliceGPT, seed: int) -> Place:
    """Choose the directions to keep at one place, and its adapter.

    Args:
        moment: the second moment of the residual at this place, in the already sliced network.
        before: the place that the residual connection comes from; None at the first place.
        sparsity: the fraction of the width to remove; 0 with `energy`.
        options: the options of the method.
        seed: the seed for `orientation=random`.

    Raises:
        HopelessError: there are fewer tokens than directions to keep, or the residual is zero.
    """
    value_D, vector_DD = torch.linalg.eigh(moment.sum_II)
    spectrum_D = (value_D / moment.tokens).flip(0).clamp(min=0).cpu()
    if not spectrum_D[0] > 0:
        raise HopelessError(
            "the residual stream is zero on all calibration tokens, so no direction is better than another; use"
            " another text"
        )
    width = width_by_energy(spectrum_D, options) if options.energy else width_after(len(spectrum_D), sparsity, options)
    if moment.tokens < width:
        raise HopelessError(
            f"{moment.tokens} calibration tokens span at most {moment.tokens} of the {width} directions to keep: give"
            f" at least {width} tokens (--samples times --seqlen)"
        )
    vector_DD = vector_DD.flip(1)
    basis_DW = _fix_signs(vector_DD[:, :width])
    if before is None and options.orientation == "random":
        basis_DW = basis_DW @ _random_rotation(width, seed).to(basis_DW)
    return _with_adapter(Place(basis_DW, spectrum_D, width, len(spectrum_D)), vector_DD[:, width:], before, options)


def last_place(before: Place, options: SliceGPT) -> Place | None:
    """Return the place after the last block, or None with `slice_head`, where it is chosen like the others.

    An unsliced head reads all D directions. The directions kept at the place before come first, so that an aligned
    adapter is the identity.
    """
    if options.slice_head:
        return None
    basis_DW = before.basis_DW
    assert basis_DW is not None
    hidden, width = basis_DW.shape
    everything_DD = torch.linalg.qr(basis_DW, mode="complete").Q
    whole = Place(torch.cat([basis_DW, everything_DD[:, width:]], 1), None, hidden, hidden)
    return (
        replace(whole, form="dense", skip={"weight": _plain_adapter(before, whole).t()})
        if options.adapters == "dense"
        else whole
    )


def notice(view: ModelView, sparsity: float, options: SliceGPT) -> str | None:
    """Return a line for the user where rounding the width moves the sparsity by more than 0.02, or None."""
    hidden = view.config.hidden_size
    width = width_after(hidden, sparsity, options)
    if abs(1 - width / hidden - sparsity) <= 0.02:
        return None
    return (
        f"slicegpt: --sparsity {sparsity:g} becomes {1 - width / hidden:.4g}: {width} of {hidden} directions stay, a"
        f" multiple of {options.round} (--set round=N)"
    )


def few_tokens(view: ModelView, tokens: int, options: SliceGPT) -> str | None:
    """Return a warning where the second moment comes from fewer than ten tokens for each of its D directions, or None.

    The second moment of N tokens has a rank of at most N. Also above that, chance spreads its eigenvalues: N
    independent tokens with D equal true eigenvalues give values from (1 - r)^2 to (1 + r)^2 times the true one, with
    r = sqrt(D / N) (Marchenko and Pastur). At N = D the weakest direction thus seems empty where it is not; at N = 10 D
    the factors are 0.47 and 1.73. Neighbouring tokens are not independent, so more of them are better still.
    """
    hidden = view.config.hidden_size
    if tokens >= (enough := TOKENS_A_DIRECTION * hidden):
        return None
    return (
        f"slicegpt: {tokens:,} calibration tokens are few to find the weak ones of {hidden:,} directions (the width),"
        f" so the result may be poor on other text; give {enough:,} tokens or more (--samples times --seqlen)"
    )


def width_by_energy(spectrum_D: Tensor, options: SliceGPT) -> int:
    """Return the smallest multiple of `round`, at most D, that keeps the share `energy` of the mean square."""
    kept_D = spectrum_D.cumsum(0) / spectrum_D.sum()
    needed = int(torch.searchsorted(kept_D, options.energy)) + 1
    return min(len(spectrum_D), -(-needed // options.round) * options.round)


def adapter_form(inputs: int, outputs: int, hidden: int) -> int | str | None:
    """Return the form of an aligned adapter that has the fewest weights.

    Returns:
        The rank of the product that is subtracted from the identity, or `dense`; None if the adapter is the identity.
    """
    rank = hidden - outputs
    if rank == 0:
        return None
    factors = rank * inputs if inputs == outputs else rank * (inputs + outputs)
    return rank if factors < inputs * outputs else "dense"


def sizes_left(view: ModelView, options: SliceGPT, sparsity: float) -> list[BlockDims] | None:
    """Return the sizes of all blocks with a narrowed residual stream; None with `energy`."""
    if options.energy:
        return None
    narrow = residuals(view.config.hidden_size, view.blocks, view.family.parallel, sparsity, options)
    return [replace(view.dims(index), residual=residual) for index, residual in enumerate(narrow)]


def residuals(hidden: int, blocks: int, parallel: bool, sparsity: float, options: SliceGPT) -> list[Residual]:
    """Return the residual widths of all blocks at a sparsity, from shapes alone (not with `energy`)."""
    width = width_after(hidden, sparsity, options)
    inside = "dense" if options.adapters == "dense" else adapter_form(width, width, hidden)
    widths = []
    for index in range(blocks):
        whole = index == blocks - 1 and not options.slice_head
        out, last = (hidden, "dense" if options.adapters == "dense" else None) if whole else (width, inside)
        widths.append(
            Residual((width, out), (width, out), (last,))
            if parallel
            else Residual((width, width), (width, out), (inside, last))
        )
    return widths


def _with_adapter(place: Place, rest_DK: Tensor, before: Place | None, options: SliceGPT) -> Place:
    """Turn the basis of a place towards the place before, and add the adapter between them.

    `rest_DK` are the directions that the place removes.
    """
    if before is None:
        return place
    if options.adapters == "dense":
        return replace(place, form="dense", skip={"weight": _plain_adapter(before, place).t()})
    assert before.basis_DW is not None
    assert place.basis_DW is not None
    hidden, inputs = before.basis_DW.shape
    outputs = place.width
    form = adapter_form(inputs, outputs, hidden)
    if (
        isinstance(form, int)
        and inputs == outputs
        and (turned := _turn_and_adapter(before.basis_DW, rest_DK)) is not None
    ):
        return replace(place, basis_DW=turned[0], form=form, skip={"left": turned[1]})
    adapter_IO = before.basis_DW.t() @ place.basis_DW
    identity_IO = torch.eye(inputs, outputs).to(adapter_IO)
    left_OO, _, right_OO = torch.linalg.svd(adapter_IO.t() @ identity_IO)
    turn_OO = left_OO @ right_OO  # the polar factor: of all rotations it brings the adapter closest to the identity
    place = replace(place, basis_DW=place.basis_DW @ turn_OO)
    adapter_IO = adapter_IO @ turn_OO
    if form is None:
        return place
    if form == "dense":
        return replace(place, form=form, skip={"weight": adapter_IO.t()})
    assert isinstance(form, int)
    return replace(place, form=form, skip=_factors(identity_IO - adapter_IO, form))


def _turn_and_adapter(before_DW: Tensor, rest_DK: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the aligned basis and its factor L from the K removed directions.

    This is less work than the polar factor of the adapter.

    The kept space is the complement of the K directions `rest`. P projects onto it, and B is the basis before. With
    M = B^T rest, B^T P B = I - M M^T. The aligned basis is P B (I - M M^T)^(-1/2), and the aligned adapter is
    (I - M M^T)^(1/2) = I - L L^T. Both follow from the eigenvectors V of the small M^T M, whose eigenvalues are the
    squared sines of the angles between the two spaces.

    Returns:
        The basis [D, W] and L [W, K]; None where a direction of B is almost lost (a cosine below 1e-4), since the
        quotient is then not exact.
    """
    lost_WK = before_DW.t() @ rest_DK
    sine_K, vector_KK = torch.linalg.eigh(lost_WK.t() @ lost_WK)
    cosine_K = (1 - sine_K).clamp(min=0, max=1).sqrt()
    if cosine_K.min() < 1e-4:
        return None
    kept_DW = before_DW - rest_DK @ lost_WK.t()
    axis_WK = lost_WK @ vector_KK  # the length of each column is a sine
    turned_DW = kept_DW + (kept_DW @ axis_WK / (cosine_K * (1 + cosine_K))) @ axis_WK.t()
    turned_DW = turned_DW - rest_DK @ (rest_DK.t() @ turned_DW)  # remove rounding errors, which the quotient magnifies
    # one Newton step for the polar factor: the distance from orthonormal that rounding left is squared
    turned_DW = 1.5 * turned_DW - 0.5 * turned_DW @ (turned_DW.t() @ turned_DW)
    return turned_DW, axis_WK / (1 + cosine_K).sqrt()


def _factors(distance_IO: Tensor, rank: int) -> dict[str, Tensor]:
    """Factor the identity minus an aligned adapter, which has at most this rank.

    Between equal widths it is symmetric, and one factor is enough.
    """
    if distance_IO.shape[0] == distance_IO.shape[1]:
        value_I, vector_II = torch.linalg.eigh((distance_IO + distance_IO.t()) / 2)
        return {"left": vector_II[:, -rank:] * value_I[-rank:].clamp(min=0).sqrt()}
    left, value, right = torch.linalg.svd(distance_IO, full_matrices=False)
    root = value[:rank].sqrt()
    return {"left": left[:, :rank] * root, "right": right[:rank].t() * root}


def _plain_adapter(before: Place, place: Place) -> Tensor:
    """Return the adapter Q_prev^T Q_next [I, O], without alignment."""
    assert before.basis_DW is not None
    assert place.basis_DW is not None
    return before.basis_DW.t() @ place.basis_DW


def _fix_signs(vector_DW: Tensor) -> Tensor:
    """Make the largest entry of each eigenvector positive: their signs are arbitrary and differ between libraries."""
    largest_W = vector_DW.abs().argmax(0)
    return vector_DW * vector_DW.gather(0, largest_W[None]).sign()


def _random_rotation(width: int, seed: int) -> Tensor:
    """Draw a rotation uniformly: the Q of a Gaussian matrix, with its signs corrected."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    rotation: Tensor = q * r.diagonal().sign()
    return rotation
