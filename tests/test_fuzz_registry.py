"""apply, revert, patched and patch_model in any order: who is patched with what, seen in what every module computes."""

from __future__ import annotations

import contextlib
import copy
import pickle
from dataclasses import dataclass

import fuzzing
import oracle
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import Forgetting
from timm.layers.attention import Attention, AttentionRope
from vits import FUNC_DS, set_fused

import lwpf_patch

pytestmark = fuzzing.timeout

CLASSES = (Attention, AttentionRope)
PLAIN = {cls: cls.forward.__code__ for cls in CLASSES}
MAKERS = {cls: {name: vars(cls).get(name) for name in ("__init__", "__setstate__")} for cls in CLASSES}


@dataclass(frozen=True)
class Asked:
    """What was asked for."""

    func_d: str
    masking: str = "exclude"
    include: str | None = None

    def options(self) -> dict[str, str | None]:
        return {"func_d": self.func_d, "masking": self.masking, "include": self.include}

    def concerns(self, cls: type) -> bool:
        return self.include is None or self.include == f"*.{cls.__name__}"


SETTINGS = st.builds(
    Asked,
    st.sampled_from(list(FUNC_DS)),
    st.sampled_from(["exclude", "paper"]),
    st.sampled_from([None, None, "*.Attention", "*.AttentionRope"]),
)
WRONG = [{"func_d": "reul"}, {"masking": "papr"}, {"include": "*Swin*"}, {"func_d": "pfu:mu=1e39"}, {"exclude": "*"}]
WHICH = st.integers(0, 10)


class Patching(RuleBasedStateMachine):
    """Modules of timm, the state that they should be in, and how they came to it."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Asked | None = None
        self.blocks: list[tuple[contextlib.AbstractContextManager[None], Asked | None]] = []
        self.modules: list[torch.nn.Module] = []
        self.own: dict[int, Asked] = {}  # the settings that patch_model gave a module

    @initialize(cls=st.sampled_from(CLASSES), fused=st.booleans())
    def begin(self, cls, fused):
        self.make(cls, fused)

    # apply and revert inside a block of patched() are not asked about: the block's end restores what was before it.
    @precondition(lambda self: not self.blocks)
    @rule(asked=SETTINGS)
    def apply(self, asked):
        lwpf_patch.apply("timm", **asked.options())
        self.state = asked

    @precondition(lambda self: not self.blocks)
    @rule()
    def revert(self):
        lwpf_patch.revert("timm")
        self.state = None

    @rule(options=st.sampled_from(WRONG))
    def ask_for_what_there_is_not(self, options):
        with pytest.raises(lwpf_patch.SettingsError):
            lwpf_patch.apply("timm", **options)
        with pytest.raises(lwpf_patch.SettingsError), lwpf_patch.patched("timm", **options):
            pass

    @precondition(lambda self: len(self.blocks) < 3)
    @rule(asked=SETTINGS)
    def enter(self, asked):
        block = lwpf_patch.patched("timm", **asked.options())
        block.__enter__()
        self.blocks.append((block, self.state))
        self.state = asked

    @precondition(lambda self: self.blocks)
    @rule(fails=st.booleans())
    def leave(self, fails):
        block, self.state = self.blocks.pop()
        error = ZeroDivisionError() if fails else None
        assert not block.__exit__(type(error) if fails else None, error, None)

    @precondition(lambda self: len(self.modules) < 4)
    @rule(cls=st.sampled_from(CLASSES), fused=st.booleans())
    def make(self, cls, fused):
        module = cls(8, num_heads=2).double().eval()
        set_fused(module, fused)
        self.modules.append(module)

    @precondition(lambda self: len(self.modules) < 4)
    @rule(which=WHICH, pickled=st.booleans())
    def duplicate(self, which, pickled):
        module = self.modules[which % len(self.modules)]
        twin = pickle.loads(pickle.dumps(module)) if pickled else copy.deepcopy(module)
        self.modules.append(twin)
        if id(module) in self.own:
            self.own[id(twin)] = self.own[id(module)]

    @rule(which=WHICH, asked=SETTINGS)
    def patch_one(self, which, asked):
        module = self.modules[which % len(self.modules)]
        lwpf_patch.patch_model(module, func_d=asked.func_d, masking=asked.masking)
        self.own[id(module)] = asked

    @rule(which=WHICH)
    def unpatch_one(self, which):
        module = self.modules[which % len(self.modules)]
        assert bool(lwpf_patch.unpatch_model(module)) == (id(module) in self.own)
        self.own.pop(id(module), None)

    @invariant()
    def the_code_is_the_one_that_was_asked_for(self):
        for cls in CLASSES:
            patched = self.state is not None and self.state.concerns(cls)
            assert (cls.forward.__code__ is not PLAIN[cls]) == patched
            if not patched:
                assert {name: vars(cls).get(name) for name in MAKERS[cls]} == MAKERS[cls]
        status = lwpf_patch.status()["hosts"]["timm"]
        assert status["state"] == ("off" if self.state is None else "patched")

    @invariant()
    def every_module_computes_what_was_asked_for(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, 8, dtype=torch.float64, generator=generator)
        mask = torch.tensor([[True, True, False]] * 3)
        for module in self.modules:
            cls = AttentionRope if isinstance(module, AttentionRope) else Attention
            shared = self.state if self.state is not None and self.state.concerns(cls) else None
            asked = self.own.get(id(module), shared)
            with torch.no_grad():
                got = module(x, attn_mask=mask)
                expected = oracle.timm_attention(
                    module, x, func_d=Forgetting("none") if asked is None else FUNC_DS[asked.func_d], attn_mask=mask,
                    masking="exclude" if asked is None else asked.masking,
                )  # fmt: skip
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, equal_nan=True)
            assert hasattr(module, "func_d") == (asked is not None)

    def teardown(self) -> None:
        while self.blocks:
            self.blocks.pop()[0].__exit__(None, None, None)
        lwpf_patch.revert()
        for cls in CLASSES:
            assert cls.forward.__code__ is PLAIN[cls]


TestPatching = Patching.TestCase
TestPatching.settings = fuzzing.fuzz(5, stateful_step_count=12)
