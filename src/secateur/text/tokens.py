"""From text to token ids, and the check that a model takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from secateur.core.errors import SecateurError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text, with the start token that the tokenizer adds by itself.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        special: False for a text in a chat template, which has its special tokens already.
    """
    ids: list[int] = tokenizer(text, verbose=False, **({} if special else {"add_special_tokens": False}))["input_ids"]
    return ids


def check_ids(windows: Tensor, vocabulary: int, longest: int, spec: str, tokens: int | None = None) -> None:
    """Check that a model takes these token ids.

    Args:
        windows: token ids [..., T].
        vocabulary: the number of rows of the embedding.
        longest: the number of positions of the model.
        spec: the SPEC that the ids come from.
        tokens: the size of the tokenizer that made the ids; None for a file of ids.

    Raises:
        SecateurError: a window is too long, or an id is outside the vocabulary.
    """
    if windows.shape[-1] > longest:
        raise SecateurError(
            f"{spec}: windows of {windows.shape[-1]} tokens, but this model knows at most {longest}; cut them shorter"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise outside_vocabulary(low if low < 0 else high, vocabulary, spec, tokens)


def outside_vocabulary(token: int, vocabulary: int, spec: str, tokens: int | None) -> SecateurError:
    """The error for a token id without a row in the embedding; see `check_ids` for the arguments."""
    if tokens is None:
        return SecateurError(
            f"{spec}: token id {token} is outside the vocabulary of the model (0 to {vocabulary - 1}); "
            "tokenise with its own tokenizer"
        )
    return SecateurError(
        f"{spec}: the tokenizer gives id {token}, and the embedding of the model has {vocabulary} rows (ids 0 to "
        f"{vocabulary - 1}; the tokenizer has {tokens} "
        f"tokens): give the model rows for them (model.resize_token_embeddings({max(tokens, token + 1)}), "
        "then save_pretrained), or use the tokenizer it was "
        "trained with"
    )
