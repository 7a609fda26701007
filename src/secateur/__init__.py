"""secateur prunes Hugging Face causal language models."""
