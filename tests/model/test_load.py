import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.conftest import FAMILIES, MASKED
from zoft.errors import ModelError, RunError
from zoft.model import checkpoint
from zoft.model.architecture import context_length
from zoft.model.config import is_masked_config
from zoft.model.fingerprint import base_hash
from zoft.model.load import DTYPES, Loaded, load, save

PROMPT = "the film was great"


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    """``folder(family, dtype=, **config)``: a tiny checkpoint with tokenizer on disk, as transformers writes it."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
        path = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        tiny_model(family, dtype, **overrides).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


def edit_weights(path: Path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(**loaded.tokenizer(PROMPT, return_tensors="pt")).logits


# -- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES + MASKED)
def test_loads_the_stored_weights(tiny_model, tokenizer, folder, family):
    model = tiny_model(family)
    loaded = load(str(folder(family)))
    assert loaded.masked == is_masked_config(loaded.model.config) == (family in MASKED)
    assert not loaded.model.training and loaded.model.dtype == loaded.stored_dtype == torch.float32
    with torch.no_grad():
        expected = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_the_one_asked_for_and_stored_dtype_the_checkpoints(folder, name, stored):
    loaded = load(folder(dtype=stored), dtype=name)
    assert {p.dtype for p in loaded.model.parameters()} == {DTYPES[name]}
    assert loaded.stored_dtype == stored


def test_auto_dtype_is_read_from_the_weights_not_from_config(folder):
    path = folder(dtype=torch.bfloat16)
    edit_config(path, dtype="float32")
    assert load(path).model.dtype == torch.bfloat16


def test_tied_weights_stay_tied(folder):
    tied = load(folder(tie_word_embeddings=True)).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = load(folder(tie_word_embeddings=False)).model
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["qwen2", *MASKED])
def test_fp32_vectors_have_the_checkpoints_values(folder, family):
    """Loaded in bf16, a float32 norm of 1 + 2**-12 would be 1; as a float32 vector it keeps its digits."""
    path = folder(family)

    def fine(tensors):
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                tensors[name] = tensor + 2.0**-12

    edit_weights(path, fine)
    stored = load_file(path / "model.safetensors")
    model = load(path, dtype="bf16", fp32_vectors=True).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.ndim == 1 else torch.bfloat16)
        if parameter.ndim == 1:
            torch.testing.assert_close(parameter.data, stored[name], rtol=0, atol=0)


def test_fp32_vectors_of_berts_first_files(folder):
    """There the norms are called gamma and beta."""
    path = folder("bert")

    def rename(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name) + 2.0**-12

    edit_weights(path, rename)
    model = load(path, dtype="bf16", fp32_vectors=True).model
    assert (model.bert.embeddings.LayerNorm.weight == 1 + 2.0**-12).all()
    assert (model.bert.embeddings.LayerNorm.bias == 2.0**-12).all()


def test_fp32_vectors_of_a_float32_model_change_nothing(folder):
    path = folder()
    plain, vectors = load(path), load(path, fp32_vectors=True)
    assert torch.equal(logits(plain), logits(vectors))


def test_a_tokenizer_read_before_is_taken_as_it_is(folder, tokenizer):
    assert load(folder(), tokenizer=tokenizer).tokenizer is tokenizer


def test_loading_prints_nothing(folder, capfd):
    """No progress bars, no load report, also where transformers has something to say: the terminal is zoft's."""
    path = folder()
    edit_weights(path, lambda tensors: tensors.update(surplus=torch.ones(1)))
    capfd.readouterr()
    load(path)
    assert capfd.readouterr() == ("", "")


def test_loads_shards(tiny_model, tokenizer, tmp_path):
    model = tiny_model("opt")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(checkpoint.weight_files(tmp_path)) > 2
    loaded = load(tmp_path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(("family", "length"), [("llama", 256), ("opt", 256), ("gpt_neox", 256)])
def test_context_length_is_the_smaller_of_model_and_tokenizer(tiny_model, tokenizer, family, length):
    model = tiny_model(family)
    assert context_length(model, tokenizer) == length
    shorter = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, model_max_length=100)
    assert context_length(model, shorter) == 100


# -- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", FAMILIES + MASKED)
def test_saved_model_loads_equal_and_ties_are_stored_once(folder, tmp_path, family, tie):
    source = folder(family, tie_word_embeddings=tie)
    loaded = load(source)
    out = tmp_path / "saved"
    save(loaded.model, loaded.tokenizer, out, dtype=torch.float32, card="# card\n")
    again = load(out)
    assert torch.equal(logits(again), logits(loaded))
    stored, expected = ([(t.name, t.shape) for t in checkpoint.stored_tensors(path)] for path in (out, source))
    assert stored == expected  # the names that transformers stores, also where it loads them under others
    assert len(stored) == len(list(loaded.model.parameters()))
    assert (out / "README.md").read_text() == "# card\n"
    assert again.tokenizer(PROMPT).input_ids == loaded.tokenizer(PROMPT).input_ids


def test_fused_experts_are_saved_as_published(tokenizer, tmp_path):
    """transformers fuses a mixture's experts on loading; a checkpoint keeps the names that others read."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=320, num_key_value_heads=2, num_local_experts=3, **small)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    loaded = load(tmp_path / "source")
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.float32, card="")
    assert base_hash(tmp_path / "saved") == base_hash(tmp_path / "source")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_weights_are_rounded_to_nearest(folder, tmp_path, dtype):
    loaded = load(folder())
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=dtype, card="")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(stored[name], parameter.data.to(dtype)), name
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]


def test_fp32_vectors_save_as_the_others(folder, tmp_path):
    loaded = load(folder("opt"), dtype="bf16", fp32_vectors=True)
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.bfloat16, card="")
    assert {tensor.dtype for tensor in checkpoint.stored_tensors(tmp_path / "saved")} == {"BF16"}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["OPTForCausalLM"]


def test_large_models_are_saved_in_shards_of_the_target_dtype(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    monkeypatch.setattr(checkpoint, "CHUNK", 100)
    loaded = load(folder())
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.bfloat16, card="")
    files = checkpoint.weight_files(tmp_path / "saved")
    assert len(files) > 2 and all(file.stat().st_size < 25_000 for file in files[1:])
    again = load(tmp_path / "saved").model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again[name], tensor.bfloat16()), name


def test_generation_config_and_chat_template_survive(stories260k, tmp_path):
    loaded = load(stories260k)
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    loaded.model.generation_config.temperature = 0.3  # without do_sample: transformers refuses to save this
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.float32, card="")
    again = load(tmp_path / "saved")
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    assert again.model.generation_config.temperature == 0.3
    assert again.model.generation_config.eos_token_id == loaded.model.generation_config.eos_token_id
    assert again.tokenizer.pad_token == loaded.tokenizer.pad_token


def test_saving_leaves_the_model_as_it_was(folder, tmp_path):
    loaded = load(folder())
    before = loaded.model.config.to_dict(), base_hash(loaded.path), logits(loaded)
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.bfloat16, card="")
    after = loaded.model.config.to_dict(), base_hash(loaded.path), logits(loaded)
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_nothing_is_left_of_a_save_that_failed(folder, tmp_path, monkeypatch):
    loaded = load(folder())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(RunError, match="No space left"):
        save(loaded.model, loaded.tokenizer, tmp_path / "out" / "saved", dtype=torch.float32, card="")
    assert not list((tmp_path / "out").iterdir())


_MEASURE = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from zoft.model import checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model = LlamaForCausalLM(LlamaConfig(vocab_size=60_000, hidden_size=512, intermediate_size=512, num_hidden_layers=1))
size = sum(p.numel() * 4 for p in model.parameters())
checkpoint.write_weights(Path(sys.argv[1]), {"warm": torch.ones(10**7)}, torch.bfloat16)
before = peak()
checkpoint.write_weights(Path(sys.argv[1]), dict(model.named_parameters()), torch.bfloat16)
print((peak() - before) / size)
"""


def test_saving_in_another_dtype_copies_no_model(tmp_path):
    result = subprocess.run([sys.executable, "-c", _MEASURE, tmp_path], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.1


# -- what cannot be loaded ----------------------------------------------------------------------------------------


def refuses(match: str, model: str | Path, **options: object) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        load(model, **options)
    message = str(caught.value)
    assert len(message) < 600 and "Traceback" not in message


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/model", "~/nowhere-at-all", "nowhere.gguf", "a/b/c/d", "so bad!"]
)
def test_path_that_does_not_exist(name):
    refuses("does not exist", name)


def test_a_path_object_is_never_a_hub_id():
    refuses("does not exist", Path("org/name"))


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refuses(r"notes\.txt is a file", tmp_path / "notes.txt")


def test_folder_without_config(tmp_path):
    refuses("no config.json", tmp_path)


def test_config_that_is_no_json(folder):
    path = folder()
    (path / "config.json").write_text("{")
    refuses("not a JSON object", path)


def test_folder_without_weights(folder):
    path = folder()
    (path / "model.safetensors").unlink()
    refuses("has no weights", path)


def test_a_pickle_is_not_opened(folder):
    path = folder()
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"whatever")
    refuses("does not open pickles", path)


def test_truncated_weights(folder):
    path = folder()
    data = (path / "model.safetensors").read_bytes()
    for cut in (len(data) - 1, 1000, 5, 0):
        (path / "model.safetensors").write_bytes(data[:cut])
        refuses("truncated", path)


def test_missing_shard(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path)
    checkpoint.weight_files(tmp_path)[1].unlink()
    refuses("missing", tmp_path)


def test_index_that_is_damaged(folder):
    path = folder()
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refuses("not an index", path)


def test_missing_weight_is_not_made_up(folder):
    path = folder()
    edit_weights(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(r"1 of the weights .* absent .*model\.layers\.1\.mlp\.up_proj\.weight", path)


def test_untied_head_is_not_made_up(folder):
    path = folder(tie_word_embeddings=False)
    edit_weights(path, lambda tensors: tensors.pop("lm_head.weight"))
    refuses("lm_head", path)


def test_weights_of_another_shape(folder):
    path = folder()
    edit_config(path, intermediate_size=128)
    refuses("another shape|mismatch", path)


def test_unknown_architecture(folder):
    path = folder()
    edit_config(path, model_type="nonesuch")
    refuses("'nonesuch' is unknown", path)


def test_remote_code_is_never_run(folder):
    path = folder()
    (path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit_config(path, auto_map=auto_map)
    assert type(load(path).model).__module__.startswith("transformers.")
    edit_config(path, model_type="evil")
    refuses("its own code", path)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_model_that_is_neither_causal_nor_masked(tmp_path, tokenizer, kind):
    small = {"vocab_size": 320, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**small, hidden_size=16, intermediate_size=16))
    else:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refuses(f"is a {kind} model .*expected a causal", tmp_path)


def test_quantised_checkpoint(folder):
    path = folder()
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
    refuses("quantised .gptq.", path)


def test_stored_dtype_that_is_none_of_ours(folder):
    path = folder()
    edit_weights(path, lambda tensors: tensors.update({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}))
    refuses("stored as F8_E4M3", path)


def test_missing_tokenizer(folder):
    path = folder()
    (path / "tokenizer.json").unlink()
    refuses("no tokenizer", path)


def test_damaged_tokenizer(folder):
    path = folder()
    (path / "tokenizer.json").write_text('{"version": "1.0"')
    refuses("tokenizer cannot be read", path)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "", "meta"])
def test_device_that_is_not_there(folder, device):
    refuses("no device", folder(), device=device)


def test_unknown_dtype(folder):
    refuses("no dtype 'int8'", folder(), dtype="int8")


def test_adapter_folder(folder):
    path = folder()
    (path / "config.json").unlink()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refuses("is an adapter, and its base model is not found: org/base is not a folder here", path)


# -- the Hub ------------------------------------------------------------------------------------------------------


def test_hub_snapshot_gives_folder_and_commit(folder, tmp_path, monkeypatch):
    """What a download leaves behind: a snapshot folder named by its commit; code and pickles are not asked for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    shutil.copytree(folder(), snapshot)
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load("org/name@main")
    assert (loaded.source, loaded.path, loaded.revision) == ("org/name@main", snapshot, commit)
    assert (asked["name"], asked["revision"]) == ("org/name", "main")
    files = ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "vocab.json"]
    unwanted = ["modeling.py", "pytorch_model.bin", "tf_model.h5", "original/model.safetensors", "x.gguf"]
    kept = huggingface_hub.utils.filter_repo_objects([*files, *unwanted], allow_patterns=asked["allow_patterns"])
    assert list(kept) == files


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (hub.RepositoryNotFoundError, "neither a folder here nor a public model"),
        (hub.GatedRepoError, "gated"),
        (hub.RevisionNotFoundError, "no revision 'v9'"),
        (hub.LocalEntryNotFoundError, "cannot be reached"),
        (hub.OfflineModeIsEnabled, "cannot be reached"),
        (hub.HfHubHTTPError, "could not be downloaded"),
        (ConnectionResetError, "could not be downloaded"),
    ],
)
def test_hub_errors_are_explained(monkeypatch, error, match):
    def download(*args: object, **options: object) -> str:
        raise error.__new__(error, "reason")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refuses(match, "org/name", revision="v9")


def test_uncached_model_offline(tmp_path):
    """The real client in offline mode with an empty cache."""
    code = "from zoft.model.load import ModelError, load\ntry: load('org/name')\nexcept ModelError as e: print(e)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "not in the Hub cache" in result.stdout
