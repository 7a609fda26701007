"""secateur prunes Hugging Face causal language models, saves checkpoints that other tools load, and measures what the
pruning cost.

    from secateur import api

    record = api.prune(api.Request("bundled", "wanda", sparsity=0.5), out)
    pruned = api.cut(model, api.plan(model, "wanda", windows, sparsity=0.5))    # in memory

`import secateur` is quick and makes `AutoModelForCausalLM.from_pretrained` know every checkpoint that secateur writes.
"""

from __future__ import annotations

from secateur.core.errors import SecateurError, UsageError
from secateur.models.register import register_when_loaded

__all__ = ["SecateurError", "UsageError"]

register_when_loaded()
