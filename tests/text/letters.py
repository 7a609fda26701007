"""A tokenizer for tests that read text."""

from __future__ import annotations


class Letters:
    """A tokenizer: one token a byte, BOS (1) before every text."""

    def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([1] if add_special_tokens else []) + list(text.encode())}
