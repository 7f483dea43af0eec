"""Keys and values of the rows being decoded: rows come and go without copying the others.

All rows end at the same column, so that the next token of every row is written in one place; a shorter row has unused
columns before its first token, which the mask hides. Buffers hold spare rows and columns: a row joins by writing itself
into a spare place, and leaves by the last row taking its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

GROWTH = 128  # columns added when a buffer is full


class _View(CacheLayerMixin):
    """One layer's buffer, rows `lo`..`hi`, as transformers sees a cache layer. Sliding layers keep all columns too:
    transformers' mask hides what lies outside their window."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, start: int, end: int):
        super().__init__()
        self.keys, self.values = keys, values
        self.start, self.end = start, end
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffer exists already."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column after the end; the end itself moves when the whole pass has succeeded (`Rows.advance`)."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        keys[:, :, self.end] = key_states[:, :, 0]
        values[:, :, self.end] = value_states[:, :, 0]
        span = slice(self.start, self.end + 1)
        return keys[:, :, span], values[:, :, span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.end - self.start

    def get_max_length(self) -> int:
        return -1


class Rows:
    """The buffers [rows, heads, columns, head size] of all layers, and how many tokens each row holds."""

    def __init__(self):
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self.end = 0

    @property
    def start(self) -> int:
        return self.end - max(self.lengths, default=0)

    def cache(self, lo: int, hi: int) -> Cache:
        """What the model reads and writes for rows `lo`..`hi` in one pass."""
        views = [_View(k[lo:hi], v[lo:hi], self.start, self.end) for k, v in zip(self.keys, self.values, strict=True)]
        return Cache(layers=list(views))

    def past_mask_BT(self, lo: int, hi: int, device: torch.device) -> Tensor:
        """Which columns are real tokens, before the pass."""
        lengths_B1 = torch.tensor(self.lengths[lo:hi], device=device)[:, None]
        width = self.end - self.start
        return torch.arange(width, device=device)[None] >= width - lengths_B1

    def reserve(self) -> None:
        """Room for one more column."""
        if self.keys and self.end == self.keys[0].shape[2]:
            self._resize(self.keys[0].shape[0], self.end - self.start)

    def advance(self) -> None:
        """A pass over every row has succeeded: its column counts."""
        self.end += 1
        self.lengths = [n + 1 for n in self.lengths]

    def join(self, read: DynamicCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Add rows of a left-padded prefill; `rows` may repeat one. Nothing changes if memory runs out."""
        layers = [_full(layer) for layer in read.layers]
        width, count = max(lengths), len(self.lengths)
        fits = bool(self.keys) and self.keys[0].shape[0] >= count + len(rows) and self.end >= width
        if not fits or self.end == self.keys[0].shape[2]:
            capacity = self.keys[0].shape[0] if self.keys else 0
            while capacity < count + len(rows):
                capacity = max(4, 2 * capacity)
            if not self.keys:
                k, v = layers[0]
                self.keys = [k.new_zeros(0, k.shape[1], 0, k.shape[3]) for k, _ in layers]
                self.values = [v.new_zeros(0, v.shape[1], 0, v.shape[3]) for _, v in layers]
            self._resize(capacity, max(self.end - self.start, width))
        index = torch.tensor(list(rows), device=self.keys[0].device)
        for k, v, (new_k, new_v) in zip(self.keys, self.values, layers, strict=True):
            kept = min(width, new_k.shape[2])  # a sliding layer that was cropped holds its window alone
            place = (slice(count, count + len(rows)), slice(None), slice(self.end - kept, self.end))
            k[place] = new_k[:, :, -kept:].index_select(0, index)
            v[place] = new_v[:, :, -kept:].index_select(0, index)
        self.lengths += list(lengths)

    def leave(self, row: int) -> None:
        """The last row takes the place of one that is done."""
        last = len(self.lengths) - 1
        for t in (*self.keys, *self.values):
            if row != last:
                t[row] = t[last]
            t[last] = 0  # a diverged row would leave values that are not finite, which no mask hides
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.keys, self.values, self.end = [], [], 0

    def _resize(self, rows: int, width: int) -> None:
        """Buffers of `rows` rows whose used columns end at `width`; unused ones are zero, as masked values must be
        finite."""
        used = self.end - self.start

        def grown(t: Tensor) -> Tensor:
            new = t.new_zeros(rows, t.shape[1], width + GROWTH, t.shape[3])
            if used:
                new[: len(self.lengths), :, width - used : width] = t[: len(self.lengths), :, self.start : self.end]
            return new

        keys, values = [grown(t) for t in self.keys], [grown(t) for t in self.values]
        self.keys, self.values, self.end = keys, values, width


def _full(layer: object) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, DynamicLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def check_cache(cache: DynamicCache, name: str) -> None:
    """ValueError for a model whose layers keep something other than keys and values."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"{name} has layers that ephemera cannot decode in a batch that rows join and leave "
                f"({type(layer).__name__}); it serves models whose every layer is attention. Use `ephemera answer`."
            )
