"""Applying plans: the only place where weights change."""

from secateur.cut.block import cut_block, cut_outer, dims_after, family_after

__all__ = ["cut_block", "cut_outer", "dims_after", "family_after"]
