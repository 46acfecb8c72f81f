"""Draws the pictures of the documentation, in a checkout with the extras timm and plots: `python docs/images/draw.py`.

`forgotten_keys.png`: the small vision transformer of recipes/digits, trained with ReLU for some seconds, and which
patches of some digits each head of its last layer keeps. `forgetting.png`: scores, and the weights that become of them.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import lwpf_patch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "recipes" / "digits"))
plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "hatch.linewidth": 0.6, "hatch.color": "#707878"})
SEEN, FORGOTTEN, PLAIN = "#00897b", "#c0c8c8", "#5c6bc0"


def main() -> None:
    """Draw both pictures."""
    draw_rule(HERE / "forgetting.png")
    draw_digits(HERE / "forgotten_keys.png")


def draw_rule(path: Path) -> None:
    """Draw the scores of a query, its weights under softmax, and those under ReLU."""
    scores = torch.tensor([2.0, 1.2, 0.5, -0.3, -0.8, -1.6])
    forgotten, kept = lwpf_patch.ReLU()(scores[None])
    plain, shares = scores.softmax(0), forgotten[0].softmax(0)
    figure, panels = plt.subplots(1, 3, figsize=(8, 2.4), layout="constrained", sharex=True)
    keys = range(1, len(scores) + 1)
    panels[0].bar(keys, scores, color=PLAIN)
    panels[0].axhline(0, color="black", linewidth=0.8)
    panels[0].set_title("scores s")
    panels[1].bar(keys, plain, color=PLAIN)
    panels[1].set_title("weights: softmax(s)")
    panels[2].bar(keys, shares.where(kept[0], torch.tensor(0.0)), color=SEEN, label="kept")
    lost = shares.where(~kept[0], torch.tensor(0.0))
    panels[2].bar(keys, lost, color="none", edgecolor=FORGOTTEN, hatch="////", label="forgotten: no value")
    panels[2].set_title("with ReLU: D'(s) · softmax(D(s))")
    panels[2].legend(frameon=False, fontsize=8, loc="upper right")
    panels[2].sharey(panels[1])
    for panel in panels:
        panel.set_xlabel("key")
        panel.set_xticks(list(keys))
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_digits(path: Path) -> None:
    """Draw digits, and below each which patches the heads of the last layer keep, as a mean over the queries."""
    images, maps = trained()
    heads = maps.kept.shape[1]
    figure, panels = plt.subplots(1 + heads, len(images), figsize=(8, 5.6), layout="constrained")
    top = float(maps.weights[..., 1:].mean(2).max())
    for column, image in enumerate(images):
        panels[0, column].imshow(image[0], cmap="gray_r")
        for head in range(heads):
            panel = panels[1 + head, column]
            # The first key is the class token.
            weights = maps.weights[column, head, :, 1:].mean(0).reshape(4, 4)
            kept = maps.kept[column, head, :, 1:].float().mean(0).reshape(4, 4)
            panel.imshow(weights, cmap="GnBu", vmin=0, vmax=top)
            for row, place in (kept < 0.5).nonzero().tolist():
                panel.fill_between([place - 0.5, place + 0.5], row - 0.5, row + 0.5, facecolor="#eceff0", hatch="////")
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for row, name in enumerate(["image", *(f"head {head}" for head in range(heads))]):
        panels[row, 0].set_ylabel(name)
    save(figure, path)


def trained() -> tuple[Tensor, lwpf_patch.AttentionMap]:
    """Train the model of recipes/digits with ReLU; return images of eight digits, and the map of the last layer."""
    import train  # the script of the recipe

    torch.manual_seed(0)
    torch.set_num_threads(1)
    setup = train.SET_UPS[28]
    (images, labels), (test_images, test_labels), _ = train.load_data(setup, noise=0.0)
    model = train.build_model(setup, setup.init)
    lwpf_patch.patch_model(model, func_d="relu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, weight_decay=0.05)
    steps = setup.epochs * math.ceil(len(images) / 64)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, train.warm_up_and_cosine(steps))
    for _ in range(setup.epochs):
        for places in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[places]), labels[places]).backward()
            optimizer.step()
            scheduler.step()
    print("test loss and accuracy:", train.evaluate(model, test_images, test_labels))
    chosen = torch.stack([test_images[test_labels == digit][0] for digit in range(8)])
    return chosen, lwpf_patch.attention_maps(model, chosen)["blocks.2.attn"]


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture, and say how large it is."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
