"""Tiles of the scores of a batch of attention heads: what both passes and the median walk over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .eager import lowest


class Tile(NamedTuple):
    """Some rows of scores, of one or several batch items.

    Attributes:
        batch: Which batch items.
        rows: Which queries.
        keys: How many keys, from the first on.
    """

    batch: slice
    rows: slice
    keys: int


class Problem(NamedTuple):
    """What both passes compute with; q is scaled already.

    Attributes:
        query: (B H, L, E).
        key: (B H, S, E).
        mask: (B or 1, H or 1, L or 1, S or 1), boolean or additive, or None.
        heads: H.
        is_causal: Whether query i sees the keys 0 to i only.
        size: How many scores a tile has, about.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    heads: int
    is_causal: bool
    size: int

    def tiles(self) -> Iterator[Tile]:
        """Yields the tiles, which cover every score once.

        They are always the same, so that scores made again are the same bit by bit.
        """
        batch, length, keys = self.query.shape[0], self.query.shape[1], self.key.shape[1]
        rows = max(1, min(length, max(16, self.size // max(keys, 1))))
        group = max(1, self.size // max(rows * keys, 1))
        varies = self.mask is not None and self.mask.shape[:2].numel() > 1
        for start in range(0, batch, self.heads) if varies else (0,):
            end = start + self.heads if varies else batch
            for first in range(start, end, group):
                which = slice(first, min(first + group, end))
                for row in range(0, length, rows):
                    stop = min(row + rows, length)
                    yield Tile(which, slice(row, stop), min(keys, stop) if self.is_causal else keys)

    def mask_index(self, tile: Tile) -> tuple[slice | int, ...]:
        """Returns which part of the mask lies over a tile."""
        assert self.mask is not None
        batch, heads, rows, _ = self.mask.shape
        start = tile.batch.start
        inside = slice(start % self.heads, start % self.heads + tile.batch.stop - start)
        return (
            start // self.heads if batch > 1 else 0,
            inside if heads > 1 else slice(0, 1),
            tile.rows if rows > 1 else slice(0, 1),
            slice(0, tile.keys),
        )

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Makes the scores of a tile, and the mask of the keys that are excluded."""
        query, key = self.query[tile.batch, tile.rows], self.key[tile.batch, : tile.keys]
        scores = torch.bmm(query, key.transpose(1, 2))
        excluded = None
        if self.mask is not None:
            mask = self.mask[self.mask_index(tile)]
            if mask.dtype == torch.bool:
                excluded = ~mask
            else:
                scores += mask
                excluded = mask <= lowest(mask.dtype)
        elif self.is_causal:
            rows = torch.arange(tile.rows.start, tile.rows.stop)
            excluded = torch.arange(tile.keys) > rows[:, None]
        return scores, excluded
