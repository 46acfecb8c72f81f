"""A plan and its compiled code as bytes, for a later process with the same Python."""

from __future__ import annotations

import dataclasses
import hashlib
import marshal
from types import CodeType

from .plan import Codes, Plan, Statement, enter

#: At the start of what is packed: the hash of the rest.
_HASH = hashlib.sha256().digest_size


def pack(plan: Plan, codes: Codes) -> bytes:
    """Return a plan and its code as bytes, without its source."""
    statements = tuple(dataclasses.astuple(each) for each in plan.statements)
    data = marshal.dumps((plan.patched, dict(plan.hashes), statements, codes))
    return hashlib.sha256(data).digest() + data


def unpack(packed: bytes, module: str, path: str, source: str) -> tuple[Plan, Codes] | None:
    """Return a plan and its code; None: the bytes are not what :func:`pack` has returned.

    Args:
        packed: The bytes.
        module: The module's name.
        path: The file of its source.
        source: Its source, which was planned for.
    """
    checked, data = packed[:_HASH], packed[_HASH:]
    if hashlib.sha256(data).digest() != checked:
        return None
    patched, hashes, statements, codes = marshal.loads(data)
    plan = Plan(module, path, source, patched, hashes, tuple(Statement(*each) for each in statements))
    filename = enter(plan)
    return plan, {name: (before, _named(after, filename)) for name, (before, after) in codes.items()}


def _named(code: CodeType, filename: str) -> CodeType:
    """Return code of another file name: what a source is called depends on those that the process has seen before."""
    if code.co_filename == filename:
        return code
    parts = tuple(_named(part, filename) if isinstance(part, CodeType) else part for part in code.co_consts)
    return code.replace(co_filename=filename, co_consts=parts)
