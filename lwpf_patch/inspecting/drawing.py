"""The picture: what each head keeps and forgets, for some queries, plain above patched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .tokens import Tokens

#: What is forgotten is light where weights near 0 are dark, and has strokes: it is told apart without colours too.
FORGOTTEN, STROKE = "#F1ECE4", "#B9A99A"
MARK = "#FF2D55"
COLOURS = "viridis"
WARNING = "#C1121F"
PLAIN = "plain"
#: Sizes in inches: of a map, between maps, at the sides, and above the first row.
MAP, GAP, MARGIN, TOP = 1.3, 0.12, 0.25, 1.15


class Row(NamedTuple):
    """One query of one layer.

    Attributes:
        layer: The name of the layer.
        query: What the query is called.
        patch: The row and column of the query among :attr:`query_grid`; None: it is no patch.
        query_grid: How many rows and columns the queries have.
        keys: Where the keys lie.
        plain: The weights without the patch, (heads, keys).
        patched: The weights with it.
        forgotten: Which keys are forgotten.
    """

    layer: str
    query: str
    patch: tuple[int, int] | None
    query_grid: tuple[int, int]
    keys: Tokens
    plain: NDArray[Any]
    patched: NDArray[Any]
    forgotten: NDArray[Any]


class _Page:
    """Where things are on a page, in inches from its upper left corner.

    Args:
        rows: The queries.
        heads: How many heads there are.
        image: The image.
    """

    def __init__(self, rows: list[Row], heads: int, image: NDArray[Any]) -> None:
        tall = max(len(_laid_out(row.plain[0], row.keys)[0]) / row.keys.grid[1] for row in rows)
        self.map_width, self.map_height = MAP / max(tall, 1.0) ** 0.5, MAP * tall / max(tall, 1.0) ** 0.5
        self.row_height = 2 * self.map_height + 0.75
        self.image_height = 2 * self.map_height + 0.16
        self.image_width = min(self.image_height * image.shape[1] / image.shape[0], 2 * self.image_height)
        self.left = MARGIN + self.image_width + 0.42
        self.right = self.left + heads * (self.map_width + GAP)
        self.width, self.height = max(self.right + 0.75, 9.2), TOP + len(rows) * self.row_height + 0.12
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Return new axes whose upper left corner is at some place."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def text(self, x: float, y: float, text: str, **looks: Any) -> None:
        """Write text whose upper left corner is at some place."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **{"ha": "left", "va": "top", **looks})


def draw(
    rows: list[Row], heads: list[int], image: NDArray[Any], rule: str, title: str, weights: str, is_random: bool
) -> Figure:
    """Draw a picture.

    Args:
        rows: The queries.
        heads: The numbers of the heads.
        image: The image, (height, width, 3).
        rule: What forgets, in a word.
        title: What is drawn.
        weights: What the weights of the model are.
        is_random: Whether they are random, of which the title warns.
    """
    page = _Page(rows, len(heads), image)
    page.text(MARGIN, 0.16, title, fontsize=14, fontweight="bold")
    page.text(
        MARGIN, 0.47, f"weights: {weights}", fontsize=11,
        color=WARNING if is_random else "#333333", fontweight="bold" if is_random else "normal",
    )  # fmt: skip
    for number, row in enumerate(rows):
        top = TOP + number * page.row_height
        _draw_query(page.axes(MARGIN, top, page.image_width, page.image_height), row, image)
        scale = _scale(row)
        shown: Any = None
        for line, (name, weights_of_heads) in enumerate(((PLAIN, row.plain), (rule, row.patched))):
            y = top + line * (page.map_height + 0.16)
            page.text(
                page.left - 0.1, y + page.map_height / 2, name, rotation=90, ha="right", va="center", fontsize=10.5,
                fontweight="bold",
            )  # fmt: skip
            for column, head in enumerate(heads):
                x = page.left + column * (page.map_width + GAP)
                axes = page.axes(x, y, page.map_width, page.map_height)
                shown = _draw_head(axes, weights_of_heads[column], row.forgotten[column] if line else None, row, scale)
                if line:
                    axes.set_xlabel(f"{row.forgotten[column].mean():.0%} forgotten", fontsize=8.5, labelpad=3)
                else:
                    axes.set_title(f"head {head}", fontsize=9.5, pad=4)
        bar = page.axes(page.right + 0.05, top + 0.25, 0.12, page.image_height - 0.35)
        _draw_scale(page.figure, bar, shown)
    _draw_legend(page, rows)
    return page.figure


def _scale(row: Row) -> float:
    """Return the weight of the brightest colour: nearly the greatest of a patch, plain or patched."""
    import numpy as np

    patches = len(row.keys.prefix)
    weights = np.concatenate([part[:, patches:].ravel() for part in (row.plain, row.patched)])
    weights = weights[np.isfinite(weights)]
    highest = float(np.quantile(weights, 0.995)) if weights.size else 0.0
    return highest or (float(weights.max()) if weights.size else 0.0) or 1.0


def _draw_query(axes: Axes, row: Row, image: NDArray[Any]) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
    if row.patch is not None:
        high, wide = height / row.query_grid[0], width / row.query_grid[1]
        corner = (row.patch[1] * wide, row.patch[0] * high)
        axes.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor="white", linewidth=4))
        axes.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=MARK, linewidth=2.2))
    _bare(axes)
    axes.set_title(f"query: {row.query}", fontsize=10.5, fontweight="bold", pad=4)
    axes.set_xlabel(row.layer, fontsize=9)


def _draw_head(axes: Axes, weights: NDArray[Any], forgotten: NDArray[Any] | None, row: Row, highest: float) -> Any:
    """Draw the weights of a head: the patches, and above them the tokens that are none."""
    import numpy as np
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    keys = row.keys
    laid, blank = _laid_out(weights, keys)
    shown = axes.imshow(np.ma.masked_array(laid, blank), cmap=COLOURS, vmin=0.0, vmax=highest, interpolation="nearest")
    if forgotten is not None:
        gone, blank = _laid_out(forgotten, keys)
        gone = gone.astype(bool) & ~blank
        axes.imshow(np.ma.masked_array(gone, ~gone), cmap=ListedColormap([FORGOTTEN]), interpolation="nearest")
        strokes = [[(x - 0.5, y + 0.5), (x + 0.5, y - 0.5)] for y, x in np.argwhere(gone)]
        axes.add_collection(LineCollection(strokes, colors=STROKE, linewidths=0.5))
    if row.patch is not None and row.query_grid == keys.grid:
        corner = (row.patch[1] - 0.5, row.patch[0] + len(laid) - keys.grid[0] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=1.3))
    _bare(axes)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return shown


def _laid_out(values: NDArray[Any], keys: Tokens) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return values in rows and columns, and which of these are blank."""
    import numpy as np

    rows, columns = keys.grid
    number = len(keys.prefix)
    lines = -(-number // columns)
    above = lines + 1 if number else 0
    laid = np.zeros((above + rows, columns), dtype=values.dtype)
    blank = np.ones(laid.shape, dtype=bool)
    for place in range(number):
        laid[divmod(place, columns)], blank[divmod(place, columns)] = values[place], False
    laid[above:], blank[above:] = values[number:].reshape(rows, columns), False
    return laid, blank


def _draw_scale(figure: Figure, axes: Axes, shown: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(shown, cax=axes, extend="max", ticks=MaxNLocator(4))
    axes.tick_params(labelsize=8)
    bar.ax.set_title("weight", fontsize=9, pad=8)


def _draw_legend(page: _Page, rows: list[Row]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch, Rectangle

    colours = colormaps[COLOURS]
    handles: list[Any] = [
        Rectangle((0, 0), 1, 1, facecolor=colours(0.0)),
        Patch(facecolor=FORGOTTEN, edgecolor=STROKE, hatch="////", linewidth=0.6),
    ]
    names = ["kept, weight near 0", "forgotten: gives no value"]
    if any(row.patch is not None for row in rows):
        handles.append(Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=MARK, linewidth=2))
        names.append("the query's patch")
    prefix = max((row.keys.prefix for row in rows), key=len)
    if prefix:
        handles.append(Rectangle((0, 0), 1, 1, facecolor=colours(0.65)))
        kinds = dict.fromkeys("registers" if name.startswith("register") else name for name in prefix)
        names.append(f"above each map: {', '.join(kinds)}")
    page.figure.legend(
        handles, names, loc="lower left", bbox_to_anchor=(MARGIN / page.width, 0.1 / page.height), borderaxespad=0.0,
        ncols=len(names), fontsize=9.5, frameon=False, handlelength=1.0, handleheight=1.0, columnspacing=1.6,
    )  # fmt: skip


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
