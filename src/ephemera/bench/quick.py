"""`ephemera bench`: what adapting costs on this machine, in two minutes and in words."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

from ephemera.batch import TokenBatch, pad
from ephemera.bench.contenders import PeftLoop, adapt_batched, encoded, initial_lora
from ephemera.bench.floor import Floor, count
from ephemera.bench.timing import DTYPES, machine, native_dtypes, spread, timed, turns
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import find_device, load_backbone
from ephemera.llm.prefill import prefill
from ephemera.lora import LoraBatch

BATCH = 8
TOKENS = 16  # decoded by each turn
ROUNDS = 20  # the time ends them
ANSWER = 64  # tokens of the answer that the verdict speaks of: `generate`'s default
BUSY = 0.5  # load average above which times are noise
LOADING_S = 10.0  # of a dtype's models, warm-up included: not there for rounds


def bench(model: str, *, steps: int, minutes: float, device: str | None = None) -> dict[str, Any]:
    """Each dtype that the device multiplies, a batch of short prompts: reading, adapting, decoding, a PEFT loop, the floor."""
    on = find_device(device)
    facts = machine(on)
    results: dict[str, Any] = {"machine": facts, "model": model, "device": str(on), "steps": steps}
    results |= {"batch": BATCH, "dtypes": {}}
    start = time.perf_counter()
    dtypes = native_dtypes(on)
    results["left_out"] = [dtype for dtype in DTYPES if dtype not in dtypes]
    for place, dtype in enumerate(dtypes):
        print(f"{dtype} ...", file=sys.stderr)
        backbone = load_backbone(model, dtype=dtype, device=on)
        left_s = 60 * minutes - (time.perf_counter() - start)
        share_s = left_s / (len(dtypes) - place) - LOADING_S
        results["dtypes"][dtype] = _measure(backbone, steps, share_s)
    return results


def _measure(backbone: FrozenLM, steps: int, budget_s: float) -> dict[str, Any]:
    prompts = [row.prompt for row in encoded(backbone, "short", BATCH)]
    batch = pad(prompts, pad_id=backbone.pad_id).to(backbone.device)
    lora = adapt_batched(backbone, prompts[:1], 1)  # warms up too
    lora = adapt_batched(backbone, prompts, 1)
    contenders: dict[str, Callable[[], float]] = {
        "prefill": lambda: timed(lambda: prefill(backbone, batch, None)),
        "adapt": lambda: timed(lambda: adapt_batched(backbone, prompts, steps)),
        "decode": lambda: _decode(backbone, batch, None),
        "adapted_decode": lambda: _decode(backbone, batch, lora),
    }
    if backbone.path.suffix != ".gguf" and all(p.rows is None for p in backbone.projections):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between transformers and PEFT
            loop, initial = PeftLoop(backbone), initial_lora(backbone, prompts)
        loop.adapt_all(prompts[:1], initial.rows([0]), 1)
        contenders["peft"] = lambda: timed(lambda: loop.adapt_all(prompts, initial, steps))
        contenders["floor"] = Floor(count(backbone, prompts), steps, backbone.dtype, backbone.device).seconds
    _decode(backbone, batch, lora)
    seconds = turns(contenders, ROUNDS, budget_s=budget_s)
    tokens = {name: [BATCH * TOKENS / s for s in seconds[name]] for name in ("decode", "adapted_decode")}
    decode_ratio = median(p / a for a, p in zip(seconds["adapted_decode"], seconds["decode"], strict=True))
    first = [(a + p) / p for a, p in zip(seconds["adapt"], seconds["prefill"], strict=True)]
    found = {
        "tokens": [len(ids) for ids in prompts],
        "rounds": len(seconds["adapt"]),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "prompts_per_second": BATCH / median(seconds["adapt"]),
        "tokens_per_second": {name: median(values) for name, values in tokens.items()},
        "first_token_vs_plain": median(first),
        "adapted_decode_vs_plain": decode_ratio,
    }
    for name, key in (("peft", "vs_peft"), ("floor", "vs_floor")):
        if name in seconds:
            one, other = ("peft", "adapt") if name == "peft" else ("adapt", "floor")
            found[key] = median(seconds[one]) / median(seconds[other])
    return found


def _decode(backbone: FrozenLM, batch: TokenBatch, lora: LoraBatch | None) -> float:
    read = prefill(backbone, batch, lora)
    return timed(lambda: read.generate(max_new_tokens=TOKENS, min_new_tokens=TOKENS))


def verdict(results: dict[str, Any]) -> list[str]:
    """Sentences that a user can act on, the most important first."""
    dtypes, steps = results["dtypes"], results["steps"]
    fastest = min(dtypes, key=lambda d: dtypes[d]["seconds"]["adapt"]["median"])
    slowest = max(dtypes, key=lambda d: dtypes[d]["seconds"]["adapt"]["median"])
    best = dtypes[fastest]
    seconds = {name: value["median"] for name, value in best["seconds"].items()}
    token_s = results["batch"] / best["tokens_per_second"]["decode"]
    plain = seconds["prefill"] + ANSWER * token_s
    adapted = seconds["adapt"] + seconds["prefill"] + ANSWER * token_s / best["adapted_decode_vs_plain"]
    many = f"{steps} step{'s' if steps > 1 else ''}"
    tokens = f"{min(best['tokens'])}-{max(best['tokens'])}"
    gain = dtypes[slowest]["seconds"]["adapt"]["median"] / seconds["adapt"]
    lines = [
        f"Adapting {results['batch']} prompts of {tokens} tokens with {many} takes {seconds['adapt']:.2f} s in {fastest} "
        f"({best['prompts_per_second']:.1f} prompts/s): as long as writing {seconds['adapt'] / token_s:.0f} tokens of each "
        "answer.",
        f"The first token comes after {best['first_token_vs_plain']:.1f} times a plain prefill; a whole answer of {ANSWER} "
        f"tokens takes {adapted / plain:.2f} times as long as without adapting.",
        (
            f"Decoding with adapters keeps {100 * best['adapted_decode_vs_plain']:.0f} % of the unadapted speed"
            + ("." if best["adapted_decode_vs_plain"] >= 0.9 else ", less than the 90 % it should.")
        ),
        "This CPU has no instructions for bfloat16 products, which would take tens of times as long: stay with float32."
        if results["left_out"]
        else (
            f"Use --dtype {fastest}: it adapts {gain:.1f} times as fast as {slowest} here."
            if gain >= 1.1
            else f"{fastest} and {slowest} adapt about equally fast here; float32 is the more exact."
        ),
    ]
    if "vs_peft" in best:
        lines.append(
            f"A plain PEFT loop takes {best['vs_peft']:.1f} times as long for the same steps; the matrix products alone "
            f"would take {seconds['floor']:.2f} s, ephemera takes {best['vs_floor']:.2f} times that."
        )
    if results["machine"]["load_average"] > BUSY:
        lines.append(
            f"Other programs were running (load average {results['machine']['load_average']:.1f}): run it again when the "
            "machine is idle before you trust these numbers."
        )
    return lines


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows of the small table above the verdict, the head first."""
    rows = [["", *results["dtypes"]]]
    names = {
        "prefill": "read the prompts (s)",
        "adapt": f"adapt to them, K={results['steps']} (s)",
        "peft": "the same by a PEFT loop (s)",
        "floor": "the same, matrix products alone (s)",
    }
    for name, label in names.items():
        found = [cell["seconds"].get(name) for cell in results["dtypes"].values()]
        if all(found):
            rows.append([label, *(f"{f['median']:.2f} [{f['min']:.2f}, {f['max']:.2f}]" for f in found)])
    for name, label in (("decode", "decode, unadapted (tokens/s)"), ("adapted_decode", "decode, adapted (tokens/s)")):
        rows.append([label, *(f"{cell['tokens_per_second'][name]:.1f}" for cell in results["dtypes"].values())])
    return rows
