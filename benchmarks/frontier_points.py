"""The points of the frontier: exit layer, adapted layers, kinds, steps, tokens and vocabulary of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from ephemera.rates import Normalize


@dataclass(frozen=True)
class Point:
    """One way to take K steps. `network`: a trained one's name or folder, which says all the rest itself."""

    layers: str = "all"
    exit_layer: int | None = None
    targets: str = "qv"
    K: int = 1
    tokens: str = "all"
    vocabulary: int | None = None
    lens: bool = True
    normalize: Normalize = "none"
    network: str | None = None

    @property
    def key(self) -> str:
        if self.network is not None:
            return f"{self.network} K={self.K}"
        parts = [f"layers {self.layers}", f"{self.targets}"]
        if self.exit_layer is not None:
            parts.append(f"exit {self.exit_layer}" + ("" if self.lens else " untrained"))
        parts += [f"tokens {self.tokens}"] * (self.tokens != "all")
        parts += [f"words {self.vocabulary}"] * (self.vocabulary is not None)
        parts += [f"normalized by {self.normalize}"] * (self.normalize != "none")
        return ", ".join([*parts, f"K={self.K}"])


COMMON = 4096  # ids in the small softmax


def points() -> list[Point]:
    found = [
        # The loss read off an earlier layer, untrained and trained lens
        *(Point(f"first-{E}", E, vocabulary=COMMON) for E in (10, 15, 8, 12, 6, 4)),
        Point(),
        Point(network="scalenet-nq-open"),
        *(Point("first-8", 8, vocabulary=words, lens=lens) for words, lens in ((None, True), (None, False))),
        *(Point(f"first-{E}", E, vocabulary=COMMON, lens=False) for E in (8, 15)),
        # Its layers and kinds
        *(Point(layers, 15, vocabulary=COMMON) for layers in ("first-8", "4-14")),
        *(Point("first-8", 8, kind, vocabulary=COMMON) for kind in ("v", "q")),
        # The whole model's gradient, over some layers and kinds
        *(Point(layers=layers) for layers in ("first-15", "first-8", "last-15")),
        *(Point(targets=kind) for kind in ("v", "q")),
        Point(vocabulary=COMMON),
        Point(tokens="last-8"),
        # Tokens and words of the early loss
        *(Point("first-8", 8, tokens=tokens) for tokens in ("last-8", "last-16", "every-2")),
        *(Point("first-8", 8, vocabulary=words) for words in (512, 16384)),
        # Steps of length one, and more of them
        *(Point(normalize=by) for by in ("prompt", "projection")),
        *(Point("first-8", 8, K=2, vocabulary=COMMON),),
        *(Point(K=2, normalize=by) for by in ("none", "prompt", "projection")),
    ]
    return list(dict.fromkeys(found))
