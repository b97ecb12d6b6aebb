"""Models that do not fit one device: same results as in memory; host weights reach the device that reads them."""

from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig
from torch._subclasses import FakeTensorMode

from tests.conftest import FAMILIES
from zoft.errors import ModelError
from zoft.model.adapters import LoRA, Prefix, attach
from zoft.model.adapters.prefix import wrap_with_prefix
from zoft.model.load import load
from zoft.model.offload import memory_mapped, placement_of_copy
from zoft.noise.direction import NoiseDirection
from zoft.weights.blocks import trainable_blocks
from zoft.weights.perturbed import PerturbedWeights
from zoft.weights.streamed import StreamedWeights, streaming

FAR = "meta"  # stands in for a GPU: a fake tensor there refuses to be mixed with one in host memory
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path: Path):
    def make(family: str, **overrides: object) -> Path:
        tiny_model(family, **overrides).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


def in_files(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are mapped from a file of `memory_mapped`."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "zoft-weights" in line:
            spans.append([int(end, 16) for end in line.split()[0].split("-")])
    return {
        name
        for name, parameter in model.named_parameters()
        if any(start <= parameter.data_ptr() < stop for start, stop in spans)
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the memory map of Linux")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_on_disk_are_files_mapped_into_memory(family, dtype, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = folder(family)
    before = set(tmp_path.iterdir())
    plain, disk = (load(path, dtype=dtype, device_map=device_map).model for device_map in (None, {"": "disk"}))
    assert in_files(disk) == {name for name, _ in disk.named_parameters()} and not in_files(plain)
    assert [name for name, _ in disk.named_parameters()] == [name for name, _ in plain.named_parameters()]  # ties
    assert all(torch.equal(a, b) for a, b in zip(disk.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(disk(IDS).logits, plain(IDS).logits)
        for parameter in disk.parameters():
            parameter.mul_(0)
        assert not disk(IDS).logits.any()  # what is written is what is read
    assert set(tmp_path.iterdir()) == before, "files were left behind"


def test_a_part_on_disk_and_the_rest_in_memory(folder):
    path = folder("llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    model = load(path, device_map=places | {"model.rotary_emb": "cpu", "lm_head": "disk"}).model
    expected = {name for name, _ in model.named_parameters() if "layers.0." in name or name.startswith("lm_head")}
    assert in_files(model) == expected
    assert torch.equal(model(IDS).logits, load(path).model(IDS).logits)


def test_invalid_device_maps_are_errors(folder):
    path = folder("llama")
    with pytest.raises(ModelError, match="device cpu and a device_map: give only one of the two"):
        load(path, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*device_map"):
        load(path, device_map="everywhere")
    with pytest.raises(ModelError, match=r"no module called 'modle'; its modules are model, .*lm_head"):
        load(path, device_map="=cpu,modle=disk")
    with pytest.raises(ModelError, match=r"lm_head.weight has no place; name its module, or '' for all other modules"):
        load(path, device_map={"model": "disk"})
    message = r"model.embed_tokens.weight is to be on disk and lm_head.weight, which is the same tensor, on cpu; give"
    with pytest.raises(ModelError, match=message):
        load(folder("qwen2"), device_map="=cpu,model=disk")


def test_mapped_numbers_are_the_same_and_writable(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensor = torch.randn(3, 5).bfloat16()
    copy = memory_mapped(tensor)
    assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
    copy[1] = 0
    assert not torch.equal(copy, tensor) and not copy[1].any()
    assert not list(tmp_path.iterdir())


# -- a device that is not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_host_memory_reach_a_gpu_perturbed_or_not(family, tiny_model):
    """Fake tensors have no numbers, but every function that mixes devices is an error."""
    model = tiny_model(family, tie_word_embeddings=False)
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    looked_up = {id(module.weight) for module in embeddings}  # their rows need numbers
    blocks = [block for block in trainable_blocks(model) if id(block.parameter) not in looked_up]
    for module in embeddings:
        module.register_forward_hook(lambda module, inputs, output: output.to(FAR))
    NoiseDirection(0, 0).values(blocks[0])  # the noise table is made of numbers, too

    def logits() -> torch.Tensor:
        return model(IDS, position_ids=torch.arange(12)[None].expand(2, 12)).logits

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with pytest.raises(RuntimeError, match="device"):
            logits()
        with StreamedWeights():
            plain = logits()
            with PerturbedWeights(blocks, NoiseDirection(0, 0), 1e-3) as mode:
                perturbed = logits()
    for found in (plain, perturbed):
        assert found.device.type == FAR and found.shape == (2, 12, 320)
    assert mode.used == {block.name for block in blocks}


@pytest.mark.parametrize("far", ["model.layers.0", "model.layers.1.self_attn.v_proj", "lm_head", "model.rotary_emb"])
@pytest.mark.parametrize("adapter", [LoRA(), Prefix()], ids=["lora", "prefix"])
def test_adapters_reach_a_gpu_from_where_they_lie(tiny_model, adapter, far):
    """Of a model with a part on the device, LoRA lies beside its layers, and a prefix in host memory."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.to(FAR))
    model.get_submodule(far).to(FAR)
    wrapped = attach(model, adapter, seed=0) if adapter.mode == "lora" else with_any_prefix(model)
    blocks = trainable_blocks(wrapped)
    places = {block.name: block.parameter.device.type for block in blocks}
    assert all((place == FAR) == (name.startswith(far)) for name, place in places.items())
    near = [block for block in blocks if block.parameter.device.type == "cpu"]
    NoiseDirection(0, 0).values(near[0])
    ids = {"input_ids": IDS, "position_ids": torch.arange(12)[None].expand(2, 12) + 5}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with pytest.raises(RuntimeError, match="device"):
            wrapped(**ids)
        with streaming(wrapped), PerturbedWeights(near, NoiseDirection(0, 0), 1e-3) as mode:
            logits = wrapped(**ids).logits
    assert logits.device.type == FAR and logits.shape == (2, 12, 320)
    assert mode.used == {block.name for block in near}


def with_any_prefix(model: torch.nn.Module) -> torch.nn.Module:
    """Its start is activations, which need numbers."""
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_layers=2, num_attention_heads=2, token_dim=16
    )
    return wrap_with_prefix(model, config, torch.randn(5, 64))


def test_lookups_and_moves_keep_their_direction():
    table, rows = torch.randn(7, 3), torch.tensor([1, 5])
    with FakeTensorMode(allow_non_fake_inputs=True), StreamedWeights():
        ids = rows.to(FAR)
        assert torch.nn.functional.embedding(ids, table).device.type == "cpu"
        assert table[ids].device.type == "cpu"
        assert (table.to(FAR) @ table.T).device.type == FAR
        stored = torch.zeros(7, 3)
        assert stored.copy_(table.to(FAR)).device.type == "cpu"


def test_only_a_model_split_between_host_and_device_is_streamed(tiny_model):
    model = tiny_model("llama")
    assert not isinstance(streaming(model), StreamedWeights)
    model.model.rotary_emb.to(FAR)  # all weights in host memory, and all computing on the device
    assert isinstance(streaming(model), StreamedWeights)
    assert not isinstance(streaming(model.to(FAR)), StreamedWeights)


def test_a_second_copy_is_on_none_of_several_devices(tiny_model, folder):
    model = tiny_model("llama")
    assert placement_of_copy(model) == (torch.device("cpu"), None)
    model.lm_head.to(FAR)
    assert placement_of_copy(model) == (torch.device("cpu"), None)
    assert placement_of_copy(model.to(FAR)) == (torch.device(FAR), None)
    places = {"model": "cpu", "lm_head": "disk"}
    assert placement_of_copy(load(folder("llama"), device_map=places).model) == (torch.device("cpu"), {"": "disk"})
