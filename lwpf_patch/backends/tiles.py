"""Tiles of the scores of a batch of attention heads: what both passes and the median walk over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_products import SCORES_FOR_ONEDNN, product
from .eager_form import lowest


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


class TiledScores(NamedTuple):
    """The scores of all heads, made tile by tile: what both passes compute with.

    Attributes:
        query: (B H, L, E).
        key: (B H, S, E).
        scale: Factor of the products of query and key.
        mask: (B or 1, H or 1, L or 1, S or 1), boolean or additive, or None.
        heads: H.
        is_causal: Whether query i sees the keys 0 to i only.
        size: How many scores a thread has of a tile, about.
        threads: How many threads share a tile: batch items of their own where there are as many.
        onednn: Whether oneDNN multiplies such numbers faster than torch.bmm, where a head has many scores.
        made: All scores, made before: (B H, L, S); None: they are made tile by tile.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None
    heads: int
    is_causal: bool
    size: int
    threads: int
    onednn: bool
    made: Tensor | None = None

    @property
    def uses_onednn(self) -> bool:
        """Whether oneDNN multiplies, one batch item at a time."""
        return self.onednn and self.query.shape[1] * self.key.shape[1] >= SCORES_FOR_ONEDNN

    def tiles(self) -> Iterator[Tile]:
        """Yield the tiles, which cover every score once.

        They are always the same, so that scores made again are the same bit by bit.
        """
        batch, length, keys = self.query.shape[0], self.query.shape[1], self.key.shape[1]
        sharing = 1 if self.uses_onednn else max(1, min(self.threads, batch))
        size = self.size * self.threads // sharing
        rows = max(1, min(length, max(16, size // max(keys, 1))))
        group = 1 if self.uses_onednn else sharing * max(1, size // max(rows * keys, 1))
        varies = self.mask is not None and self.mask.shape[:2].numel() > 1
        extent = self.heads if varies else batch
        if extent:  # groups of about the same size
            group = min(group, sharing * math.ceil(extent / sharing / math.ceil(extent / group)))
        for start in range(0, batch, self.heads) if varies else (0,):
            end = start + self.heads if varies else batch
            for first in range(start, end, group):
                which = slice(first, min(first + group, end))
                for row in range(0, length, rows):
                    stop = min(row + rows, length)
                    yield Tile(which, slice(row, stop), min(keys, stop) if self.is_causal else keys)

    def mask_index(self, tile: Tile) -> tuple[slice | int, ...]:
        """Return which part of the mask lies over a tile."""
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

    def scratch(self) -> Tensor:
        """Return memory for as many numbers as the largest tile has scores."""
        sizes = ((t.batch.stop - t.batch.start) * (t.rows.stop - t.rows.start) * t.keys for t in self.tiles())
        return self.query.new_empty(max(sizes, default=0))

    def scores(self, tile: Tile, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Make the scores of a tile, and the mask of the keys that are excluded.

        Args:
            tile: The tile.
            out: (B H, L, S): where all scores are to lie; None: in memory of their own.
        """
        where = self.made if out is None else out
        part = None if where is None else where[tile.batch, tile.rows, : tile.keys]
        if out is not None or part is None:
            query, key = self.query[tile.batch, tile.rows], self.key[tile.batch, : tile.keys]
            scores = product(query, key.mT, self.uses_onednn, out=part, factor=self.scale)
        else:
            scores = part
        excluded = None
        if self.mask is not None:
            mask = self.mask[self.mask_index(tile)]
            if mask.dtype == torch.bool:
                excluded = ~mask
            else:
                if self.made is None:
                    scores += mask
                excluded = mask <= lowest(mask.dtype)
        elif self.is_causal:
            rows = torch.arange(tile.rows.start, tile.rows.stop)
            excluded = torch.arange(tile.keys) > rows[:, None]
        return scores, excluded
