"""ZO Fine-tuner: untrained it is MeZO bit for bit; its scales go into the record, which replays without a tuner."""

import copy

import numpy as np
import pytest
import torch

from tests.noise.test_noise import reference_z
from zoft.errors import ConfigError, ModelError, RunError
from zoft.optim import METHODS, MeZO, Scales, StepRecord, ZOFineTuner
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import full_sizes, normalise, touched_sizes, untied_embedding
from zoft.weights.blocks import statistics, trainable_blocks

IDS = torch.arange(3, 27).view(2, 12)
SETTINGS = {"lr": 1e-3, "eps": 1e-3, "seed": 4}


def trained(names: list[str], seed: int = 0) -> PertNN:
    """A tuner with random last layers: scales that differ by block and change from step to step."""
    net = PertNN(names)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for level in net.levels:
            level.w2.normal_(std=0.1, generator=generator)
            level.b2.normal_(std=0.3, generator=generator)
    return net


def run(model: torch.nn.Module, optimizer: MeZO, steps: int) -> list[StepRecord]:
    records: list[StepRecord] = []
    optimizer.journal = records.append
    for _ in range(steps):
        optimizer.step(lambda: model(IDS, labels=IDS).loss)
    return records


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_tuner_is_mezo_bit_for_bit(dtype: torch.dtype, tiny_model) -> None:
    plain, tuned = tiny_model("llama", dtype), tiny_model("llama", dtype)
    run(plain, MeZO(plain, **SETTINGS), 5)
    names = [block.name for block in trainable_blocks(tuned)]
    records = run(tuned, ZOFineTuner(tuned, PertNN(names), **SETTINGS), 5)
    assert same(plain, tuned)
    assert all(set(record.scales or ()) == {1.0} for record in records)


def test_a_step_follows_the_formula(tiny_model) -> None:
    """The second step, in float64 beside the optimizer: s from the moved weights and the first step's losses."""
    model = tiny_model("opt", torch.float64)
    names = [block.name for block in trainable_blocks(model)]
    net = trained(names)
    optimizer = ZOFineTuner(model, net, refresh=1, **SETTINGS)
    (first,) = run(model, optimizer, 1)
    before = Recurrent(*first.losses[0], torch.tensor(first.scales, dtype=torch.float64))
    blocks = trainable_blocks(model)
    sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
    s = normalise(net(statistics(blocks), before), sizes).float().double()
    u = [s[i] * torch.from_numpy(reference_z(4, 1, 0, b.name, b.shape)) for i, b in enumerate(blocks)]
    twin = copy.deepcopy(model)

    def loss_at(distance: float) -> float:
        for parameter, block, direction in zip(twin.parameters(), blocks, u, strict=True):
            parameter.data = block.parameter.data + distance * direction
        with torch.no_grad():
            return float(twin(IDS, labels=IDS).loss)

    slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3
    loss_at(-1e-3 * slope)  # leaves the twin where the step goes
    (record,) = run(model, optimizer, 1)
    torch.testing.assert_close(torch.tensor(record.scales, dtype=torch.float64), s, rtol=0, atol=0)
    assert record.slopes[0] == pytest.approx(slope, rel=1e-8)
    for parameter, moved in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, moved, rtol=1e-9, atol=1e-12)


def test_replaying_needs_no_tuner(tiny_model) -> None:
    model = tiny_model("gemma", torch.bfloat16)
    base = copy.deepcopy(model)
    names = [block.name for block in trainable_blocks(model)]
    records = run(model, ZOFineTuner(model, trained(names), **SETTINGS, probes=2), 4)
    assert len({record.scales for record in records}) == 4
    replayed = MeZO(base, **SETTINGS)
    for record in records:
        replayed.apply(record)
    assert same(model, base)


def test_the_recurrent_state_resumes(tiny_model) -> None:
    unbroken, broken = tiny_model("llama"), tiny_model("llama")
    names = [block.name for block in trainable_blocks(unbroken)]
    records = run(unbroken, ZOFineTuner(unbroken, trained(names), **SETTINGS), 6)
    first = ZOFineTuner(broken, trained(names), **SETTINGS)
    run(broken, first, 3)
    from_state, from_record = (ZOFineTuner(copy.deepcopy(broken), trained(names), **SETTINGS) for _ in range(2))
    from_state.load_state_dict(first.state_dict())
    from_record.observe(records[2])
    for optimizer in (from_state, from_record):
        assert optimizer.memory["before"] == first.memory["before"]


def test_a_skipped_step_leaves_the_recurrent_state(tiny_model) -> None:
    model = tiny_model("llama")
    optimizer = ZOFineTuner(model, trained([block.name for block in trainable_blocks(model)]), **SETTINGS)
    before = dict(optimizer.memory)
    optimizer.verify(lambda: 0.0)
    record = optimizer.measure(lambda: float("nan"))
    optimizer.apply(record)
    assert optimizer.memory == before


def test_blocks_that_the_tuner_does_not_know_have_sigma_one(tiny_model) -> None:
    model = tiny_model("llama")
    known = [block.name for block in trainable_blocks(model)][:3]
    (record,) = run(model, ZOFineTuner(model, trained(known), **SETTINGS), 1)
    assert record.scales is not None
    unknown = record.scales[3:]
    assert len(set(unknown)) == 1 and unknown[0] not in record.scales[:3]


def test_the_tuner_is_frozen_and_must_fit(tiny_model) -> None:
    model = tiny_model("llama")
    net = trained([block.name for block in trainable_blocks(model)])
    before = copy.deepcopy(net.state_dict())
    run(model, ZOFineTuner(model, net, **SETTINGS), 2)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(ModelError, match=r"network for 'nowhere'"):
        ZOFineTuner(model, trained(["nowhere"]), **SETTINGS)


def paper_sigma(net: PertNN, model: torch.nn.Module, before: np.ndarray, losses: tuple[float, float]) -> np.ndarray:
    """methods 5.1 in float64 numpy: x = [mean, var, L+, L-, sigma of the step before], |w2 . tanh(W1 x + b1) + b2|."""
    (level,) = net.levels
    w1, b1, w2, b2 = (getattr(level, part).double().numpy() for part in ("w1", "b1", "w2", "b2"))
    weights = [parameter.detach().double().numpy() for parameter in model.parameters()]
    x = np.array([[w.mean(), w.var(), *losses, s] for w, s in zip(weights, before, strict=True)])
    return np.abs([b2[i] + w2[i] @ np.tanh(w1[i] @ x[i] + b1[i]) for i in range(len(x))])


def test_the_paper_form_hands_on_the_raw_sigma(tiny_model) -> None:
    """Six steps beside a plain recomputation: sigma of every step from the raw sigma, not the normalised, before."""
    model = tiny_model("qwen2")
    blocks = trainable_blocks(model)
    net = PertNN.paper([block.name for block in blocks], seed=2)
    for level in net.levels:
        level.w1.data[:, :, 4] *= 5  # so that it matters what is handed on
    sizes = np.array([block.size for block in blocks], dtype=float)
    optimizer = ZOFineTuner(model, net, refresh=1, **SETTINGS | {"lr": 1e-2, "probes": 2})
    sigma, losses = np.ones(len(blocks)), (0.0, 0.0)
    seen = []
    for _ in range(6):
        sigma = paper_sigma(net, model, sigma, losses)
        k = np.sqrt(sizes.sum() / (sizes * sigma**2).sum())
        (record,) = run(model, optimizer, 1)
        np.testing.assert_allclose(record.scales, k * sigma, rtol=2e-5)
        np.testing.assert_allclose(record.extra["k"], k, rtol=2e-5)
        losses = tuple(np.mean(record.losses, axis=0))
        seen.append(k * sigma)
        assert abs(k - 1) > 0.5
    normalised_on = paper_sigma(net, model, k * sigma, losses)
    assert np.abs(normalised_on / paper_sigma(net, model, sigma, losses) - 1).max() > 0.05
    assert np.ptp(seen, axis=0).max() > 1e-3


def test_the_paper_form_resumes_from_its_record(tiny_model) -> None:
    model = tiny_model("llama")
    net = PertNN.paper([block.name for block in trainable_blocks(model)])
    optimizer = ZOFineTuner(model, net, refresh=1, **SETTINGS)
    records = run(model, optimizer, 3)
    twin = copy.deepcopy(model)
    resumed = ZOFineTuner(twin, net, refresh=1, **SETTINGS)
    resumed.observe(records[-1])
    resumed.step_number = 3
    assert run(twin, resumed, 2) == run(model, optimizer, 2)
    assert same(twin, model)


@pytest.mark.parametrize(
    ("damage", "block"),
    [("b2", 3), ("w1", 5), ("weights", 2)],
)
def test_a_scale_that_is_not_finite_names_the_block(tiny_model, damage: str, block: int) -> None:
    model = tiny_model("llama")
    names = [one.name for one in trainable_blocks(model)]
    net = PertNN(names, levels=("block",))
    if damage == "b2":
        net.levels[0].b2.data[block] = 200.0  # exp overflows
    elif damage == "w1":
        net.levels[0].w1.data[block] = float("nan")
    else:
        list(model.parameters())[block].data.view(-1)[0] = float("inf")
    optimizer = ZOFineTuner(model, net, **SETTINGS)
    optimizer.verify(lambda: 0.0)
    with pytest.raises(RunError, match=rf"step 0: the tuner gives block '{names[block]}' the scale (inf|nan)"):
        optimizer.measure(lambda: 0.0)


def test_effective_sizes_are_asked_for_at_every_step(tiny_model) -> None:
    """An untied embedding counts by the rows of the batch: the scales change with the batch alone."""
    model = tiny_model("llama", tie_word_embeddings=False)
    blocks = trainable_blocks(model)
    name = untied_embedding(model, blocks)
    assert name == "model.embed_tokens.weight"
    net = trained([block.name for block in blocks])
    net.effective_size = "touched_rows"
    with pytest.raises(ConfigError, match=r"give sizes=.*zoft\.tuner\.normalisation\.touched_sizes"):
        ZOFineTuner(model, net, **SETTINGS)
    batches = [[3, 3, 4], list(range(50))]
    rows: list[int] = []
    optimizer = ZOFineTuner(model, net, sizes=lambda: touched_sizes(blocks, name, rows), **SETTINGS | {"lr": 0.0})
    for batch, touched in zip(batches, (2, 50), strict=True):
        rows[:] = batch
        (record,) = run(model, optimizer, 1)
        sizes = full_sizes(blocks)
        sizes[0] = touched * 32
        squares = torch.tensor(record.scales, dtype=torch.float64).square()
        assert float((sizes * squares).sum() / sizes.sum()) == pytest.approx(1, rel=1e-6)


def test_a_tied_embedding_counts_whole(tiny_model) -> None:
    model = tiny_model("qwen2")
    blocks = trainable_blocks(model)
    assert untied_embedding(model, blocks) is None
    assert torch.equal(touched_sizes(blocks, None, [1, 2]), full_sizes(blocks))


def test_records_of_a_tuned_run_are_applied_without_its_tuner(tiny_model) -> None:
    live, replayed = tiny_model("llama"), tiny_model("llama")
    names = [block.name for block in trainable_blocks(live)]
    records = run(live, ZOFineTuner(live, trained(names), **SETTINGS), 3)
    optimizer = METHODS["zoft"].make(replayed, **SETTINGS)
    for record in records:
        optimizer.apply(record)
    assert METHODS["zoft"].tuned and not METHODS["mezo"].tuned
    assert type(optimizer.scales) is Scales and same(live, replayed)


@pytest.mark.parametrize("through", ["state", "records"])
def test_mean_and_variance_are_read_now_and_then_and_resume(tiny_model, through: str) -> None:
    """Read at steps 0, 3, 6; a run that goes on after step 5, from its state or its records, has those of step 3."""
    model = tiny_model("llama")
    net = trained([block.name for block in trainable_blocks(model)])
    settings = SETTINGS | {"lr": 1e-2, "refresh": 3}
    optimizer = ZOFineTuner(model, net, **settings)
    read, records = [], []
    for step in range(8):
        read.append(statistics(trainable_blocks(model)))
        if step == 5:
            state, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
        records += run(model, optimizer, 1)
        held = torch.stack([optimizer.state[p]["statistics"] for p in model.parameters()])
        assert torch.equal(held, read[step - step % 3])
        assert not torch.equal(read[step], read[0]) or step == 0
    if through == "state":
        resumed = ZOFineTuner(twin, net, **settings)
        resumed.load_state_dict(state)
    else:
        twin = tiny_model("llama")
        resumed = ZOFineTuner(twin, net, **settings)
        for record in records[:5]:
            resumed.apply(record)
    run(twin, resumed, 3)
    assert same(twin, model)
