"""What ``apply`` attaches to the modules of a host: a func_d, a feature map. Nothing here imports torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

#: Sets the state of an attached part that is unpickled, and sees that its host is patched there. It is named in every
#: pickle, so that a process that loads one imports what it needs. Set by lwpf_patch.patching.registry.
set_state_of: Callable[[Any, Any], None] | None = None
#: Decides which attention modules of the model that a func_d belongs to forget, where ``blocks`` was asked for. Set by
#: lwpf_patch.patching.deciding.
decide: Callable[[Any], None] | None = None


class Attached:
    """Base class, beside ``nn.Module``, of what an attention module of a host owns.

    Attributes:
        host: The host's name; empty in a model that stays plain.
        attached: Whether ``apply()`` put it there, and ``revert()`` may take it away.
        site: Of an attached one: the function whose patched code calls it.
        request: Of an attached one: the settings that the host is patched with.
    """

    if TYPE_CHECKING:  # torch.jit.script would read these, and knows no Any
        host: str
        attached: bool
        site: str
        request: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = ""
        self.attached = False
        self.site = ""
        self.request = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, state = self._reduced()
        if not (self.attached and self.host):
            return make, arguments, state
        return make, arguments, state, None, None, set_state_of

    def _reduced(self) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(4)
        assert isinstance(reduced, tuple)
        return reduced[:3]

    def __copy__(self) -> Any:
        make, arguments, state = self._reduced()
        copied = make(*arguments)
        copied.__setstate__(dict(state))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Copies within the process need no check: where the original runs, they do as well.
        make, arguments, state = self._reduced()
        copied = memo[id(self)] = make(*arguments)
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied
