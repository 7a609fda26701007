"""Learning what to prune: gates, the network that gives their logits, and the loop. The model's weights are never touched."""
