"""Text and its token ids: SPECs, files, windows, protocols of perplexity, and the built-in text."""
