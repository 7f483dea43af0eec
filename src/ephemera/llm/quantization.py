"""Quantised weights: how a model gets them, which modules hold them, and whether a gradient passes through these.

Adapters stay float32 beside them (lora.py). Nothing is ever merged into a quantised weight.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ephemera.llm.replaced import Place
from ephemera.messages import unknown

Quantization = Literal["none", "int8", "nf4", "torchao-int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "nf4", "torchao-int8")
BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"  # as transformers calls the methods
INT8, FOUR_BIT = "Linear8bitLt", "Linear4bit"  # bitsandbytes' modules; its import takes a second
SIZE = 4  # tokens of a probe
TOLERANCE = 0.05  # of a probe: rounding of inputs to 8 bit stays below a hundredth


def checked_quantization(name: str) -> Quantization:
    for known in QUANTIZATIONS:
        if name == known:
            return known
    raise unknown("quantization", name, QUANTIZATIONS)


def loading(name: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes, so that weights are quantised while they are read.

    ModuleNotFoundError with the install line where the package is missing.
    """
    if name == "none":
        return {}
    check_installed(TORCHAO if name == "torchao-int8" else BITSANDBYTES)
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    from transformers import BitsAndBytesConfig

    if name == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def of_files(config: Any) -> str | None:
    """How a model's files are quantised already, in transformers' word; None if they are not. ModuleNotFoundError as above."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found["quant_method"] if isinstance(found, dict) else found.quant_method
    method = str(getattr(method, "value", method))
    check_installed(method)
    return method


def check_installed(method: str) -> None:
    """ModuleNotFoundError that names the package and its install line."""
    extra = {BITSANDBYTES: "bnb", TORCHAO: "torchao"}.get(method)
    try:
        if method == BITSANDBYTES:
            import accelerate  # noqa: F401
            import bitsandbytes  # pyright: ignore[reportMissingImports]  # noqa: F401
        elif method == TORCHAO:
            import torchao  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ModuleNotFoundError as error:
        line = f"{error.name} is not installed. Get it by: pip install 'ephemera[{extra}]'"
        raise ModuleNotFoundError(line, name=error.name) from None


def is_plain(module: nn.Module | None) -> bool:
    """Whether a module is torch's own linear map with a plain weight, which products and sums may read."""
    return type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter


def is_quantised(weight: Tensor) -> bool:
    return weight.element_size() < 2 or not weight.is_floating_point() or "torchao" in type(weight).__module__


def quantised_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules whose weights are quantised, by path."""
    linear = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear))
    return {path: m for path, m in linear if is_quantised(m.weight)}


def quantization_of(model: nn.Module) -> str:
    """One of QUANTIZATIONS, or the words for another form; "none" also for files that were dequantised when read."""
    module = next(iter(quantised_modules(model).values()), None)
    if module is None:
        return "none"
    kind, weight = type(module).__name__, module.weight
    if kind == INT8:
        return "int8"
    if kind == FOUR_BIT:
        return str(getattr(weight, "quant_type", "4 bit"))
    asked = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "quant_type", None)
    name = type(weight if asked is None else asked).__name__
    return "torchao-int8" if name == "Int8WeightOnlyConfig" else name


def exact_places(model: nn.Module) -> list[Place]:
    """What makes bitsandbytes' modules multiply by the dequantised weights, in both directions, on a CPU too.

    In eval mode int8 rounds its input as well: on SmolLM2-135M-Instruct a prompt's gradient is then a third off. Its training
    mode does not. A pass without gradient repacks 4 bit weights for AVX-512, and the gradient of those is silently wrong.
    ValueError where that has happened already, and for weights that bitsandbytes reads wrongly.
    """
    places: list[Place] = []
    for path, module in quantised_modules(model).items():
        kind = type(module).__name__
        if kind == INT8:
            places.append((module, "training", True))
        elif kind == FOUR_BIT:
            _check_four_bit(path, module)
            if getattr(module, "support_avx512bf16_for_cpu", False):
                places.append((module, "support_avx512bf16_for_cpu", False))
    return places


def _check_four_bit(path: str, module: nn.Linear) -> None:
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"bitsandbytes has repacked the 4 bit weights of {path} for inference, and those have no gradient. Load the model "
            "again, and set support_avx512bf16_for_cpu = False on its Linear4bit modules before it runs."
        )
    block = getattr(state, "blocksize", 1)
    if module.weight.device.type == "cpu" and module.in_features % block:  # seen with 0.50.2, in either direction
        raise ValueError(
            f"bitsandbytes reads the 4 bit weights of {path} wrongly on a CPU: it has {module.in_features} inputs, no multiple "
            f"of the block of {block}. Use quantization int8 or torchao-int8, or a GPU."
        )


def check_gradients(model: nn.Module, name: str) -> None:
    """ValueError if gradients do not pass through a quantised module; one of each kind of a layer is tried.

    A linear map W has <W x, W x> = <W^T W x, x>, whatever its weights: the right side takes the gradient.
    """
    kinds = {path.rpartition(".")[2]: path for path in reversed(quantised_modules(model))}
    for path in kinds.values():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        share = _share_of_gradient(module, model)
        if not abs(share - 1) < TOLERANCE:
            raise ValueError(
                f"{name} cannot be adapted: its weights are quantised ({quantization_of(model)}), and no gradient passes "
                f"through {path}. Load the unquantised model, with quantization int8, nf4 or torchao-int8 if it is to be small."
            )


@torch.enable_grad()
def _share_of_gradient(module: nn.Linear, model: nn.Module) -> float:
    """<W^T W x, x> / <W x, W x> of a random x: 1 if the gradient is the map's, NaN or 0 if there is none."""
    dtype = next(p.dtype for p in model.parameters() if not is_quantised(p))
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they were
    x_1TI = (
        torch.randn(1, SIZE, module.in_features, generator=generator).to(module.weight.device, dtype).requires_grad_()
    )
    y_1TO = module(x_1TI)
    wx_1TO = (y_1TO - module(torch.zeros_like(x_1TI))).detach()  # without the bias
    if not y_1TO.requires_grad:
        return 0.0
    (dx_1TI,) = torch.autograd.grad(y_1TO, x_1TI, wx_1TO, allow_unused=True)
    if dx_1TI is None:
        return 0.0
    return float((dx_1TI.double() * x_1TI.detach().double()).sum() / wx_1TO.double().square().sum())
