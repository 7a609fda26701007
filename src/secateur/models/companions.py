"""The companion files of a checkpoint: tokenizer, chat templates, generation settings, licence.

Every result gets a copy of them.

The names come from the files that the tokenizers of transformers read (a test compares the list with all of them), from
mistral-common (`tekken.json`), and from licences that require a notice or a policy to be passed on. Weights,
configuration, model card and code of the original are not companions.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPLATES = "additional_chat_templates"  # the folder of named chat templates, such as tool_use
IMPORTED = "secateur/import.json"  # what `secateur import` says of the file that the weights came from
PATTERNS = (
    "tokenizer*",
    "*.tokenizer",
    "*tekken*.json",
    "vocab*",
    "entity_vocab.json",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "byte_maps.json",
    "emoji.json",
    "word_*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "chat_template*",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "generation_config.json",
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
)
# Weights and code are never companions, even if their names match.
_NOT = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".py")


def is_companion(name: str) -> bool:
    """Whether a file of this name, at the root of a checkpoint or in its folder of templates, is a companion."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja")
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in PATTERNS) and not file.endswith(_NOT)


def companions(folder: Path) -> Iterator[str]:
    """Yield the companions in a folder as paths relative to it, sorted."""
    for file in sorted([*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*"), *folder.glob(IMPORTED)]):
        name = file.relative_to(folder).as_posix()
        if (is_companion(name) or name == IMPORTED) and file.is_file():
            yield name


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions of a checkpoint into the folder of its result."""
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
