"""What belongs to a checkpoint and is no weight: tokenizer, chat templates, generation settings, licence. It goes along into every result.

Names come from what transformers' tokenizers read (a test holds the list against all of them), from mistral-common (`tekken.json`), and from the licences
that want a notice or a policy passed on. Weights, configuration, model card and code of the original are not among them.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPLATES = "additional_chat_templates"  # the folder of chat templates that have names, such as tool_use
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
_NOT = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".py",
)  # weights and code, whatever their names begin with


def is_companion(name: str) -> bool:
    """Whether a file of this name, at the root of a checkpoint or in its folder of templates, belongs to it and is no weight."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja")
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in PATTERNS) and not file.endswith(_NOT)


def companions(folder: Path) -> Iterator[str]:
    """The companions in a folder, by their paths inside it, in order."""
    for file in sorted([*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")]):
        name = file.relative_to(folder).as_posix()
        if is_companion(name) and file.is_file():
            yield name


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions of a checkpoint into the folder of its result."""
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
