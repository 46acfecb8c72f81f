"""Unpickling: what ``apply`` attached to a model computes only where the code that calls it is patched.

A process that loads a whole model, or is spawned with one as its argument, need not have patched its host. The model
would compute plain, without a word.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import LwpfError
from ..hosting.attachments import refuse_to_ignore
from ..hosts import find_hosts
from ..settings import UNPICKLE, in_words
from . import changing, state


def require_patch(part: Any) -> None:
    """See that the host of a func_d or a feature map that was just unpickled is patched.

    Args:
        part: A :class:`lwpf_patch.attention.OwnedFuncD` or a :class:`lwpf_patch.uhop.HostFeatureMap`.

    Raises:
        ConflictError: It is patched without U-Hop, and the feature map is a trained one.
        LwpfError: It is not patched, and ``LWPF_UNPICKLE`` does not say that it shall be.
    """
    if state.is_patched(part.host, part.site):
        return
    here = state.settings_of(part.host)
    if here is None and UNPICKLE.read(os.environ.get(UNPICKLE.variable, ""), UNPICKLE.variable) == "patch":
        (host,) = find_hosts(part.host, "a pickled model")
        changing.request(host, part.request)
        if state.is_patched(part.host, part.site):
            return
    if here is not None and here.uhop is None and part.request.uhop is not None and hasattr(part, "take_settings"):
        return refuse_to_ignore(part, part.site.rpartition(".")[0])
    raise LwpfError(_message(part, here is None))


def _message(part: Any, unpatched: bool) -> str:
    how = in_words(part.request.describe())
    if not unpatched:
        return (
            f"this model was pickled with {part.host} patched ({how}). Here {part.host} is patched as well, but "
            f"{part.site} is left out, so that it would compute plain: change include= and exclude= "
            "(LWPF_INCLUDE, LWPF_EXCLUDE)"
        )
    return (
        f"this model was pickled with {part.host} patched ({how}). Here {part.host} is not patched, and it would "
        f"compute plain. Call lwpf_patch.apply({part.host!r}, ...) before it is unpickled (in a spawned process not "
        f"under 'if __name__ == \"__main__\":', which it does not run), or set LWPF_PATCH={part.host}, or set "
        f"{UNPICKLE.variable}=patch to have it patched as the model says. If plain is what you want: "
        f'lwpf_patch.apply({part.host!r}, func_d="none")'
    )
