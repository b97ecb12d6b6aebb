"""Make the golden run folders of a release: ``python tests/golden/make.py tests/golden/0.1`` in its checkout.

A tiny random model, sixty rows, and what the release leaves of runs on them: finished ones, which later releases have
to replay to the same weights, and one that was stopped, which they have to resume. Only methods whose replay is the
same on every CPU: no products of matrices. `test_golden.py` reads the folders.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zoft.deploy import FinetuneConfig, StepDone, finetune
from zoft.errors import Interrupted
from zoft.metatrain import MetatrainConfig, metatrain

RUNS = {
    "mezo": {"method": "mezo", "dtype": "fp32", "weight_decay": 0.01, "probes": 2},
    "mezo-bf16": {"method": "mezo", "dtype": "bf16"},
    "lezo-adam": {"method": "lezo+mezo-adam", "dtype": "fp32"},
    "dizo": {"method": "dizo", "dtype": "fp32", "options": {"cycle": 4}},
    "zoft": {"tuner": "tuner.safetensors", "dtype": "fp32"},
    "lora": {"method": "mezo", "dtype": "bf16", "lora": {"rank": 2}, "lr": 1e-3, "eps": 1e-2},
}
STOPPED = {"method": "mezo-momentum", "dtype": "bf16"}  # at step 7 of 12
STOPPED_AT = 7
COMMON = {"steps": 12, "batch_size": 4, "eval_every": 4, "snapshot_every": 5, "seed": 3, "device": "cpu", "lr": 1e-4}


def make(folder: Path) -> None:
    """Write base, rows and runs into the new ``folder``."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    os.chdir(folder)  # so that what the runs record holds no path of this machine
    _base(Path("base"))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    expected = {}
    _tuner()
    for name, settings in RUNS.items():
        finetune(_config(name, settings))
    taken: list[int] = []

    def listen(event: object) -> None:
        if isinstance(event, StepDone):
            taken.append(event.step)

    with contextlib.suppress(Interrupted):
        finetune(_config("stopped", STOPPED), on_event=listen, cancelled=lambda: STOPPED_AT in taken)
    for name in RUNS:
        file = weights_in(Path(name, "model"))
        expected[name] = digest(file)
        shutil.rmtree(Path(name, "model"))
        shutil.rmtree(Path(name, "snapshots"), ignore_errors=True)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _config(name: str, settings: dict) -> FinetuneConfig:
    values = COMMON | {"model": "base", "data": "rows.jsonl", "out": name} | settings
    return FinetuneConfig.model_validate(values)


def weights_in(folder: Path) -> Path:
    """Return the file of weights in the ``folder`` of a model or an adapter."""
    adapter = folder / "adapter_model.safetensors"
    return adapter if adapter.exists() else folder / "model.safetensors"


def digest(file: Path) -> str:
    """Return the SHA-256 over names and bytes of the tensors in a safetensors file, whatever its metadata."""
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _base(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, max_position_embeddings=128, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)


def _tuner() -> None:
    """A card of a few points, whose scales are not 1."""
    reviews = [{"sentence": row["prompt"], "label": row["label"], "idx": i} for i, row in enumerate(_rows())]
    for split, part in (("train", reviews[:40]), ("dev", reviews[40:50]), ("test", reviews[50:])):
        Path("data/sst2").mkdir(parents=True, exist_ok=True)
        Path(f"data/sst2/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = {"steps": 6, "reset_every": 3, "lr": 1e-2, "batch_size": 4, "device": "cpu", "dtype": "fp32"}
    metatrain(
        MetatrainConfig.model_validate(
            settings | {"model": "base", "tasks": ["sst2"], "data": "data", "out": "tuner.safetensors"}
        )
    )
    shutil.rmtree("data")
    shutil.rmtree("tuner.safetensors.run", ignore_errors=True)


def _rows() -> list[dict]:
    return [
        {"prompt": f"the {thing} was {word}. It was", "choices": [" bad", " good"], "label": int(i < 3)}
        for thing in ("film", "cast", "plot", "toy", "ending", "apple", "box", "answer", "question", "model")
        for i, word in enumerate(("great", "lovely", "happy", "terrible", "worse", "dull"))
    ]


if __name__ == "__main__":
    make(Path(sys.argv[1]))
