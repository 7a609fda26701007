"""Write text with a model, beside the text of another one: what a perplexity cannot show.

Nothing but the request decides the text: sampling settings of the checkpoint (`generation_config.json`) are not used,
except for the tokens that end a text. So two models write under the same rules.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from secateur.core import records
from secateur.core.device import resolve_device, resolve_dtype
from secateur.core.errors import NotFiniteError, SecateurError, UsageError
from secateur.core.memory import give_back
from secateur.core.progress import track
from secateur.models.load import Checkpoint, load_model, open_checkpoint
from secateur.requests import GenerateRequest
from secateur.text.tokens import outside_vocabulary, tokenize

_COLDEST, _HOTTEST = 0.01, 100.0  # colder, the quotients overflow; hotter, every token is as likely as any other
_LONGEST_SHOWN = 40  # characters of a prompt in a message
_NO_TOKENIZER = "copy the tokenizer files of the original into the folder"


def generate(request: GenerateRequest) -> records.Record:
    """Write text after each prompt; returns the record, which is not appended to a file, since nothing is measured.

    Returns:
        `texts` has one entry for each prompt: `prompt`, `text`, `tokens`, and with a dense model `text_dense` and
        `tokens_dense`. `chat` and `chat_dense` say whether a chat template was used. The settings are beside them.

    Raises:
        UsageError: no prompt, a setting out of range, or a prompt too long for a model.
        SecateurError: a model or its tokenizer cannot be used.
    """
    started = time.perf_counter()
    _check(request)
    prompts = _read_prompts(request)
    device = resolve_device(request.device)
    named = {"": (request.model, request.revision)}
    if request.dense is not None:
        named["_dense"] = (request.dense, request.dense_revision)
    writers = {
        ending: _Writer(open_checkpoint(*name), request, prompts, device) for ending, name in named.items()
    }  # all of them before the first model is loaded, so that a wrong name costs no time
    texts: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    facts: dict[str, Any] = {}
    for ending, writer in writers.items():
        facts |= {f"chat{ending}": writer.chat, f"dtype{ending}": str(writer.dtype).removeprefix("torch.")}
        for entry, (text, tokens) in zip(texts, writer.write(), strict=True):
            entry |= {f"text{ending}": text, f"tokens{ending}": tokens}
    return {
        "command": "generate",
        "version": records.version(),
        "model": request.model,
        "model_revision": writers[""].checkpoint.revision,
        "dense": request.dense,
        **({"dense_revision": writers["_dense"].checkpoint.revision} if "_dense" in writers else {}),
        "new": request.new,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "device": str(device),
        **facts,
        "texts": texts,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": records.versions(),
    }


@torch.inference_mode()
def write_on(model: PreTrainedModel, prompts_BT: Tensor, **settings: Any) -> Tensor:
    """Return the continuations of prompts of equal length, [B, new], on the CPU; `settings` are those of `generate`."""
    prompts_BT = prompts_BT.to(model.device)
    out: Tensor = model.generate(  # type: ignore[operator]  # transformers mixes it in
        prompts_BT, attention_mask=torch.ones_like(prompts_BT), **settings
    )
    return out[:, prompts_BT.shape[1] :].cpu()


class _Writer:
    """One of the models, checked against the request and the prompts; its weights are in memory while it writes.

    Attributes:
        chat: whether the prompts are in a chat template.
        dtype: the dtype to compute in.
    """

    def __init__(
        self, checkpoint: Checkpoint, request: GenerateRequest, prompts: Sequence[str], device: torch.device
    ) -> None:
        self.checkpoint, self.request, self.device = checkpoint, request, device
        self.dtype = resolve_dtype(request.dtype, checkpoint.dtype, device)
        self.tokenizer = checkpoint.tokenizer(_NO_TOKENIZER)
        self.chat = request.chat and bool(self.tokenizer.chat_template)
        self.prompts = [self._ids(prompt) for prompt in prompts]

    def write(self) -> list[tuple[str, int]]:
        """Load the model and return text and number of tokens for each prompt."""
        model = load_model(self.checkpoint, device=self.device, dtype=self.dtype)
        ends = _ends(model, self.tokenizer)
        # generate() takes what the request leaves open from here: a repetition penalty of the checkpoint, for one
        model.generation_config = GenerationConfig(
            bos_token_id=model.generation_config.bos_token_id if model.generation_config else None,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        written = []
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            for ids_T in track(self.prompts, f"generate {self.checkpoint.name}"):
                torch.manual_seed(self.request.seed)
                new_T = write_on(model, ids_T[None], **self._settings())[0]
                text = self.tokenizer.decode(new_T, skip_special_tokens=True)
                assert isinstance(text, str), "one text for one row of tokens"
                written.append((text, len(new_T)))
        del model
        give_back()
        return written

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "max_new_tokens": self.request.new,
            "do_sample": self.request.temperature > 0,
            "logits_processor": [_Finite(self.checkpoint.name)],
        }
        if self.request.temperature > 0:
            settings |= {"temperature": self.request.temperature, "top_p": self.request.top_p, "top_k": 0}
        return settings

    def _ids(self, prompt: str) -> Tensor:
        """Return the token ids of a prompt, int64 [T], after the checks that the model takes them."""
        name, config = self.checkpoint.name, self.checkpoint.config
        ids = self._templated(prompt) if self.chat else tokenize(self.tokenizer, prompt)
        if not ids:
            raise SecateurError(f"{name}: its tokenizer gives no token for {_shown(prompt)}; write another prompt")
        if max(ids) >= config.vocab_size:
            raise outside_vocabulary(max(ids), config.vocab_size, _shown(prompt), len(self.tokenizer))
        longest = self.checkpoint.max_length()
        if (room := longest - len(ids)) < self.request.new:
            of_template = " in its chat template" if self.chat else ""
            step = f"lower --new to {room}, or shorten the prompt" if room > 0 else "shorten the prompt"
            raise UsageError(
                f"{name}: {_shown(prompt)} has {len(ids):,} tokens{of_template}, and with --new {self.request.new} "
                f"that is more than the {longest:,} positions of the model; {step}"
            )
        return torch.tensor(ids)

    def _templated(self, prompt: str) -> list[int]:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids
        except Exception as error:  # a template is a program: it can fail in any way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SecateurError(
                f"{self.checkpoint.name}: its chat template cannot be used ({reason}); leave it out with --no-chat"
            ) from error


class _Finite(LogitsProcessor):
    """Refuse logits that are NaN or infinite: a token chosen from them would be chance."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are."""
        if not scores.isfinite().all():
            raise NotFiniteError(
                f"{self.name}: its logits are not finite after {input_ids.shape[1]:,} tokens, so it cannot write: "
                "compute in a wider dtype (--dtype float32), or look for broken weights with 'secateur eval'"
            )
        return scores


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text, by the checkpoint's generation settings, configuration or tokenizer."""
    configured = [
        getattr(source, "eos_token_id", None) for source in (model.generation_config, model.config, tokenizer) if source
    ]
    ends = [end for ends in configured for end in (ends if isinstance(ends, list | tuple) else [ends])]
    return list(dict.fromkeys(end for end in ends if isinstance(end, int) and 0 <= end < model.config.vocab_size))


def _check(request: GenerateRequest) -> None:
    if request.new < 1:
        raise UsageError(f"--new {request.new}: at least 1 is needed, the number of tokens to write")
    temperature, top_p = request.temperature, request.top_p
    if temperature and not _COLDEST <= temperature <= _HOTTEST:
        raise UsageError(
            f"--temperature {temperature:g}: allowed are 0, for the likeliest tokens, and {_COLDEST:g} to {_HOTTEST:g}"
        )
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p:g} is outside (0, 1]; 1 draws from all tokens")
    if top_p < 1 and not temperature:
        raise UsageError(f"--top-p {top_p:g} needs draws: add --temperature, such as --temperature 0.8")
    if not 0 <= request.seed < 2**63:
        raise UsageError(f"--seed {request.seed} is outside [0, 2^63)")


def _read_prompts(request: GenerateRequest) -> list[str]:
    given = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    if any(not prompt.strip() for prompt in given):
        raise UsageError('--prompt is empty: give a text to go on from, as in --prompt "Once upon a time"')
    if broken := [prompt for prompt in given if any("\ud800" <= c <= "\udfff" for c in prompt)]:
        raise UsageError(
            f"--prompt {broken[0]!a}: not UTF-8 text; write it in UTF-8, or put it into a file for --prompts"
        )
    if request.prompts is not None:
        given += _lines(Path(request.prompts).expanduser())
    if not given:
        taken = "" if request.dense is None else f" ('{request.dense}' is in the place of the dense model)"
        raise UsageError(f'there is no prompt{taken}: give --prompt "Once upon a time", or --prompts FILE, one a line')
    return given


def _lines(file: Path) -> list[str]:
    if file.is_dir() or not file.exists():  # a pipe is as good as a file
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UsageError(f"--prompts {file}: {what}; give a text file with one prompt a line")
    try:
        lines = [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"--prompts {file}: cannot be read ({error.strerror})") from None
    if not lines:
        raise UsageError(f"--prompts {file} has no line with text; write one prompt a line")
    return lines


def _shown(prompt: str) -> str:
    words = " ".join(prompt.split())
    return f"prompt '{words if len(words) <= _LONGEST_SHOWN else words[: _LONGEST_SHOWN - 3] + '...'}'"
