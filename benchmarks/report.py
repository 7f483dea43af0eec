"""The adaptation benchmark's results as one Markdown table."""

from __future__ import annotations

from typing import Any

from ephemera.bench.timing import machine_lines


def table(details: dict[str, Any]) -> str:
    """Every measured length and dtype, a row for each contender and the floor."""
    facts, settings = details["machine"], details["settings"]
    lines = [
        f"Model {settings['model']}, {settings['steps']} steps; median [lowest, highest] of the rounds.",
        *machine_lines(facts),
        "",
        "| prompts | dtype | | seconds | prompts/s | ephemera against it | vs floor | peak memory (MB) |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    notes = []
    for cell in details["cells"]:
        tokens = cell["tokens"]
        label = f"{cell['batch']} {cell['length']} ({min(tokens)}-{max(tokens)} tokens), {cell['rounds']} rounds"
        memory = cell.get("memory", {})
        floor_s = cell["floor"]["seconds"]["median"]
        peers = [who for who in ("peft", "vmap", "einsum") if who in cell]
        for who in ("ephemera", *peers, "floor"):
            seconds = cell[who]["seconds"]
            ratios = (
                f"{cell[f'vs_{who}']:.2f}" if who in peers else "",
                f"{seconds['median'] / floor_s:.2f}" if who != "floor" else "",
            )
            peak = f"{memory[who] / 1e6:.0f}" if who in memory else ""
            lines.append(
                f"| {label} | {cell['dtype']} | {who} | {seconds['median']:.3g} [{seconds['min']:.3g}, "
                f"{seconds['max']:.3g}] | {cell[who]['prompts_per_second']:.2f} | {ratios[0]} | {ratios[1]} | {peak} |"
            )
        apart = ", ".join(f"{who}'s by {cell[who]['max_relative_difference']:.1e}" for who in peers)
        exact = cell.get("exact", {})
        notes.append(
            f"{cell['length']} {cell['dtype']}: adapters differ at most from {apart}; floor {cell['floor']['gflop']:.0f} GFLOP at "
            f"{cell['floor']['gflop_per_second']:.0f} GFLOP/s"
            + (
                f"; from a float64 PEFT loop's, on {exact['prompts']} of the prompts: ephemera's by {exact['ephemera']:.1e}, "
                f"PEFT's by {exact['peft']:.1e}"
                if exact
                else ""
            )
            + (
                f"; training ScaleNet peaks at {memory['scalenet'] / 1e6:.0f} MB, {memory['scalenet_ratio']:.2f} times "
                "one step and its stored gradients"
                if memory
                else ""
            )
            + "."
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
