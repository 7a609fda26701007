"""Low-rank adapters (arXiv:2106.09685) by peft, on any model that secateur writes, and their merge into sparse weights.

    W + M * (alpha / r) B A        M is 0 where W is 0, and 1 elsewhere

Pruned weights stay pruned: in a matrix of which pruning zeroed weights, a weight that is zero gets no update, in any
pattern. Training uses the masked update too, so the merged model is the trained model. For each such matrix, a forward
pass costs a product O x R x I, and O x I floats of 32 bits with their mask, which are kept for the backward pass (for
one block at a time with `recompute`). Any other matrix, as in most structural results, uses peft's own forward,
B (A x); the few zeros that a dense model in bfloat16 has by chance are weights like others there. An adapter that is
kept apart has no mask, since other programs load it without one.

Shape letters: O outputs, I inputs, R rank, B T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from secateur.core.errors import SecateurError, UsageError
from secateur.core.memory import give_back
from secateur.models.family import CANONICAL, Family
from secateur.models.view import ModelView
from secateur.plan.rates import matching

_ADAPTER = "default"  # peft's name for a single adapter
_UNITS = ("rows", "columns")  # patterns that remove whole units and leave no zeros
MANY_ZEROS = 0.01  # of a matrix: not by chance, whatever is known of it (dense models in bfloat16 have 0.3% and less)


@dataclass(frozen=True)
class Adapters:
    """A model with adapters.

    Attributes:
        peft: peft's wrapper; the model inside has its linear modules replaced.
        layers: path of a linear module in the model -> peft's layer.
        masked: the paths of those whose zeros stay zero.
    """

    peft: Any
    layers: Mapping[str, Any]
    masked: frozenset[str]

    @property
    def trainable(self) -> nn.ParameterList:
        """A and B of every layer."""
        return nn.ParameterList(
            [
                layer[_ADAPTER].weight
                for path in self.layers
                for layer in (self.layers[path].lora_A, self.layers[path].lora_B)
            ]
        )

    def delta(self, path: str) -> Tensor:
        """The update (alpha / r) B A of a module, [O, I], float32."""
        return _delta(self.layers[path]).detach()

    def merged(self, path: str, weight_OI: Tensor) -> Tensor:
        """The weight of a module with its update, in its own dtype."""
        return merged(weight_OI, self.delta(path).to(weight_OI.device), masked=path in self.masked)


def zeroed_modules(view: ModelView, plan: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> set[str]:
    """Return the paths of the linear modules of which pruning zeroed weights, be they few.

    Args:
        view: the pruned model.
        plan: the content of its plan.json, which tells what the last pruning zeroed.
        recipe: the content of its recipe. If an earlier pruning of the same model zeroed weights, it may have done so
            in every module.
    """
    family = view.family
    prunings = [step["prune"] for step in (recipe or {}).get("steps", []) if isinstance(step.get("prune"), Mapping)]
    before = any(step.get("pattern") not in (None, *_UNITS) for step in prunings[:-1])
    kept = [block for block in plan["blocks"] if not block.get("dropped")]
    if before or len(kept) != view.blocks:
        return {f"{family.blocks}.{index}.{path}" for index in range(view.blocks) for path in family.matrices.values()}
    return {
        f"{family.blocks}.{index}.{family.matrices[name]}"
        for index, block in enumerate(kept)
        for name, mask in block["masks"].items()
        if mask["removed"]
    }


def find_targets(view: ModelView, names: Sequence[str]) -> list[str]:
    """Find the linear modules that get adapters, and return their paths.

    Args:
        view: the model.
        names: as in `--modules`: canonical names, `attention`, `mlp`, `all`, the family's own names, or globs. A module
            with several fused matrices is taken whole.

    Raises:
        UsageError: a name matches nothing.
    """
    family, targets = view.family, set()
    for name in names:
        matched = {(index, family.matrices[m]) for index in range(view.blocks) for m in matching(view, index, name)}
        if not matched:
            raise UsageError(f"--targets: '{name}' matches no linear module of family {family.name} ({_known(family)})")
        targets |= matched
    order = list(dict.fromkeys(family.matrices.values()))
    return [
        f"{family.blocks}.{index}.{path}"
        for index, path in sorted(targets, key=lambda target: (target[0], order.index(target[1])))
    ]


def _known(family: Family) -> str:
    own = sorted({path.rpartition(".")[2] for path in family.matrices.values()})
    return (
        f"known: {', '.join([*(n for n in CANONICAL if n in family.matrices), 'attention', 'mlp', 'all', *own])}, "
        "or a glob"
    )


def need_peft() -> None:
    """Raise SecateurError if peft is not installed."""
    try:
        import peft  # noqa: F401  # only whether it is there
    except ImportError:
        raise SecateurError("heal needs peft, which is not installed: pip install 'secateur[heal]'") from None


def add_adapters(
    model: PreTrainedModel,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    masked: bool,
    zeroed: Collection[str] = (),
) -> Adapters:
    """Put adapters on a model, in place; all its own weights are frozen.

    Args:
        model: the model, on its device.
        targets: paths of linear modules.
        rank, alpha: the rank r, and the numerator of the scale alpha / r.
        seed: the seed of A; B starts at zero, so the function is the model's own at first.
        masked: keep zero weights at zero, in the modules of `zeroed` and where at least 1% of the weights are zero.
        zeroed: paths of modules of which pruning zeroed weights, be they few.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), bias="none", task_type="CAUSAL_LM")  # type: ignore[arg-type]  # alpha may be a fraction
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in targets}
    chosen = {path for path in targets if masked and _pruned_zeros(layers[path].base_layer.weight, path in zeroed)}
    for path in chosen:
        layers[path].forward = partial(_masked_forward, layers[path])
    return Adapters(wrapped, layers, frozenset(chosen))


def _pruned_zeros(weight_OI: Tensor, zeroed: bool) -> bool:
    """Whether a weight has zeros that stay zero: pruning zeroed some, or they are too many to be there by chance."""
    zeros = weight_OI.numel() - int(weight_OI.count_nonzero())
    return zeros > 0 and (zeroed or zeros >= MANY_ZEROS * weight_OI.numel())


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep one activation per block, and recompute the others in the backward pass.

    On a CPU the memory that a block has freed goes back to the system before the next one: glibc's allocator finds
    little use for the holes, and the peak of a step would be twice as high.
    """
    for block in blocks:
        forward = block.forward
        if next(block.parameters()).device.type == "cpu":
            forward = partial(_give_back_first, forward)
        block.forward = partial(checkpoint, forward, use_reentrant=False)


def _give_back_first(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    give_back()
    return forward(*args, **kwargs)


def merged(weight_OI: Tensor, delta_OI: Tensor, *, masked: bool) -> Tensor:
    """The weight with its update, in its own dtype; if masked, zeros keep their bits."""
    updated_OI = (weight_OI.to(delta_OI.dtype) + delta_OI).to(weight_OI.dtype)
    return torch.where(weight_OI == 0, weight_OI, updated_OI) if masked else updated_OI


def _delta(layer: Any) -> Tensor:
    delta_OI: Tensor = layer.lora_B[_ADAPTER].weight @ layer.lora_A[_ADAPTER].weight * layer.scaling[_ADAPTER]
    return delta_OI


def _masked_forward(layer: Any, x_BTI: Tensor) -> Tensor:
    weight_OI = layer.base_layer.weight
    delta_OI = _delta(layer) * (weight_OI != 0)
    base_BTO: Tensor = layer.base_layer(x_BTI)
    return base_BTO + linear(x_BTI, delta_OI.to(x_BTI.dtype))
