"""Recovery: low-rank adapters learned on a pruned model, and merged into it."""
