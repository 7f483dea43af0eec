"""Rows of keys and values that come and go."""

import torch
from transformers.cache_utils import DynamicCache

from ephemera.serving.engine.kv_cache import Rows


def read(rows: int, tokens: int, value: float) -> DynamicCache:
    """A prefill's cache of one layer: two heads, three wide, every entry `value` plus the row's number."""
    cache = DynamicCache()
    filled = torch.arange(float(rows)).view(-1, 1, 1, 1) + value
    cache.update(filled.expand(rows, 2, tokens, 3).clone(), -filled.expand(rows, 2, tokens, 3).clone(), 0)
    return cache


def content(rows: Rows) -> list[list[float]]:
    """The keys of each row's own columns, one head and feature of them."""
    (view,) = rows.cache(0, len(rows.lengths)).layers
    keys = view.keys[:, 0, view.start : view.end, 0]
    return [row[-n:].tolist() for row, n in zip(keys, rows.lengths, strict=True)]


def test_rows_come_and_go():
    rows = Rows()
    rows.join(read(3, 4, 10.0), [0, 1, 2], [2, 4, 3])
    rows.join(read(1, 5, 20.0), [0, 0], [5, 5])  # longer than all before; a row may be repeated
    assert content(rows) == [[10.0] * 2, [11.0] * 4, [12.0] * 3, [20.0] * 5, [20.0] * 5]
    rows.leave(1)  # the last takes its place
    assert content(rows) == [[10.0] * 2, [20.0] * 5, [12.0] * 3, [20.0] * 5]
    assert rows.past_mask_BT(0, 4, torch.device("cpu")).sum(1).tolist() == [2, 5, 3, 5]


def test_a_diverged_row_leaves_nothing_behind():
    """Zero times a value that is not finite is not zero: no mask would hide it from the next row in its place."""
    rows = Rows()
    rows.join(read(1, 6, 1.0), [0], [6])
    rows.join(read(1, 6, float("nan")), [0], [6])
    rows.leave(1)
    rows.join(read(1, 2, 5.0), [0], [2])
    (view,) = rows.cache(0, 2).layers
    for tensor in (view.keys, view.values):
        assert tensor[:, :, view.start : view.end].isfinite().all()
