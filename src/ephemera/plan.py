"""What a model takes on given devices: how it is split, how many prompts adapt at once, how long it takes. Arithmetic alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ephemera.cost import BYTES, DEVICES, Device, ModelShape
from ephemera.messages import unknown

GB = 1e9
DEFAULT_DEVICE = "h100"  # whose speed is taken where only memory is given
RESERVE = 0.1  # of a device, for the framework, for gaps between tensors and for what devices tell each other


@dataclass(frozen=True)
class Work:
    """What is asked of the model: prompts of so many tokens, `new` tokens of an answer each, K steps."""

    prompts: int = 64
    tokens: int = 512
    new: int = 128
    steps: int = 1
    kinds: tuple[str, ...] = ("q", "v")
    r: int = 4
    dtype: str = "bfloat16"
    checkpoint: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at a batch's peak. `adapters`: with their start and gradient, in float32."""

    weights: float
    adapters: float
    activations: float
    logits: float
    cache: float

    @property
    def peak(self) -> float:
        """A step's activations and logits are gone before the cache grows."""
        return self.weights + self.adapters + max(self.activations + self.logits, self.cache)


@dataclass(frozen=True)
class Plan:
    """`tensor_parallel` devices hold one copy of the model; there are `copies`; each adapts `batch` prompts at once."""

    shape: ModelShape
    work: Work
    device: Device
    tensor_parallel: int
    copies: int
    batch: int
    memory: Memory

    @property
    def headroom(self) -> float:
        """Bytes of a device that the peak and the reserve leave."""
        return (1 - RESERVE) * self.device.bytes - self.memory.peak

    def prefills(self, reach: str) -> float:
        """FLOPs to the first token, in plain prefills: K steps, and for reach `all` the prompt once more."""
        T, prefill = self.work.tokens, self.shape.forward_flops(self.work.tokens, scored=1)
        again = (
            self.shape.forward_flops(T) if self.work.checkpoint else 0.0
        )  # layers are run again for their backward pass
        steps = self.work.steps * (self.shape.step_flops(T) + again)
        # With reach `answer` the first step's forward is the reading; further steps cost the same
        return steps / prefill + (1.0 if reach == "all" or self.work.steps == 0 else 0.0)

    def seconds(self, reach: str) -> float:
        """Of one device for one prompt: adapting, and its answer."""
        T = self.work.tokens
        flops = self.prefills(reach) * self.shape.forward_flops(T, scored=1)
        flops += self.shape.decode_flops(T, self.work.new)
        return flops / self.device.flops[self.work.dtype]


def devices_of(text: str, tflops: float | None = None) -> tuple[int, Device]:
    """8x80GB or 8xh100: their number, and one of them. `tflops` per second replace what is known of the device."""
    match = re.fullmatch(r"(\d+)x(.+)", text.strip().lower())
    if match is None or int(match[1]) < 1:
        raise ValueError(f"gpus={text!r} is not a number of devices; give them as 8x80GB or 8xh100.")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)gb", match[2])
    if size is not None:
        device = replace(DEVICES[DEFAULT_DEVICE], name=f"{size[1]} GB", bytes=float(size[1]) * GB)
    elif match[2] in DEVICES:
        device = DEVICES[match[2]]
    else:
        raise unknown("device", match[2], [*DEVICES, "its memory, as 80GB"])
    if tflops is not None:
        device = replace(device, flops=dict.fromkeys(device.flops, tflops * 1e12))
    return int(match[1]), device


def memory_of(shape: ModelShape, work: Work, batch: int, tensor_parallel: int = 1) -> Memory:
    """On one of the devices that hold a copy. Layers' inputs and adapters are on each; weights and the rest are split."""
    each, dtype = batch * work.tokens, BYTES[work.dtype]
    whole = shape.activations(1, checkpoint=work.checkpoint)
    inputs = 4 * shape.hidden_size * (1 if work.checkpoint else shape.layers)
    if work.checkpoint:
        inputs += shape.layers * shape.hidden_size
    return Memory(
        weights=dtype * shape.weights / tensor_parallel,
        adapters=4 * 3 * batch * shape.adapter(work.kinds, work.r),
        activations=dtype * each * (inputs + (whole - inputs) / tensor_parallel),
        logits=4 * each * shape.vocabulary / tensor_parallel,
        cache=dtype * batch * shape.cache_values(work.tokens + work.new) / tensor_parallel,
    )


def degrees(shape: ModelShape, most: int) -> list[int]:
    """Over how many devices a copy may be split: every one gets whole heads, keys' and values' too."""
    return [n for n in range(1, most + 1) if shape.heads % n == 0 and shape.kv_heads % n == 0 and most % n == 0]


def plan_for(shape: ModelShape, work: Work, number: int, device: Device) -> Plan:
    """The split over the fewest devices at which a prompt fits: copies adapt at the same time, without waiting for each other.

    ValueError says how much is missing where no split does.
    """
    splits, room = degrees(shape, number), (1 - RESERVE) * device.bytes

    def fits(batch: int, split: int) -> bool:
        return memory_of(shape, work, batch, split).peak <= room

    for split in splits:
        if fits(1, split):
            copies = number // split
            fair = -(-work.prompts // copies)
            batch = max(b for b in range(1, fair + 1) if fits(b, split))
            return Plan(shape, work, device, split, copies, batch, memory_of(shape, work, batch, split))
    least, split = memory_of(shape, work, 1, splits[-1]), splits[-1]
    where = "on it" if split == 1 else f"on each of {split} devices"
    needs = f"its weights alone need {least.weights / GB:.1f} GB {where}"
    if least.weights <= room:
        needs = f"one prompt of {work.tokens} tokens needs {least.peak / GB:.1f} GB {where}"
    advice = "" if work.checkpoint or least.weights > room else ", or run layers again with --checkpoint"
    raise ValueError(
        f"{shape.name} does not fit on {number} x {device.name}: {needs}, and a device has {room / GB:.1f} GB to give. "
        f"Give more or larger devices{advice}."
    )
