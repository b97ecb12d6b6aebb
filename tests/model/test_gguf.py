import ast
import contextlib
import io
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoft.errors import ModelError
from zoft.model import checkpoint, fingerprint
from zoft.model import gguf as zoft_gguf
from zoft.model.load import load, save
from zoft.model.sources import resolve

gguf = pytest.importorskip("gguf")

_TENSORS = {  # names of a Llama in a GGUF file
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp stores queries and keys with the two halves of each head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, tokenizer) -> Path:
    """Write a tiny Llama as a float32 GGUF file, the way llama.cpp's converter does."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary["vocab"]) - 3))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if "q_proj" in name:
            weight = _permuted(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = _permuted(weight, config.num_key_value_heads)
        writer.add_tensor(_gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_TENSORS[part]}.weight"
    return f"{_TENSORS[stem]}.weight"


@pytest.fixture
def tiny_gguf(tiny_model, tokenizer, tmp_path):
    """``tiny_gguf(**config)``: a tiny Llama as a GGUF file."""

    def make(**overrides: object) -> Path:
        model = tiny_model("llama", intermediate_size=64, **overrides)
        return write_gguf(tmp_path / "tiny.gguf", model, tokenizer)

    return make


@pytest.mark.parametrize("tie", [True, False])
def test_conversion_holds_the_files_weights_rounded_once(tiny_model, tiny_gguf, tie):
    folder = resolve(tiny_gguf(tie_word_embeddings=tie)).path
    stored = load_file(folder / "model.safetensors")
    original = dict(tiny_model("llama", tie_word_embeddings=tie).named_parameters())
    assert stored.keys() == original.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, original[name].data.bfloat16()), name


def test_converted_model_computes_what_the_original_does(tiny_model, tiny_gguf, tokenizer):
    loaded = load(tiny_gguf(tie_word_embeddings=True), dtype="fp32")
    original = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True).float()
    encoded = loaded.tokenizer("the film was great", return_tensors="pt").input_ids
    assert encoded.tolist() == [tokenizer("the film was great").input_ids]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(encoded).logits, original(encoded).logits, rtol=1e-5, atol=1e-6)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert {b.dtype for n, b in loaded.model.named_buffers() if "inv_freq" in n} == {torch.float32}


def test_chat_template_and_special_tokens_are_kept(tiny_gguf):
    tokenizer = load(tiny_gguf()).tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_conversion_says_what_it_was_made_from(tiny_gguf):
    file = tiny_gguf()
    record = json.loads((resolve(file).path / zoft_gguf.RECORD_FILE).read_text())
    assert record["source"] == {
        "name": "tiny.gguf",
        "size": file.stat().st_size,
        "sha256": fingerprint.file_digest(file),
    }
    assert record["dtype"] == "bfloat16" and set(record["versions"]) == {"zoft", "transformers", "gguf"}


def test_converts_once(tiny_gguf, monkeypatch, tmp_path):
    file = tiny_gguf()
    folder = resolve(file).path
    monkeypatch.setattr(zoft_gguf, "read_gguf", lambda file: pytest.fail("converted again"))
    assert resolve(file).path == folder
    copy = tmp_path / "elsewhere" / "tiny.gguf"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert resolve(copy).path == folder  # the content counts, not the place


def test_changed_file_is_converted_again(tiny_gguf):
    file = tiny_gguf()
    first = fingerprint.fingerprint(file)
    data = bytearray(file.read_bytes())
    data[-2] ^= 64  # high bits of the last weight
    file.write_bytes(data)
    second = fingerprint.fingerprint(file)
    assert first.base_hash != second.base_hash and first.architecture_hash == second.architecture_hash


def test_two_conversions_at_once(tiny_gguf, monkeypatch):
    """Another process finishes while this one converts: its folder is used, and nothing else is left."""
    file, read = tiny_gguf(), zoft_gguf.read_gguf

    def read_slowly(file):
        result = read(file)
        monkeypatch.setattr(zoft_gguf, "read_gguf", read)
        monkeypatch.setattr("os.getpid", lambda: 1)  # the other process
        other.start()
        other.join()
        monkeypatch.undo()
        return result

    home = zoft_gguf.home()
    folders: list[Path] = []
    other = threading.Thread(target=lambda: folders.append(zoft_gguf.convert(file)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoft_gguf, "home", lambda: home)
        monkeypatch.setattr(zoft_gguf, "read_gguf", read_slowly)
        folders.append(zoft_gguf.convert(file))
    assert folders[0] == folders[1] and [folders[0]] == list((home / "models").iterdir())
    assert checkpoint.weight_files(folders[0])


_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path({mark!r}).write_text("ran")
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""
_AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
}


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_code_beside_a_model_is_never_run_whatever_stdin_says(
    tiny_gguf, model_folder, tmp_path, monkeypatch, capfd, form, model_type
):
    """transformers asked "Do you wish to run the custom code? [y/N]" beside a GGUF file, and ran it."""
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked: {question}"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    folder = tmp_path if form == "gguf" else model_folder
    file = tiny_gguf()
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        path = folder / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, "model_type": model_type, "auto_map": _AUTO_MAP}))
    (folder / "code.py").write_text(_CODE.format(mark=str(tmp_path / "ran")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(_CODE.format(mark=str(tmp_path / "ran")))
    with contextlib.suppress(ModelError):
        loaded = load(file if form == "gguf" else folder)
        assert type(loaded.model).__module__.startswith("transformers.models.llama")
    assert not (tmp_path / "ran").exists()
    out = capfd.readouterr()
    assert "custom code" not in out.out + out.err


def test_what_lies_beside_a_gguf_is_not_read(tiny_gguf, tmp_path):
    """Not an adapter, which transformers would load the base of, nor another model's configuration."""
    file = tiny_gguf()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base", "peft_type": "LORA"}')
    (tmp_path / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    model = load(file).model
    assert model.generation_config.suppress_tokens is None
    assert model.config.model_type == "llama"


def test_every_loader_of_transformers_is_told_to_run_no_code():
    """Each call of from_pretrained or from_config on an ``Auto`` class in zoft passes trust_remote_code=False."""
    loose, calls = [], 0
    for path in Path(zoft_gguf.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in ("from_pretrained", "from_config") and "auto" in owner.lower():
                calls += 1
                told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if told.get("trust_remote_code") != "False":
                    loose.append(f"{path.name}:{node.lineno}")
    assert not loose and calls >= 6


def test_gguf_born_model_saves(tiny_gguf, tmp_path):
    loaded = load(tiny_gguf())
    save(loaded.model, loaded.tokenizer, tmp_path / "saved", dtype=torch.bfloat16, card="")
    again = load(tmp_path / "saved")
    assert fingerprint.base_hash(again.path) == fingerprint.base_hash(loaded.path)
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file"])
def test_file_that_is_not_gguf(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("kept", [8, 200, 0.3, 0.99])
def test_torn_gguf(tiny_gguf, zoft_home, kept):
    file = tiny_gguf()
    data = file.read_bytes()
    file.write_bytes(data[: kept if kept > 1 else int(len(data) * kept)])
    with pytest.raises(ModelError, match="cannot be converted"):
        load(file)
    assert not (zoft_home / "models").exists()


def test_unknown_gguf_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonesuch")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="nonesuch"):
        load(tmp_path / "odd.gguf")


def test_package_gguf_is_absent(tiny_gguf, monkeypatch):
    file = tiny_gguf()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"zoft\[gguf\]"):
        load(file)


def test_smollm2(smollm2_gguf):
    """The real thing, once: dequantised weights that know a capital, label words of one token, a chat template."""
    loaded = load(smollm2_gguf)
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert len(list(loaded.model.parameters())) == 272 and loaded.stored_dtype == torch.bfloat16
    words = [" great", " terrible", " Yes", " No", " positive", " negative"]
    ids = [loaded.tokenizer(word).input_ids for word in words]
    assert all(len(i) == 1 for i in ids) and ids[:2] == [[1109], [13321]]
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    out = loaded.model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert loaded.tokenizer.decode(out[0]) == "The capital of France is Paris"


def _zeroed(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500] + bytes(500))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])


@pytest.mark.parametrize("damage", [_zeroed, _cut, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_conversion_is_converted_again(tiny_gguf, name, damage):
    file = tiny_gguf()
    folder = resolve(file).path
    whole = (folder / name).read_bytes()
    damage(folder / name)
    assert resolve(file).path == folder and (folder / name).read_bytes() == whole


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("{"), lambda file: file.write_text("[]")])
def test_a_conversion_without_its_record_is_converted_again(tiny_gguf, damage):
    file = tiny_gguf()
    record = resolve(file).path / zoft_gguf.RECORD_FILE
    whole = json.loads(record.read_text())
    damage(record)
    resolve(file)
    assert json.loads(record.read_text()) == whole
    size, digest = whole["files"]["model.safetensors"]
    assert size == (record.parent / "model.safetensors").stat().st_size
    assert digest == fingerprint.file_digest(record.parent / "model.safetensors")


def test_a_conversion_of_an_earlier_release_is_used(tiny_gguf, monkeypatch):
    """Its record names no files; one that is cut is converted again, too."""
    file = tiny_gguf()
    folder = resolve(file).path
    record = json.loads((folder / zoft_gguf.RECORD_FILE).read_text())
    del record["files"]
    (folder / zoft_gguf.RECORD_FILE).write_text(json.dumps(record))
    with monkeypatch.context() as patch:
        patch.setattr(zoft_gguf, "read_gguf", lambda file: pytest.fail("converted again"))
        assert resolve(file).path == folder
    _cut(folder / "model.safetensors")
    assert "files" in json.loads((resolve(file).path / zoft_gguf.RECORD_FILE).read_text())


def test_a_home_that_cannot_be_written_is_no_reason_to_stop(tiny_gguf, zoft_home, monkeypatch):
    file = tiny_gguf()
    zoft_home.rmdir()
    zoft_home.write_text("a file in place of the folder")
    folder = resolve(file).path
    assert load(file).path == folder and not folder.is_relative_to(zoft_home)
    monkeypatch.setattr(zoft_gguf, "read_gguf", lambda file: pytest.fail("converted again in the same process"))
    assert resolve(file).path == folder
