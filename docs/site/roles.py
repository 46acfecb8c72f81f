"""An extension of griffe: roles of Sphinx in docstrings, such as :func:`apply`, become links or code."""

from __future__ import annotations

import re
from typing import Any

import griffe

import lwpf_patch
from lwpf_patch import hosting

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`([\w.]+)`")
_PLACES = {f"{module.__name__}.{name}" for module in (lwpf_patch, hosting) for name in module.__all__}


class Roles(griffe.Extension):
    """Replace the roles in each docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)


def _link(match: re.Match[str]) -> str:
    name = match[1]
    for place in (name, f"lwpf_patch.{name}", f"lwpf_patch.hosting.{name}"):
        if place in _PLACES:
            return f"[`{name}`][{place}]"
    return f"`{name}`"
