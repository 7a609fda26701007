"""Measurements of a checkpoint: perplexity, tasks, shift from a dense model, sizes, FLOPs and speed."""
