import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FAMILIES, MASKED
from zoft.errors import ModelError
from zoft.model import checkpoint, fingerprint
from zoft.model.fingerprint import base_hash
from zoft.model.load import load, save
from zoft.weights.blocks import architecture_hash, trainable_blocks


@pytest.fixture
def folder(tiny_model, tmp_path):
    """``folder(family, **config)``: a tiny checkpoint on disk, as transformers writes it."""

    def make(family: str = "llama", **overrides: object) -> Path:
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        tiny_model(family, **overrides).save_pretrained(path)
        return path

    return make


def change(path: Path, edit) -> Path:
    """A copy of the checkpoint ``path`` whose stored tensors went through ``edit``."""
    copy = path.with_name(path.name + "-edited" + str(len(list(path.parent.iterdir()))))
    shutil.copytree(path, copy)
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_base_hash_is_the_documented_digest(folder):
    path = folder()
    lines = []
    for name, tensor in sorted(load_file(path / "model.safetensors").items()):
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append(json.dumps([name, "F32", list(tensor.shape), digest], separators=(",", ":")) + "\n")
    assert base_hash(path) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES + MASKED)
def test_sharding_does_not_change_the_hash(tiny_model, tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(checkpoint.weight_files(tmp_path / "many")) > 2
    assert base_hash(tmp_path / "one") == base_hash(tmp_path / "many")


HEADS = dict.fromkeys(("llama", "opt", "qwen2", "gemma"), "lm_head.weight") | {
    "roberta": "lm_head.decoder.weight",
    "bert": "cls.predictions.decoder.weight",
    "distilbert": "vocab_projector.weight",
    "deberta": "cls.predictions.decoder.weight",
}


@pytest.mark.parametrize("family", HEADS)
def test_a_tied_copy_counts_once(folder, family):
    path = folder(family, tie_word_embeddings=True)
    (embedding,) = (n for n in load_file(path / "model.safetensors") if "embed_tokens" in n or "word_emb" in n)

    def store_both(tensors):
        tensors[HEADS[family]] = tensors[embedding].clone()

    def store_head_only(tensors):
        tensors[HEADS[family]] = tensors.pop(embedding)

    assert base_hash(change(path, store_both)) == base_hash(path)
    assert base_hash(change(path, store_head_only)) == base_hash(path)


def test_head_stored_with_other_values_counts(folder):
    """Tied by the configuration, untied by the values: both count, as transformers loads both."""
    path = folder(tie_word_embeddings=True)

    def store(head: float, embedding: float):
        def edit(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + head
            tensors["model.embed_tokens.weight"] += embedding

        return change(path, edit)

    assert len({base_hash(p) for p in (path, store(1, 0), store(2, 0), store(1, 2))}) == 4


def test_equal_values_are_not_a_tie(folder):
    """An untied head with the embedding's values, and the norms (all ones), count each by itself."""
    path = folder(tie_word_embeddings=False)

    def equal_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def no_norm(tensors):
        del tensors["model.norm.weight"]

    equal = change(path, equal_head)
    tied = change(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert len({base_hash(path), base_hash(equal), base_hash(tied), base_hash(change(path, no_norm))}) == 4


def test_buffers_are_left_out(folder):
    path = folder("gpt_neox")

    def add_buffers(tensors):
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.rand(4)
        tensors["gpt_neox.rotary_emb.inv_freq"] = torch.rand(4)

    def change_bias(tensors):
        tensors["gpt_neox.layers.0.attention.dense.bias"] += 1

    assert base_hash(change(path, add_buffers)) == base_hash(path)
    assert base_hash(change(path, change_bias)) != base_hash(path)


def test_a_parameter_is_not_a_buffer_even_if_its_class_ignores_it(tiny_model):
    model = tiny_model("gpt_neox")
    model._keys_to_ignore_on_load_unexpected = {"bias"}
    is_buffer = fingerprint.buffer_test(model)
    assert is_buffer("gpt_neox.layers.0.attention.masked_bias")
    assert not is_buffer("gpt_neox.layers.0.attention.dense.bias")


def test_every_part_of_a_tensor_counts(folder):
    path = folder()
    name = "model.layers.0.self_attn.q_proj.weight"

    def value(tensors):
        tensors[name].view(-1)[-1] += 1e-3

    def shape(tensors):
        tensors[name] = tensors[name].view(16, 64)

    def dtype(tensors):
        tensors[name] = tensors[name].view(torch.int32)

    def rename(tensors):
        tensors[name.replace("q_proj", "r_proj")] = tensors.pop(name)

    hashes = {base_hash(change(path, edit)) for edit in (value, shape, dtype, rename)}
    assert len(hashes | {base_hash(path)}) == 5


def test_names_without_the_base_prefix_keep_their_ties(folder):
    """Old Hub checkpoints of base models (``embed_tokens.weight``) tie and drop buffers all the same."""
    path = folder(tie_word_embeddings=True)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    def strip_and_store_head(tensors):
        strip(tensors)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
        tensors["rotary_emb.inv_freq"] = torch.rand(4)

    assert base_hash(change(path, strip)) == base_hash(change(path, strip_and_store_head))


def test_large_tensors_are_read_in_pieces(folder, monkeypatch):
    path = folder()
    expected = base_hash(path)
    monkeypatch.setattr(fingerprint, "READ_SIZE", 1000)
    assert fingerprint.compute_base_hash(path) == expected


def test_hash_is_cached_until_a_file_changes(folder, monkeypatch, zoft_home):
    path = folder()
    first = base_hash(path)
    calls = []
    compute = fingerprint.compute_base_hash
    monkeypatch.setattr(fingerprint, "compute_base_hash", lambda folder: calls.append(folder) or compute(folder))
    assert base_hash(path) == first and not calls
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(0, 12345))
    assert base_hash(path) != first and len(calls) == 1


def test_a_truncated_cached_hash_is_computed_again(folder, zoft_home):
    path = folder()
    first = base_hash(path)
    for entry in (zoft_home / "hashes").iterdir():
        entry.write_text(entry.read_text()[:10])
    assert base_hash(path) == first


def test_loading_in_another_dtype_does_not_change_the_hash(stories260k):
    before = base_hash(stories260k)
    loaded = load(stories260k, dtype="bf16")
    assert base_hash(loaded.path) == before


def test_own_save_keeps_the_hash(stories260k, tmp_path):
    """Loaded and saved untouched in its own dtype, a checkpoint is the same base."""
    loaded = load(stories260k)
    save(loaded.model, loaded.tokenizer, tmp_path / "m", dtype=loaded.stored_dtype, card="")
    assert base_hash(tmp_path / "m") == base_hash(stories260k)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_a_fingerprint_are_those_of_the_loaded_model(tiny_model, folder, family):
    blocks = trainable_blocks(tiny_model(family))
    found = fingerprint.fingerprint(folder(family))
    assert [(b.name, b.shape, b.size) for b in found.blocks] == [(b.name, b.shape, b.size) for b in blocks]
    assert found.parameters == sum(b.size for b in blocks)
    assert found.architecture_hash == architecture_hash(blocks)


def test_fingerprint_of_stories260k(stories260k):
    found = fingerprint.fingerprint(str(stories260k))
    assert (found.parameters, len(found.blocks), found.stored_dtype) == (260_032, 47, "float32")
    (file,) = found.files
    content = (stories260k / "model.safetensors").read_bytes()
    assert (file.name, file.size, file.sha256) == (
        "model.safetensors",
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    assert fingerprint.Fingerprint.model_validate_json(found.model_dump_json()) == found


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="org/base"):
        fingerprint.fingerprint(tmp_path)
