"""The points of the frontier: exit layer, adapted layers, kinds, steps and vocabulary of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from ephemera.made_for import Reach


@dataclass(frozen=True)
class Point:
    """One way to take K steps. `network`: a trained one's name or folder, which says all the rest itself."""

    layers: str = "all"
    exit_layer: int | None = None
    targets: str = "qv"
    K: int = 1
    vocabulary: int | None = None
    lens: bool = True
    network: str | None = None
    reach: Reach = "all"  # of a network: its own

    @property
    def key(self) -> str:
        if self.network is not None:
            return f"{self.network} K={self.K}"
        parts = [f"layers {self.layers}", f"{self.targets}"]
        if self.exit_layer is not None:
            parts.append(f"exit {self.exit_layer}" + ("" if self.lens else " untrained"))
        parts += [f"words {self.vocabulary}"] * (self.vocabulary is not None)
        parts += ["reach answer"] * (self.reach == "answer")
        return ", ".join([*parts, f"K={self.K}"])


COMMON = 4096  # ids in the small softmax


def points() -> list[Point]:
    found = [
        Point(),
        Point(network="scalenet-nq-open"),
        Point(network="scalenet-fast"),
        # Adapters on the answer only: the base model's reading of the prompt is kept
        Point(reach="answer"),
        Point(targets="q_proj+o_proj+down_proj", reach="answer"),
        Point("first-8", 8, vocabulary=COMMON, reach="answer"),
        Point("first-8", 8, reach="answer"),
        Point(network="universal"),
        Point(network="scalenet-nq-open", K=5),
        # The loss read off an earlier layer, through the tuned lens: over all words, over the common ones
        *(Point(f"first-{E}", E, vocabulary=words) for E in (8, 10, 6, 4) for words in (None, COMMON)),
        *(Point(f"first-{E}", E, vocabulary=COMMON) for E in (12, 15)),
        *(Point("first-8", 8, vocabulary=words) for words in (16384, 512)),
        # Through the untrained one
        Point("first-8", 8, lens=False),
        # Its kinds and layers
        *(Point("first-8", 8, kind) for kind in ("v", "q")),
        *(Point(layers, 8) for layers in ("first-4", "2-7")),
        # The loss at the top, over some layers, kinds and words
        *(Point(layers=layers) for layers in ("first-8", "first-15", "last-15")),
        *(Point(targets=kind) for kind in ("v", "q")),
        Point(vocabulary=COMMON),
        # A second step
        Point("first-8", 8, K=2),
        Point(K=2),
    ]
    return list(dict.fromkeys(found))
