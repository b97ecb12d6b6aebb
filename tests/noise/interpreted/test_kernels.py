"""Interpreted kernels against plain torch: updated weights bit for bit, perturbed ones up to the last bit."""

import copy

import pytest
import torch

from zoft.noise import fused
from zoft.noise.direction import NoiseDirection
from zoft.noise.table import ROW
from zoft.optim import MeZO, StepRecord, ZOFineTuner, ZOOptimizer, get_method
from zoft.optim.methods.lezo import Layers
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import Block, trainable_blocks
from zoft.weights.vectors import install_fp32_vectors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Several chunks, rows taken flat, rows so short that 2**16 of them are a chunk, vectors, a scalar, odd numbers.
SHAPES = [(), (300,), (3, 5, 7), (700, 900), (2, 70_000), (70_000, 3), (65_537,)]
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch):
    """Call it to take the plain path from then on."""
    return lambda: monkeypatch.setattr(fused, "supports", lambda weights: False)


def weights(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.nn.Parameter:
    numbers = scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return torch.nn.Parameter(numbers.to(dtype))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` in ``dtype``; to bfloat16 cut off, as the interpreter does where a GPU rounds to nearest."""
    if dtype == torch.bfloat16:
        values = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-2, -3e-2])
def test_a_range_is_perturbed_as_the_formula_says(shape, dtype, eps, plain) -> None:
    block = Block("w", weights(shape, dtype))
    z = NoiseDirection(3, 2, 1, table_dtype=dtype).values(block).view(-1)
    theta = block.parameter.detach().view(-1)
    expected = rounded(theta.float() + z * torch.tensor(eps * 0.7), dtype)
    for start, stop in ((0, block.size), (block.size // 3, block.size - block.size // 5)):
        direction = NoiseDirection(3, 2, 1, {"w": 0.7}, dtype)
        found = direction.perturb(block, start, stop, eps, torch.empty(stop - start, dtype=dtype))
        assert torch.equal(found, expected[start:stop])
    plain()
    twin = direction.perturb(block, start, stop, eps, torch.empty(stop - start, dtype=dtype))
    ulp = torch.finfo(dtype).eps * (theta.abs() + (eps * z).abs())[start:stop]
    assert ((found - twin).abs() <= ulp).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2000, 300), (70_000, 3), (20, 2500), (5, ROW)])
def test_rows_are_those_of_the_range(shape, dtype) -> None:
    block = Block("w", weights(shape, dtype))
    direction = NoiseDirection(3, 2, 1, {"w": 0.7}, dtype)
    whole = direction.perturb(block, 0, block.size, 1e-2, torch.empty(block.size, dtype=dtype)).view(shape)
    rows = torch.tensor([[0, shape[0] - 1, 3], [shape[0] // 2, 3, 1]])
    for ids in (rows, rows.int(), rows.T, rows[:0]):
        found = direction.perturb_rows(block, ids, 1e-2)
        assert found.shape == (*ids.shape, shape[1])
        assert torch.equal(found, whole[ids.long()])


def test_vectors_in_float32_read_a_table_in_half_precision(plain) -> None:
    block, direction = Block("w", weights((900,), torch.float32)), NoiseDirection(0, 0, table_dtype=torch.bfloat16)
    found = direction.perturb(block, 0, 900, 1e-2, torch.empty(900))
    z = NoiseDirection(0, 0).values(block)
    assert torch.equal(found, block.parameter.detach() + z * 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("probes", "weight_decay"), [(1, 0.0), (3, 0.25)])
@pytest.mark.parametrize("scale", [1.0, 2e-5])  # in float16 below the smallest normal number, too
def test_an_update_has_the_bits_of_the_plain_sweep(dtype, probes, weight_decay, scale, plain) -> None:
    """Blocks of every shape in one launch, one of them at an address that no wide load can take."""
    tensors = [weights(shape, dtype, scale) for shape in SHAPES]
    shifted = torch.cat([torch.zeros(1, dtype=dtype), weights((5000,), dtype, scale).detach()])[1:]
    tensors.append(torch.nn.Parameter(shifted.view(50, 100)))
    assert tensors[-1].data_ptr() % 16
    twins = [torch.nn.Parameter(tensor.detach().clone()) for tensor in tensors]
    losses = tuple((1.5 - 0.3 * probe, 1.25) for probe in range(probes))
    scales = tuple(0.0 if i == 2 else 0.3 + 0.2 * i for i in range(len(tensors)))  # one block is idle
    record = StepRecord(0, 3, lr=(1e-3 * scale,), eps=1e-3, losses=losses, scales=scales)
    for parameters in (tensors, twins):
        named = [(f"w{i}", parameter) for i, parameter in enumerate(parameters)]
        MeZO(named, lr=0.0, eps=1.0, probes=probes, weight_decay=weight_decay, seed=3).apply(record)
        plain()
    for tensor, twin in zip(tensors, twins, strict=True):
        assert torch.equal(tensor.view(-1).view(torch.uint8), twin.view(-1).view(torch.uint8))
    assert not torch.equal(tensors[3].detach(), weights(SHAPES[3], dtype, scale).detach())


def make(kind: str, model: torch.nn.Module, **settings) -> ZOOptimizer:
    if kind == "zoft":
        names = [block.name for block in trainable_blocks(model)]
        return ZOFineTuner(model, PertNN.fixed(names, torch.linspace(0.5, 2, len(names))), **settings)
    if kind == "lezo":
        return ZOOptimizer(model, directions=Layers(keep=0.5), **settings)
    method = get_method(kind)
    return method.optimizer(model, **settings, **method.make_parts({}, steps=3))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("mezo", torch.float32),
        *((kind, torch.bfloat16) for kind in ("mezo", "zoft", "lezo", "sparse-mezo", "mezo-momentum")),
    ],
)
def test_records_measured_with_the_kernels_replay_on_the_plain_path(kind, dtype, tiny_model, plain, monkeypatch):
    """Bit for bit; what is not MeZO's rule, or not along its directions, is updated by the plain sweep."""
    launched: list[int] = []
    update = fused.update
    monkeypatch.setattr(fused, "update", lambda *given: (launched.append(len(given[0])), update(*given)))
    model = tiny_model("llama", dtype=dtype)
    install_fp32_vectors(model)
    base, records = copy.deepcopy(model), []
    optimizer = make(kind, model, lr=1e-3, eps=1e-3, probes=2, seed=5, journal=records.append)
    for _ in range(2):
        optimizer.step(lambda: model(IDS, labels=IDS).loss)
    vectors = dtype != torch.float32
    assert len(launched) == (2 * (1 + vectors) if kind in ("mezo", "zoft", "lezo") else 0)
    plain()
    replayed = make(kind, base, lr=0.0, eps=1.0, probes=2, seed=5)
    for record in records:
        replayed.apply(record)
    for (name, tensor), other in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_losses_are_those_of_the_plain_path(tiny_model, plain) -> None:
    model = tiny_model("qwen2")
    optimizer = MeZO(model, lr=1e-3, eps=1e-2)
    fast = optimizer.measure(lambda: model(IDS, labels=IDS).loss)
    plain()
    torch.testing.assert_close(
        torch.tensor(fast.losses),
        torch.tensor(optimizer.measure(lambda: model(IDS, labels=IDS).loss).losses),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_probe_sends_one_table_for_all_blocks(tiny_model, monkeypatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr("zoft.noise.direction.to_device", lambda tensor, device: (sent.append(tensor), tensor)[1])
    model = tiny_model("llama")
    optimizer = MeZO(model, lr=1e-3, eps=1e-3, probes=2)
    optimizer.measure(lambda: model(IDS, labels=IDS).loss)
    assert len(sent) == 2 and all(len(rows) == len(optimizer.blocks) for rows in sent)


def test_master_weights_keep_the_plain_sweep(plain) -> None:
    both = [weights((30, 40), torch.bfloat16) for _ in range(2)]
    for parameter in both:
        optimizer = MeZO([("w", parameter)], lr=0.0, eps=1.0, master_weights=True)
        optimizer.apply(StepRecord(0, 0, lr=(1e-5,), eps=1e-3, losses=((1.5, 1.25),)))
        plain()
    assert torch.equal(*both)


def test_what_is_tried_before_the_first_step_finds_a_wrong_kernel(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert fused.triton_works.__wrapped__(cpu)
    monkeypatch.setattr(fused, "float_bits", lambda number: torch.tensor(1.001 * number).view(torch.int32).item())
    with pytest.warns(UserWarning, match=r"Triton does not work on cpu \(its results are wrong\): plain torch"):
        assert not fused.triton_works.__wrapped__(cpu)
    monkeypatch.setattr(fused, "perturb", lambda *given: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not fused.triton_works.__wrapped__(cpu)
