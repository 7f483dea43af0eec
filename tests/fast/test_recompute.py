"""Steps that run each layer twice: the same adapters as steps that keep everything, and they do move."""

import pytest
import torch

from ephemera.adapt import adapt
from ephemera.batch import pad
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate
from reference import close
from tiny_models import ARCHITECTURES, left, random_ids, random_lora, tiny_backbone

LENGTHS = [11, 4, 8]


def again(backbone: FrozenLM) -> FrozenLM:
    backbone.recompute = True
    return backbone


def runs_of(backbone: FrozenLM) -> list[int]:
    """Counts the starts of an MLP above an adapter: it has no adapter, and its second run ends where nothing more is needed."""
    runs: list[int] = []
    backbone.decoder.get_submodule("layers.1.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_equal_those_of_plain_steps(architecture, packs):
    plain = tiny_backbone(architecture)
    plain.packs = packs
    batch = pad(random_ids(LENGTHS), side="left")
    start = ZeroInit(r=2)(plain, batch, [0] * 3)
    want = adapt(plain, batch, start, FixedRate(0.5), 2)
    runs = runs_of(plain)
    have = adapt(again(plain), batch, start, FixedRate(0.5), 2)
    assert len(runs) == 4  # each of two steps ran the layer twice
    assert all(bool((b != 0).flatten(1).any(1).all()) for b in have.lora.B)  # the reentrant form leaves B at zero
    close(have.lora.tensors, want.lora.tensors)
    close(have.prompt_nll_BK, want.prompt_nll_BK)


@pytest.mark.parametrize("packs", [True, False])
def test_float32_models_whose_norms_are_written_out(packs):
    """Float64 models of these tests have norms of their own; the second run must meet those of the first."""
    plain = tiny_backbone("llama", dtype=torch.float32)
    plain.packs = packs
    assert plain.norms
    batch = pad(random_ids(LENGTHS), side="left")
    start = ZeroInit(r=2)(plain, batch, [0] * 3)
    want = adapt(plain, batch, start, FixedRate(0.5), 2)
    close(adapt(again(plain), batch, start, FixedRate(0.5), 2).lora.tensors, want.lora.tensors, 1e-5)


def test_some_layers_an_exit_and_a_kept_bottom():
    backbone = tiny_backbone("llama", depth=4, layers=[1, 2])
    batch, start = left(random_ids(LENGTHS)), random_lora(backbone, 3)
    rate = FixedRate(0.3, PromptLoss(exit_layer=3))
    want = adapt(backbone, batch, start, rate, 2)
    close(adapt(again(backbone), batch, start, rate, 2).lora.tensors, want.lora.tensors)


def test_the_model_is_whole_again_after_an_error(llama):
    before = dict(llama.model.named_modules())
    batch, start = left(random_ids(LENGTHS)), random_lora(llama, 3)
    handle = llama.decoder.get_submodule("layers.1").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapt(again(llama), batch, start, FixedRate(0.3), 1)
    handle.remove()
    assert dict(llama.model.named_modules()) == before


def test_passes_without_a_gradient_run_each_layer_once(llama):
    runs = runs_of(again(llama))
    with torch.no_grad():
        llama.forward(left(random_ids(LENGTHS)), random_lora(llama, 3))
    assert len(runs) == 1


def test_it_keeps_less_for_the_backward_pass():
    """Bytes that autograd saves, outside of it: one input a layer instead of all that layers make."""
    backbone = tiny_backbone("llama", depth=8)
    batch, start = left(random_ids([40])), random_lora(backbone, 1).leaves()

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            backbone.forward(batch, start)
        return sum(sizes.values())

    plain = kept()
    again(backbone)
    assert kept() < plain / 4
