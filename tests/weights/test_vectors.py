"""Float32 vectors in a half-precision model, against the plain float32 model."""

import copy

import pytest
import torch

from tests.conftest import FAMILIES, MASKED
from zoft.weights.vectors import install_fp32_vectors

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES + MASKED)
@torch.no_grad()
def test_vectors_compute_in_float32(family: str, dtype: torch.dtype, tiny_model) -> None:
    plain = tiny_model(family)
    for parameter in plain.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.linspace(0, 0.3, len(parameter)))
    model = copy.deepcopy(plain).to(dtype)
    vectors = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    assert install_fp32_vectors(model) == vectors
    assert install_fp32_vectors(model) == []
    assert {p.dtype for p in model.parameters() if p.ndim == 1} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p.ndim > 1} == {dtype}
    ids = torch.arange(3, 27).view(2, 12)
    logits = model(ids).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), plain(ids).logits, rtol=0.02, atol=0.02)
    assert torch.equal(copy.deepcopy(model)(ids).logits, logits)


@torch.no_grad()
def test_a_probe_of_a_norm_weight_is_felt_in_bf16(tiny_model) -> None:
    """At 1.0 the bf16 step is 7.8e-3: a change of 1e-3 vanishes unless the vector is float32."""
    ids = torch.arange(3, 27).view(2, 12)
    plain, mixed = tiny_model("llama", torch.bfloat16), tiny_model("llama", torch.bfloat16)
    install_fp32_vectors(mixed)
    for model, felt in ((plain, False), (mixed, True)):
        norm = model.model.norm.weight
        before = norm.clone()
        norm.add_(1e-3)
        assert torch.equal(norm, before) is not felt
        assert model(ids).logits.isfinite().all()


def test_frozen_vectors_keep_their_dtype(tiny_model) -> None:
    model = tiny_model("llama", torch.bfloat16).requires_grad_(False)
    assert install_fp32_vectors(model) == []
