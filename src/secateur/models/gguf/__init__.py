"""GGUF files: read one, and write it as a Hugging Face folder. `importer.py` is the way in."""
