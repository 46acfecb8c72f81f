"""What came of Stage I: for ``status()``, and when the process ends."""

from __future__ import annotations

from . import stage_one
from .host_map import MAPS, SEPARATED_HOSTS


def summary(host: str) -> tuple[int, int]:
    """Return how many feature maps of a host live, and how many of them have been through Stage I."""
    maps = [each for each in MAPS if each.host == host]
    return len(maps), sum(each._separated for each in maps)


def report(host: str) -> str | None:
    """Return what people should know when the process ends: whose Stage I failed or never ran, and why."""
    reasons = [reason for name, reason in stage_one.FAILURES.values() if name == host]
    if reasons:
        return (
            f"{host}: U-Hop's Stage I failed for {len(reasons)} feature maps when it was last tried, and they are as "
            f"they were before: {reasons[-1]}"
        )
    waiting = [each for each in MAPS if each.host == host and not each._separated]
    frozen = [each for each in waiting if each._is_frozen()]
    saw = [each for each in waiting if each._keys is not None and each not in frozen]
    if host in SEPARATED_HOSTS and not saw:
        return None
    if saw:
        why = "no step of an optimizer that has them among its parameters came after their forward passes"
    elif frozen:
        why = (
            "the script has frozen them, and train=true asks for maps that train; train=false separates frozen ones too"
        )
    else:
        why = "it runs after the first step of the torch.optim optimizer that trains the model"
    if host in SEPARATED_HOSTS:
        return (
            f"{host}: U-Hop's Stage I ran in this process, but not on {len(saw)} feature maps that waited for it, and "
            f"are still the identity: {why}"
        )
    return f"{host}: U-Hop was asked for, but Stage I never ran, and every feature map is still the identity: {why}"
