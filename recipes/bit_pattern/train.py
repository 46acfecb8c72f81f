"""Trains a small hflayers network on hflayers' bit patterns: which bags hold one of a few secret patterns? No download.

The set-up is that of hflayers' own example, examples/bit_pattern: the same data, the same six networks and the same
optimiser. A network either leaves everything but the size of its input at the defaults or is "adapted", as the example
calls it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from hflayers import Hopfield, HopfieldLayer, HopfieldPooling
from hflayers.auxiliary.data import BitPatternSet
from torch import Tensor, nn
from tqdm import tqdm

NETWORKS = ("association", "association-adapted", "pooling", "pooling-adapted", "lookup", "lookup-adapted")
BAGS, INSTANCES, BITS, SIGNALS, SIGNALS_PER_BAG = 2048, 16, 8, 8, 1
#: The test bags are so many from either end of the data set, where all bags are positive or all are negative.
TEST_BAGS_PER_CLASS = 256
GRADIENT_NORM = 1.0
ADAPTED = {"hidden_size": 8, "num_heads": 8, "update_steps_max": 3, "scaling": 0.25, "dropout": 0.5}


def main() -> None:
    """Trains, shows the progress, writes the figures."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    train_bags, train_targets, test_bags, test_targets = load_data(options.data_seed)
    torch.manual_seed(options.seed)  # after the data, which sets torch's seed to its own
    # The order of the bags has a generator of its own: it stays the same however much randomness the network uses.
    generator = torch.Generator().manual_seed(options.seed)
    network = build_network(options.network, train_bags)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr)

    epochs = []
    start = time.perf_counter()
    with tqdm(range(1, options.epochs + 1), unit="epoch", disable=options.no_progress or None) as progress:
        for epoch in progress:
            network.train()
            total = 0.0
            for indices in torch.randperm(len(train_bags), generator=generator).split(options.batch_size):
                loss = F.binary_cross_entropy_with_logits(network(train_bags[indices]), train_targets[indices])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
                optimizer.step()
                total += loss.item() * len(indices)
            train_loss = total / len(train_bags)
            test_loss, test_accuracy = evaluate(network, test_bags, test_targets)
            epochs.append(
                {"epoch": epoch, "train_loss": train_loss, "test_loss": test_loss, "test_accuracy": test_accuracy}
            )
            progress.set_description(f"epoch {epoch}", refresh=False)
            progress.set_postfix_str(f"loss {train_loss:.3f}, test accuracy {test_accuracy:.1f} %")
    seconds = time.perf_counter() - start

    if options.output:
        figures = {
            "arguments": vars(options) | {"output": str(options.output)},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "hopfield-layers": version("hopfield-layers"),
            },
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "bags": {"train": len(train_bags), "test": len(test_bags)},
            "seconds": seconds,
            "epochs": epochs,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"test accuracy {epochs[-1]['test_accuracy']:.2f} %, {seconds:.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="pooling",
        metavar="NETWORK",
        help=f"one of {', '.join(NETWORKS)}; association is built of hflayers' Hopfield, lookup of HopfieldLayer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=positive, default=250, help="passes over the training set (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="bags per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order, not of the data (default: 0)")
    parser.add_argument(
        "--data-seed", type=int, default=44, help="seed of the bags, not of the secret patterns (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures here (default: nowhere)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar, not even in a terminal")
    return parser.parse_args()


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the bags.

    Args:
        seed: What the bags depend on.

    Returns:
        Training bags (N, instances, bits) and targets, test bags and targets.
    """
    dataset = BitPatternSet(
        num_bags=BAGS,
        num_instances=INSTANCES,
        num_signals=SIGNALS,
        num_signals_per_bag=SIGNALS_PER_BAG,
        num_bits=BITS,
        seed_data=seed,
    )
    bags, targets = (torch.stack([item[part] for item in dataset]) for part in ("data", "target"))
    test = torch.zeros(BAGS, dtype=torch.bool)
    test[:TEST_BAGS_PER_CLASS] = test[-TEST_BAGS_PER_CLASS:] = True
    return bags[~test], targets[~test], bags[test], targets[test]


def build_network(name: str, train_bags: Tensor) -> nn.Sequential:
    """Build one of the networks, which ends in one logit per bag.

    Args:
        name: Which one.
        train_bags: The training bags; a lookup stores as many patterns as occur in them.
    """
    kind, _, adapted = name.partition("-")
    if kind == "lookup":
        patterns = train_bags.flatten(end_dim=1).unique(dim=0)
        hopfield = HopfieldLayer(
            input_size=BITS,
            quantity=len(patterns),
            lookup_weights_as_separated=bool(adapted),
            lookup_targets_as_trainable=not adapted,
        )
        if adapted:  # what is looked up starts as the patterns that there are
            with torch.no_grad():
                hopfield.lookup_weights.copy_(patterns.unsqueeze(0))
    else:
        module = {"association": Hopfield, "pooling": HopfieldPooling}[kind]
        hopfield = module(input_size=BITS, **(ADAPTED if adapted else {}))
    # Pooling leaves one vector per bag, the others one per instance.
    size = hopfield.output_size * (1 if kind == "pooling" else INSTANCES)
    return nn.Sequential(hopfield, nn.Flatten(), nn.Linear(size, 1), nn.Flatten(start_dim=0))


@torch.inference_mode()
def evaluate(network: nn.Module, bags: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the loss and the accuracy in percent over all bags, taken as one batch."""
    network.eval()
    logits = network(bags)
    loss = F.binary_cross_entropy_with_logits(logits, targets).item()
    return loss, 100 * ((logits > 0) == (targets > 0.5)).double().mean().item()


if __name__ == "__main__":
    main()
