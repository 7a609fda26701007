"""Model families, checkpoints, and the classes that pruned models run with."""
