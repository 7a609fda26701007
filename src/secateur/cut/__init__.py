"""The only place where a plan is applied to weights. (Healing trains them, see `heal/`.)"""

from secateur.cut.block import cut_block, cut_outer, dims_after, family_after

__all__ = ["cut_block", "cut_outer", "dims_after", "family_after"]
