"""Open a checkpoint: checks, configuration, and lazily read tensors. No code of the folder is ever run."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.core.errors import SecateurError, UsageError
from secateur.core.memory import is_out_of_memory
from secateur.core.progress import say
from secateur.models import companions, runtime
from secateur.models.family import Family, all_families, find_family
from secateur.models.save import OWN_FOLDER
from secateur.models.view import ModelView, block_modules, other_forwards

BUNDLED = "bundled"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_REASON = 240
_BEGINNING = 512  # the first numbers of each tensor, which go into the fingerprint
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_DOWNLOADED = ["*/*", "consolidated*"]  # other formats, and second copies of the weights
_HUB_FILES = ["*.safetensors", "*.json", "README.md", *companions.PATTERNS]
_HUB_FOLDERS = [f"{companions.TEMPLATES}/*.jinja", f"{OWN_FOLDER}/*"]
# Computed tables, which old files hold beside the weights and current models do not have.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")


def bundled_folder() -> Path:
    """Return the folder of the model in the package."""
    return Path(__file__).parents[1] / "bundled" / "model"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model: its configuration, and the place of each tensor. A `TensorSource`.

    Attributes:
        name: the name that the user gave (hub name or folder).
        folder: the folder on this machine.
        revision: the commit on the hub; None for a folder.
        config: the configuration; `raw_config` is the content of config.json.
        index: tensor name in the model -> (file, name in the file).
        shapes: tensor name in the model -> shape.
        dtype: the dtype of the block matrices.
    """

    name: str
    folder: Path
    revision: str | None
    config: PreTrainedConfig
    raw_config: dict[str, Any]
    index: dict[str, tuple[Path, str]]
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    def names(self) -> list[str]:
        """Return the names of the tensors in the order of the model, without a tied head."""
        return list(self.index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from the file: only the parts in use are read. Do not write to it."""
        return _read(*self.index[name])

    def rows(self, name: str, which: slice | Tensor) -> Tensor:
        """Return some rows of a matrix; only these are read."""
        return self.read(name)[which]

    def view(self) -> ModelView:
        """Return the view of the model through its family."""
        return ModelView(self.name, self.config, self.raw_config, find_family(self.config, self.name), self)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the configuration and of the beginning of every tensor, wherever the folder is."""
        digest = hashlib.sha256(json.dumps(self.raw_config, sort_keys=True).encode())
        for name in self.index:
            digest.update(f"{name} {self.shapes[name]}".encode())
            digest.update(self.read(name).flatten()[:_BEGINNING].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def tokenizer(self, instead: str = "give token ids (.npy or .safetensors) as text") -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Args:
            instead: what to do without one, for the message.

        Raises:
            SecateurError: the folder has no tokenizer that works.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            tokenizer("a")  # some wrong settings show only here
            return tokenizer
        except Exception as error:
            raise SecateurError(
                f"{self.name}: no tokenizer that transformers can load ({_reason(error)}); {instead}"
            ) from error

    def named_tokenizer(self) -> str | None:
        """Return a `tokenizer_config.json` that names the class of the tokenizer; None if it does so, or there is none.

        Transformers chooses the class by the model type too, and may give a result with a type of our own another one
        that gives other token ids (seen with 5.23 for `qwen2`).
        """
        file = self.folder / "tokenizer_config.json"
        try:
            name = type(self.tokenizer()).__name__
            content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except (SecateurError, OSError, ValueError):
            return None
        if content.get("tokenizer_class") == name or "auto_map" in content:
            return None
        return json.dumps({**content, "tokenizer_class": name}, indent=2, ensure_ascii=False) + "\n"

    def weight_bytes(self) -> int:
        """Return the bytes of the files that hold the weights."""
        return sum(file.stat().st_size for file in {file for file, _ in self.index.values()})

    def max_length(self) -> int:
        """Return the largest number of tokens that the model has positions for."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(positions, int) or isinstance(positions, bool) or positions < 1:
            raise SecateurError(
                f"{self.name}: config.json has max_position_embeddings {positions!r}; "
                "write the number of positions that the model knows"
            )
        return positions


def open_checkpoint(model: str, revision: str | None = None, *, ignore_unknown: bool = True) -> Checkpoint:
    """Find, check and open a model without reading its weights.

    Args:
        model: a local folder, a hub name, or `bundled`.
        revision: the hub revision; not used for folders.
        ignore_unknown: only warn if the files hold tensors that the model does not have.

    Raises:
        UsageError: the folder does not exist, and the name cannot be a hub name.
        SecateurError: the folder holds no causal language model that can be pruned; the message gives the reason.
    """
    folder = _locate(model, revision)
    raw = _read_config(folder, model)
    _refuse_adapter(folder, model)
    _refuse_other_kinds(raw, model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise SecateurError(f"{model}: transformers cannot read its config.json ({_reason(error)})") from error
    family = find_family(config, model)
    stored = _stored_tensors(folder, model)
    skeleton = _tried_skeleton(config, family, model)
    index, shapes = _match(skeleton, stored, model)
    _check_unknown(skeleton, set(stored) - {key for _, key in index.values()}, model, ignore_unknown)
    _check_tied_head(config, skeleton, stored, model)
    from_hub = folder.resolve() != Path(model).expanduser().resolve() and model != BUNDLED
    commit = folder.name if from_hub else None  # the hub's cache names its folders by commit
    return Checkpoint(model, folder, commit, config, raw, index, shapes, _matrix_dtype(index, family))


_RUN: set[str] = set()
"""The configurations of which a model has run in this process; a sweep opens the same one again and again."""


def _tried_skeleton(config: PreTrainedConfig, family: Family, model: str) -> PreTrainedModel:
    """Return the model without weights, after a test run: some errors of a configuration show only there.

    Of blocks that are alike one runs: without values, an operation takes as long in any of them.

    Raises:
        SecateurError: transformers cannot build or run the model.
    """
    try:
        skeleton = build_skeleton(config)
        if (content := config.to_json_string(use_diff=False)) in _RUN:
            return skeleton
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device="meta")
        again = _alike(skeleton, family)
        skipped = other_forwards(again, [lambda hidden, *_, **__: hidden] * len(again))
        with torch.no_grad(), skipped:
            # with positions and mask: transformers would read values, which meta tensors do not have
            skeleton(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
        _RUN.add(content)
    except Exception as error:
        raise SecateurError(
            f"{model}: config.json describes a {config.model_type} model "
            f"that transformers cannot run ({_reason(error)})"
        ) from error
    return skeleton


def _alike(skeleton: PreTrainedModel, family: Family) -> list[nn.Module]:
    """Return the blocks that are like one before them: in class, shapes, and kind of attention."""
    seen, found = set(), []
    kinds = getattr(skeleton.config, "layer_types", None) or []
    for index, block in enumerate(block_modules(skeleton, family)):
        shapes = tuple((name, tuple(t.shape)) for name, t in block.state_dict().items())
        kind = (type(block), shapes, kinds[index] if index < len(kinds) else None)
        if kind in seen:
            found.append(block)
        seen.add(kind)
    return found


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model without weights (on the meta device).

    Args:
        config: the configuration.
        dtype: the dtype of parameters and of constants such as the scale of an embedding; None takes the
            configuration's.
    """
    if dtype is not None:
        config = copy.deepcopy(config)  # a copy, because the dtype is written into it
        config.dtype = dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.eval()
    return model


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load the whole model into memory, for evaluation."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise SecateurError(f"{checkpoint.name}: its weights cannot be loaded ({_reason(error)})") from error
    nn.Module.to(model, device)
    model.eval()
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype, *, own: bool = False) -> PreTrainedModel:
    """Return a model in memory with its parameters in a dtype: itself if they are, otherwise a copy; `own`: a copy."""
    if not own and all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    converted = copy.deepcopy(model)
    for parameter in converted.parameters():
        parameter.data = parameter.data.to(dtype)
    return converted


def _locate(model: str, revision: str | None) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model == BUNDLED:
        return bundled_folder()
    if folder.exists():
        raise UsageError(f"'{model}' is a file: give the folder that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise UsageError(
            f"no folder '{model}': give a local folder, a hub name such as org/model, "
            f"or '{BUNDLED}' for the model in the package"
        )
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_DOWNLOADED)
        )
        # a second call, because patterns such as "tokenizer*" would also match inside folders
        snapshot_download(model, revision=snapshot.name, allow_patterns=_HUB_FOLDERS)
        return snapshot
    except Exception as error:
        raise SecateurError(
            f"'{model}' is no local folder, and the hub did not give it ({_hub_reason(error, revision)}); "
            f"check the name and the network, or use '{BUNDLED}' for the model in the package"
        ) from error


def _hub_reason(error: Exception, revision: str | None) -> str:
    """Return why the hub did not give a model, in a few words; the library's messages go on about its settings."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access must be asked for on its page, and then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it knows no such model, or a private one"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it knows no revision '{revision}' of it"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "it does not answer, and the model is not in the cache"
    return _reason(error)


def _read_config(folder: Path, model: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise SecateurError(
                f"'{model}' holds a LoRA adapter, not a model: "
                "put it on its checkpoint with peft, or heal without --keep-adapter"
            )
        raise SecateurError(f"'{model}' is no model: the folder has no config.json")
    try:
        raw = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise SecateurError(f"{file}: not JSON ({error}); copy it again from the source of the model") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise SecateurError(f"{file}: names no model_type, so it is no model of transformers")
    return raw


def _refuse_adapter(folder: Path, model: str) -> None:
    """Refuse an adapter beside a model: transformers would apply it without a warning."""
    if (folder / "adapter_config.json").is_file():
        raise SecateurError(
            f"{model}: an adapter (adapter_config.json) lies beside the model, so it is not clear which of the two "
            "is meant: "
            "merge it first (peft's merge_and_unload, then save_pretrained), or move adapter_config.json away"
        )


def _refuse_quantised(stored: dict[str, Any], model: str) -> NoReturn:
    """Refuse weights in another form, with the next step for each form."""
    method, sparsity = stored.get("quant_method", "an unnamed method"), stored.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, dict) else stored.get("format")
    if method == "compressed-tensors" and isinstance(form, str) and not stored.get("config_groups"):
        if form == "dense":
            raise SecateurError(
                f"{model}: config.json says quantization_config of {method}, but in its format dense the weights are "
                "stored whole and not quantised: take quantization_config out of config.json, then prune"
            )
        raise SecateurError(
            f"{model}: its weights are sparse, in the format {form} of {method}, which leaves zeros out (they are not "
            f"quantised): write them out dense with a version of {method} that reads it, then prune the result"
        )
    raise SecateurError(
        f"{model}: its weights are quantised ({method}); prune the original model, then quantise the result"
    )


def _refuse_other_kinds(raw: dict[str, Any], model: str) -> None:
    """Refuse each kind of model that is no dense decoder with its own message."""
    kind = raw["model_type"]
    if stored := raw.get("quantization_config"):
        _refuse_quantised(stored if isinstance(stored, dict) else {}, model)
    experts = [raw.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")]
    if any(isinstance(count, int | float) and count > 1 for count in experts):
        raise SecateurError(f"{model}: '{kind}' is a mixture of experts, which is not supported; use a dense model")
    if any(key in raw for key in ("vision_config", "audio_config", "text_config", "speech_config")):
        raise SecateurError(
            f"{model}: '{kind}' is multimodal, which is not supported; use a text-only causal language model"
        )
    if raw.get("is_encoder_decoder"):
        raise SecateurError(
            f"{model}: '{kind}' is an encoder-decoder, which is not supported; use a causal language model"
        )
    architectures = raw.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel", "Model")) for name in names):
        raise SecateurError(f"{model}: {names[0]} is an encoder or a classifier, not a causal language model")


def _stored_tensors(folder: Path, model: str) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return name -> (file, shape) for every tensor of the safetensors files. Only headers are read.

    Raises:
        SecateurError: there are no such files, a file is damaged, or a weight is not stored as floating-point numbers.
    """
    files = weight_files(folder, model)
    if not files:
        if packed_files(folder):
            raise SecateurError(f"'{model}' is packed: write it out first, with 'secateur unpack {model} --out DIR'")
        if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
            raise SecateurError(
                f"{model}: has pickled weights only, which are never read since loading them can run code; "
                "convert them first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
            )
        raise SecateurError(f"'{model}' is no model: the folder has neither model.safetensors nor its index")
    tensors = {}
    for file in files:
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118  # the handle is no dict: it has no iterator
                part = handle.get_slice(name)
                tensors[name] = (file, tuple(part.get_shape()))
                if part.get_dtype() not in _DTYPES and name.endswith((".weight", ".bias")):
                    raise SecateurError(
                        f"{file}: {name} is stored as {part.get_dtype()}, "
                        f"and weights are pruned in {', '.join(_DTYPES)}; "
                        "use the original model, or write it out in one of these first"
                    )
    return tensors


def packed_files(folder: Path) -> list[Path]:
    """Return the files of a packed checkpoint, from `secateur/`, or from the root as version 0.1 wrote them."""
    return sorted([*folder.glob(f"{OWN_FOLDER}/packed*.safetensors"), *folder.glob("packed*.safetensors")])


def weight_files(folder: Path, model: str) -> list[Path]:
    """Return the files that transformers would load: the single file, otherwise the files of the index."""
    single, index_file = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index_file.is_file():
        return []
    try:
        index = json.loads(index_file.read_text("utf-8"))
        if not isinstance(index.get("metadata"), dict):
            raise ValueError('transformers requires an object "metadata" in it, such as "metadata": {}')
        names = sorted(set(index["weight_map"].values()))
        if wrong := [
            name
            for name in names
            if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_REASON or Path(name).name != name
        ]:
            raise ValueError(f"'{wrong[0]!s:.40}' is no name of a file beside it")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SecateurError(
            f"{index_file}: not an index of weights ({error}); mend it, or download the model again"
        ) from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SecateurError(
            f"{model}: {', '.join(missing)} is named in {index_file.name} but missing; download the model again"
        )
    return [folder / name for name in names]


def _check_unknown(skeleton: PreTrainedModel, unused: set[str], model: str, ignore: bool) -> None:
    """Warn about tensors that the model does not have, or refuse them.

    Another tool may have left them, for example masks that it has not applied yet.
    """
    prefix, tied = skeleton.base_model_prefix + ".", set(skeleton.all_tied_weights_keys)
    known = {*tied, *(name.removeprefix(prefix) for name in (*tied, *skeleton.state_dict()))}
    ignored = [_COMPUTED, *(re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ())]
    unknown = sorted(name for name in unused - known if not any(pattern.search(name) for pattern in ignored))
    if not unknown:
        return
    tensors = f"{_count(unknown)} that a {skeleton.config.model_type} model does not have, first {unknown[0]}"
    problem = f"{model}: the files hold {tensors}"
    if ignore:
        say(f"warning: {problem}; they are left out")
        return
    raise SecateurError(
        f"{problem}: another tool may have left a half-made result (masks beside dense weights, say); "
        "write it out with that tool first, or leave these tensors out with --ignore-unknown"
    )


def _check_tied_head(
    config: PreTrainedConfig, skeleton: PreTrainedModel, stored: dict[str, tuple[Path, tuple[int, ...]]], model: str
) -> None:
    """Refuse a tied head that is stored with other values than the embedding: transformers would use it."""
    if not config.tie_word_embeddings:
        return
    for name, other in skeleton.all_tied_weights_keys.items():
        if (
            name in stored
            and other in stored
            and not torch.equal(_read(stored[name][0], name), _read(stored[other][0], other))
        ):
            raise SecateurError(
                f"{model}: config.json ties {name} to {other}, but the files hold two different ones; "
                "set tie_word_embeddings to false"
            )


def _read(file: Path, stored: str) -> Tensor:
    """Return a tensor that is mapped from the file."""
    with _opened(file) as handle:
        tensor: Tensor = handle.get_tensor(stored)
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise SecateurError(f"{file}: truncated or corrupt ({error}); download or write it again") from error


def _match(
    skeleton: PreTrainedModel, stored: dict[str, tuple[Path, tuple[int, ...]]], model: str
) -> tuple[dict[str, tuple[Path, str]], dict[str, tuple[int, ...]]]:
    """Find every tensor of the model in the files; return index and shapes as in `Checkpoint`.

    Old files leave out the prefix of the base model. A tied head may be stored or not.
    """
    prefix = skeleton.base_model_prefix + "."
    tied = set(skeleton.all_tied_weights_keys) if skeleton.config.tie_word_embeddings else set()
    index, shapes, absent, wrong = {}, {}, [], []
    for name, tensor in skeleton.state_dict().items():
        if name in tied:
            continue
        key = next((k for k in (name, name.removeprefix(prefix)) if k in stored), None)
        if key is None:
            absent.append(name)
            continue
        file, shape = stored[key]
        if shape != tuple(tensor.shape):
            wrong.append(f"{name} is {list(shape)}, config.json says {list(tensor.shape)}")
        index[name], shapes[name] = (file, key), shape
    if absent and set(absent) <= set(skeleton._tied_weights_keys or ()):
        raise SecateurError(
            f"{model}: the files hold no {absent[0]}, "
            "and config.json says that it is not the embedding (tie_word_embeddings false): "
            "set that to true in config.json if the model was trained so, "
            "or download the model again if a file is missing"
        )
    if absent:
        raise SecateurError(
            f"{model}: the files lack {_count(absent)} of a {skeleton.config.model_type} model, first {absent[0]}; "
            "download the model again, or correct config.json if it belongs to another model"
        )
    if wrong:
        raise SecateurError(f"{model}: {wrong[0]}; config.json and weights do not belong together")
    return index, shapes


def _matrix_dtype(index: dict[str, tuple[Path, str]], family: Family) -> torch.dtype:
    """Return the dtype of the first matrix; all matrices of the blocks are assumed to have it."""
    file, stored = index[f"{family.blocks}.0.{family.matrices['q']}.weight"]
    with _opened(file) as handle:
        return _DTYPES[handle.get_slice(stored).get_dtype()]


def _count(tensors: Sequence[str]) -> str:
    return "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"


def _reason(error: BaseException) -> str:
    """Return the message of an error of another library, on one line and shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


# From here on the Auto classes of transformers know the pruned models.
runtime.register(t for family in all_families().values() for t in family.model_types)
