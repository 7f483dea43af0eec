"""`ephemera plan`: what a model takes on given devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ephemera.cli.options import app

if TYPE_CHECKING:
    from ephemera.plan import Plan


@app.command(
    epilog="""Examples:

    ephemera plan --model Llama-3.3-70B-Instruct --gpus 8x80GB --prompts 64 --tokens 512

    ephemera plan --model Qwen3-32B --gpus 2xh200 --targets q_proj,o_proj,down_proj --checkpoint"""
)
def plan(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model that the papers name, a hub id, or a folder with config.json.")
    ] = "smollm2-135m-instruct",
    gpus: Annotated[str, typer.Option(help="Number and memory, as 8x80GB, or number and kind, as 8xh100.")] = "1x80GB",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new: Annotated[int, typer.Option(min=0, help="Tokens of an answer.")] = 128,
    steps: Annotated[int, typer.Option("--steps", "-k", min=0, help="Gradient steps on each prompt.")] = 1,
    r: Annotated[int, typer.Option("--r", min=1, help="LoRA r.")] = 4,
    targets: Annotated[str, typer.Option(help="Adapted modules, as q_proj,v_proj.")] = "q_proj,v_proj",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Run layers again instead of keeping activations.")
    ] = (False),
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, help="TFLOP/s that a device reaches. Default: its kind's; an H100's for a size in GB."),
    ] = None,
) -> None:
    """Plan memory, split and time from the model's configuration alone. No weights are read."""
    from ephemera.cost import BYTES, shape_of
    from ephemera.messages import unknown
    from ephemera.plan import Work, devices_of, plan_for

    if dtype not in BYTES:
        raise unknown("dtype", dtype, BYTES)
    shape = shape_of(model)
    kinds = tuple(name.strip().removesuffix("_proj") for name in targets.split(","))
    for kind in kinds:
        shape.features(kind)
    number, device = devices_of(gpus, tflops)
    named = cast(Literal["float32", "bfloat16"], dtype)
    work = Work(prompts, tokens, new, steps, kinds, r, named, checkpoint)
    print(page(plan_for(shape, work, number, device), number))


def page(made: Plan, number: int) -> str:
    """The plan in words and two tables."""
    from ephemera.evaluation.nll.tables import Table
    from ephemera.plan import GB, RESERVE

    work, memory, device = made.work, made.memory, made.device
    entries = made.shape.adapter(work.kinds, work.r)
    parts = {"weights": memory.weights, "adapters": memory.adapters, "activations": memory.activations}
    parts |= {
        "logits": memory.logits,
        "keys and values": memory.cache,
        "peak": memory.peak,
        "reserve": RESERVE * device.bytes,
        "headroom": made.headroom,
    }
    rounds = -(-work.prompts // (made.copies * made.batch))
    split = "whole" if made.tensor_parallel == 1 else f"split over {made.tensor_parallel} devices (tensor parallel)"
    copies = (
        f"One copy of the model, {split}" if made.copies == 1 else f"{made.copies} copies of the model, each {split}"
    )
    told = (
        f"{copies}. Prompts at once in a copy: {made.batch}. Rounds for {work.prompts} prompts: {rounds}. An adapter has "
        f"{entries:,} numbers, {4 * entries / 1e6:.1f} MB in float32. Peak: weights, adapters, and the larger of two: activations "
        "with logits, or keys and values."
    )
    space = Table(
        f"{made.shape.name} on {number} x {device.name}, {work.dtype}",
        told,
        ["on each device", "GB"],
        [[name, f"{value / GB:.2f}"] for name, value in parts.items()],
    )
    speed = device.flops[work.dtype]
    rows = []
    for reach in ("all", "answer"):
        each = made.seconds(reach)
        rows.append([reach, f"{made.prefills(reach):.2f}", f"{each:.4g}", f"{each * work.prompts / number:.4g}"])
    time = Table(
        "Time",
        f"K = {work.steps}, {work.tokens} tokens of a prompt and {work.new} of an answer, at {speed / 1e12:g} TFLOP/s a device. "
        "By FLOPs, without what devices tell each other: a plan, not a measurement.",
        ["reach", "first token, in prefills", "device seconds a prompt", f"seconds for {work.prompts} prompts"],
        rows,
    )
    return space.markdown() + "\n" + time.markdown()
