"""RMS norms with a written-out backward pass, against transformers' own."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ephemera.fast.rms_norm import FastNorm


def pair(dtype):
    theirs = LlamaRMSNorm(12).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(12))
    return FastNorm(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_same_bits(dtype):
    ours, theirs = pair(dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))
    with torch.no_grad():  # another way through, for inference
        x = torch.randn(16, 1, 12, dtype=dtype) * 100
        assert torch.equal(ours(x), theirs(x))


def test_gradients():
    ours, theirs = pair(torch.float32)
    x = torch.randn(2, 5, 12, requires_grad=True)
    dy = torch.randn(2, 5, 12)
    got = torch.autograd.grad(ours(x), (x, ours.weight), dy)
    want = torch.autograd.grad(theirs(x), (x, theirs.weight), dy)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_second_order():
    ours, theirs = pair(torch.float32)
    x = torch.randn(2, 5, 12, requires_grad=True)
    found = []
    for norm in (ours, theirs):
        (dx,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
