"""Text and its way to token ids: SPECs, files, windows, the protocols of perplexity, and the built-in text."""
