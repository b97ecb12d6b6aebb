"""Adapters on disk: peft's format, the base model that they name, and invalid files."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.conftest import FAMILIES
from zoft.errors import ModelError
from zoft.model.adapters import Adapter, LoRA, Prefix, adapter_of
from zoft.model.architecture import is_masked
from zoft.model.fingerprint import base_hash, fingerprint
from zoft.model.load import Loaded, load, restore_, save
from zoft.model.sources import resolve
from zoft.weights.blocks import trainable_blocks

ADAPTERS = [pytest.param(LoRA(rank=4), id="lora"), pytest.param(Prefix(tokens=3), id="prefix")]


@pytest.fixture
def base(tiny_model, tokenizer, tmp_path: Path):
    def make(family: str = "llama") -> Path:
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def trained(base: Path, adapter: Adapter, **options) -> Loaded:
    """An adapter on ``base`` whose every weight has moved."""
    loaded = load(base, adapter=adapter, **options)
    for block in trainable_blocks(loaded.model):
        block.parameter.data += 0.1 * torch.randn(block.shape, generator=torch.Generator().manual_seed(2))
    return loaded


def saved(loaded: Loaded, folder: Path) -> Path:
    save(loaded.model, loaded.tokenizer, folder, dtype=loaded.stored_dtype, card="---\n---\n")
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 77, 3]]), attention_mask=torch.ones(1, 4, dtype=torch.long)).logits


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_saved(base, tiny_model, tmp_path, family, adapter) -> None:
    loaded = trained(base(family), adapter)
    folder = saved(loaded, tmp_path / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base(family))
    by_peft = PeftModel.from_pretrained(tiny_model(family), folder).eval()
    assert torch.equal(logits(by_peft), logits(loaded.model))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_is_loaded_with_the_base_it_names(base, tmp_path, adapter, dtype) -> None:
    loaded = trained(base(), adapter, dtype=dtype)
    folder = saved(loaded, tmp_path / "adapter")
    state = torch.get_rng_state()
    again = load(folder, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert adapter_of(again.model) == adapter_of(loaded.model)
    assert again.path == base() and again.base == str(base()) and again.source == str(folder)
    first, second = trainable_blocks(loaded.model), trainable_blocks(again.model)
    assert [block.name for block in first] == [block.name for block in second]
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(first, second, strict=True))
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_masked_models_keep_their_adapter(masked_folder, tmp_path) -> None:
    loaded = trained(masked_folder("roberta"), LoRA())
    again = load(saved(loaded, tmp_path / "adapter"))
    assert is_masked(again.model) and torch.equal(logits(again.model), logits(loaded.model))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_saved_again_is_the_same(base, tmp_path, adapter) -> None:
    first = saved(trained(base(), adapter), tmp_path / "first")
    second = saved(load(first), tmp_path / "second")
    assert json.loads((first / "adapter_config.json").read_text()) == json.loads(
        (second / "adapter_config.json").read_text()
    )
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_its_fingerprint_is_that_of_its_base(base, tmp_path, adapter) -> None:
    loaded = trained(base(), adapter)
    found, plain = fingerprint(saved(loaded, tmp_path / "adapter")), fingerprint(base())
    assert (found.base_hash, found.architecture_hash, found.files) == (
        plain.base_hash,
        plain.architecture_hash,
        plain.files,
    )
    assert found.base_hash == base_hash(resolve(tmp_path / "adapter").path)
    assert [(b.name, b.shape) for b in found.blocks] == [(b.name, b.shape) for b in trainable_blocks(loaded.model)]
    assert found.adapter is not None and found.adapter["kind"] == adapter.mode
    assert found.parameters == sum(block.size for block in trainable_blocks(loaded.model)) < plain.parameters
    assert plain.adapter is None


def test_adapters_return_to_their_start(base) -> None:
    for adapter in (LoRA(), Prefix()):
        loaded = load(base(), adapter=adapter)
        before = [block.parameter.detach().clone() for block in trainable_blocks(loaded.model)]
        for block in trainable_blocks(loaded.model):
            block.parameter.data += 1
        restore_(loaded)
        after = trainable_blocks(loaded.model)
        assert all(torch.equal(start, block.parameter) for start, block in zip(before, after, strict=True))


def test_adapters_made_by_peft_itself_are_read(base, tiny_model, tmp_path) -> None:
    """With dropout, which is off, other scaling, and a prefix that peft drew and projected."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=3, lora_dropout=0.5, use_rslora=True, target_modules=["k_proj"])
    wrapped = get_peft_model(tiny_model("llama"), config)
    wrapped.peft_config["default"].init_lora_weights = True
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    wrapped.peft_config["default"].base_model_name_or_path = str(base())
    wrapped.save_pretrained(tmp_path / "lora")
    assert torch.equal(logits(load(tmp_path / "lora").model), logits(wrapped.eval()))

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
    wrapped = get_peft_model(tiny_model("llama"), config).eval()
    wrapped.peft_config["default"].base_model_name_or_path = str(base())
    wrapped.save_pretrained(tmp_path / "prefix")
    read = load(tmp_path / "prefix")
    torch.testing.assert_close(logits(read.model), logits(wrapped))
    assert torch.equal(logits(load(saved(read, tmp_path / "again")).model), logits(read.model))


def test_a_base_is_found_beside_its_adapter(base, tmp_path) -> None:
    folder = saved(trained(base(), LoRA()), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../llama"}))
    assert resolve(folder).path.resolve() == base().resolve()


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(base, tmp_path):
    """``broken(**changes)``: a LoRA adapter whose configuration says something else."""

    def make(**changes) -> Path:
        folder = tmp_path / "adapter"
        if not folder.exists():
            saved(trained(base(), LoRA()), folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def test_a_base_that_is_gone_or_not_named(broken) -> None:
    with pytest.raises(
        ModelError, match=r"is an adapter, and its base model is not found: /nowhere/base does not exist"
    ):
        load(broken(base_model_name_or_path="/nowhere/base"))
    with pytest.raises(ModelError, match=r"adapter_config.json has no base_model_name_or_path"):
        load(broken(base_model_name_or_path=None))
    folder = broken()
    (folder / "adapter_config.json").write_text("[1")
    with pytest.raises(ModelError, match=r"adapter_config.json is not a JSON object"):
        load(folder)


def test_an_adapter_on_an_adapter(base, broken, tmp_path) -> None:
    first = saved(trained(base(), Prefix()), tmp_path / "first")
    with pytest.raises(ModelError, match=r"is an adapter on another adapter, .*first; merge that into its base first"):
        load(broken(base_model_name_or_path=str(first)))


def test_another_kind_of_adapter(broken) -> None:
    with pytest.raises(ModelError, match=r"is an adapter of the type 'IA3'; zoft supports LORA and PREFIX_TUNING"):
        load(broken(peft_type="IA3"))


def test_pickled_weights_are_not_opened(broken) -> None:
    folder = broken()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors; zoft does not open pickles"):
        load(folder)


def test_weights_that_do_not_fit(base, broken, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"does not fit its base model: .*size mismatch"):
        load(broken(r=4))
    folder = broken(r=8)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit its base model: Found missing adapter keys"):
        load(folder)
    prefix = saved(trained(base(), Prefix()), tmp_path / "prefix")
    save_file({"prompt_embeddings": torch.zeros(2, 3)}, prefix / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"prompt_embeddings is \[2, 3\], expected \[5, 64\]"):
        load(prefix)


def test_a_new_adapter_on_an_adapter(base, tmp_path) -> None:
    folder = saved(trained(base(), LoRA()), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is an adapter already; it is trained .*: leave out --lora"):
        load(folder, adapter=LoRA())
