"""Rewriting on functions written for these tests: what is edited, what is refused, and how exactly."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
import record_sources

from lwpf_patch import RewriteError, rewriting
from lwpf_patch.hosts import known
from lwpf_patch.rewriting import forget_around_softmax, hide
from lwpf_patch.rewriting.plan import tree_hash

EDITS = {"Layer.forward": [forget_around_softmax]}


def plan(body: str, header: str = "def forward(self, q, k, v):") -> rewriting.Plan:
    source = "import torch\n\n\nclass Layer:\n" + textwrap.indent(header + "\n" + textwrap.indent(body, "    "), "    ")
    return rewriting.plan("host.layers", "host/layers.py", source, EDITS)


def changes(plan: rewriting.Plan) -> list[str]:
    return [line.strip() for line in plan.diff().splitlines()[2:] if line[0] in "+-"]


class FuncD:
    """What the patched code calls, made of a function; it normalises by the softmax."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments, **options):
        return self.function(*arguments, **options)

    def normalise(self, scores, dim=-1):
        return scores.softmax(dim)

    def softmax(self, scores, dim=-1):
        forgotten, mask = self(scores)
        return mask * self.normalise(forgotten, dim)

    def show_weights(self, weights):
        pass


def test_the_softmax():
    found = changes(plan("attn = q @ k\nattn = attn.softmax(dim=-1)\nattn = self.attn_drop(attn)\nreturn attn @ v\n"))
    assert found == ["-        attn = attn.softmax(dim=-1)", "+        attn = self.func_d.softmax(attn, dim=-1)"]


@pytest.mark.parametrize(
    ("call", "becomes"),
    [
        ("s.softmax(-1)", "s, dim=-1"),
        ("F.softmax(s, dim=-1)", "s, dim=-1"),
        ("torch.softmax(q @ k, -1)", "q @ k, dim=-1"),
        ("nn.functional.softmax(s, dim=-1)", "s, dim=-1"),
        ("self.softmax(s)", "s, dim=-1"),
        ("(q.transpose(-2, -1) @ k).softmax(dim=-1)", "q.transpose(-2, -1) @ k, dim=-1"),
    ],
)
def test_every_spelling_of_it(call, becomes):
    for body in (f"s = q @ k\ns = {call}\nreturn s @ v\n", f"for i in range(3):\n    q = ({call}) @ v\nreturn q\n"):
        added = [line for line in changes(plan(body)) if line[0] == "+"]
        assert len(added) == 1
        assert f"self.func_d.softmax({becomes})" in added[0]


@pytest.mark.parametrize("parameters", ["self, q, k, v, mask", "self, q, k, v, *, mask=None"])
def test_a_mask_with_a_number_of_its_own(parameters):
    body = '"""Doc."""\ns = q @ k + mask\ns = s.softmax(-1)\nreturn s @ v\n'
    source = f"class Layer:\n    def forward({parameters}):\n" + textwrap.indent(body, "        ")
    edits = {"Layer.forward": [hide("mask", -100.0), forget_around_softmax]}
    found = rewriting.plan("host.layers", "host/layers.py", source, edits)
    assert changes(found)[0] == "+        mask = self.func_d.with_infinity(mask, -100.0)"
    with pytest.raises(RewriteError, match="has no parameter other"):
        rewriting.plan("host.layers", "host/layers.py", source, {"Layer.forward": [hide("other", -100.0)]})


@pytest.mark.parametrize("call", ["F.scaled_dot_product_attention", "torch.nn.functional.scaled_dot_product_attention",
                                  "scaled_dot_product_attention"])  # fmt: skip
def test_the_call(call):
    found = changes(plan(f"x = 'ä'; x = {call}(q, k, v,  # kept: é\n    attn_mask=None)\nreturn x\n"))
    assert found == [
        f"-        x = 'ä'; x = {call}(q, k, v,  # kept: é",
        "+        x = 'ä'; x = self.func_d.scaled_dot_product_attention(q, k, v,  # kept: é",
    ]


REFUSED = {
    "nothing to edit": ("return q\n", "layers.py:5 has no softmax over keys"),
    "another dimension": ("s = q @ k\ns = s.softmax(dim=1)\nreturn s @ v\n", "that no edit covers: s.softmax(dim=1)"),
    "another dtype": ("s = F.softmax(q @ k, dim=-1, dtype=q.dtype)\nreturn s @ v\n", "that no edit covers"),
    "no dimension": ("s = F.softmax(q @ k)\nreturn s @ v\n", "that no edit covers"),
    "a dropout of the scores": (
        "s = self.attn_drop(q @ k)\ns = s * 2\nreturn s.softmax(dim=-1) @ v\n",
        "a dropout stands before the softmax, in line 6, and not behind it: s = self.attn_drop(q @ k)",
    ),
    "a dropout in the softmax": (
        "return F.softmax(F.dropout(q @ k), dim=-1) @ v\n",
        "and not behind it: F.dropout(q @ k)",
    ),
    "one branch only": (
        "if q:\n    s = softmax(k, dim=-1)\n    return s @ v\nreturn F.scaled_dot_product_attention(q, k, v)\n",
        "that no edit covers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_shapes_are_refused_by_name(case):
    body, message = REFUSED[case]
    with pytest.raises(
        RewriteError, match=r"host.layers.Layer.forward cannot be patched: .*host/layers.py:\d"
    ) as caught:
        plan(body)
    assert message in str(caught.value)


def test_a_site_that_is_missing_or_there_twice():
    twice = "class Layer:\n    def forward(self): pass\n    def forward(self): pass\n"
    for source, what in (("class Layer: pass\n", "is not defined"), (twice, "defined 2 times")):
        with pytest.raises(RewriteError, match=what):
            rewriting.plan("host.layers", "host/layers.py", source, EDITS)


def test_the_hash_knows_syntax_and_nothing_else():
    def hash_of(text: str) -> str:
        return tree_hash(ast.parse(text).body[0])

    base = hash_of("def f(self, q):\n    return q.softmax(dim=-1)\n")
    assert hash_of('def f(self, q):\n    """Doc."""\n    # comment\n    return q . softmax( dim = -1 )\n') == base
    assert hash_of("def f(self, q):\n    return q.softmax(dim=-2)\n") != base
    assert hash_of("def f(self, q, k):\n    return q.softmax(dim=-1)\n") != base
    assert base == "2c7c6b403a253693"  # the same on every version of Python


IMPORTS = """
from __future__ import annotations
import torch, math  # two
import os.path as F
from torch import nn, \\
    Tensor
from torch.nn import (
    functional as G,  # one of (two)
    Module,
)
try:
    from torch.nn import functional as H
except ImportError:
    import functional as H

"""


@pytest.mark.parametrize("name", ["torch", "F", "nn", "G", "H", "self"])
def test_a_statement_alone_gives_the_code_of_the_module(name):
    """Names that the module imports are called in another way by Python 3.11; those in a branch are not foreseen."""
    source = IMPORTS + textwrap.dedent(f"""
        class Layer(Module):
            text = '''
        not the end of it'''

            @staticmethod
            def other(x: Tensor):
                return super

            def forward(self, q: Tensor, k, v):
                s = {name}.matmul(q, k)
                s = s.softmax(dim=-1)
                return s @ v

        after = 1
    """)
    found = rewriting.plan("host.layers", "host/layers.py", source, EDITS)
    live = compile(source, "host/layers.py", "exec", dont_inherit=True)
    (layer,) = (code for code in live.co_consts if getattr(code, "co_name", "") == "Layer")
    (forward,) = (code for code in layer.co_consts if getattr(code, "co_name", "") == "forward")
    assert found.compile(whole=True)["Layer.forward"][0] == forward
    before, after = found.compile()["Layer.forward"]
    assert before == forward or name == "H"
    assert (after == found.compile(whole=True)["Layer.forward"][1]) == (before == forward)


@pytest.mark.parametrize(
    "before", ["", "x = f(\n    1)\n", "# a comment\n\n", "@deco\n", "@deco(\n    1)\n# and\n\n", "@deco(\n    1,\n)\n"]
)
def test_a_function_alone_gives_the_code_of_the_module(before):
    source = f"import torch\n{before}def attend(q, k, v):\n    a = q @ k\n    a = a.softmax(dim=-1)\n    return a @ v\n"
    found = rewriting.plan("host.layers", "layers.py", source, {"attend": [forget_around_softmax]})
    assert found.compile()["attend"] == found.compile(whole=True)["attend"]
    (function,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    assert found.hashes["attend"] == tree_hash(function)


def test_super_closures_and_defaults_survive():
    source = textwrap.dedent('''
        class Base:
            def forward(self, q, k, v):
                return 1

        class Layer(Base):
            def forward(self, q, k, v, *, factor=3):
                """Doc."""
                keep = [super().forward(q, k, v) for _ in range(1)] if False else [super().forward(q, k, v)]
                s = q @ k
                s = s.softmax(dim=-1)
                return (s @ v) * factor, keep
    ''')
    found = rewriting.plan("host.layers", "host/layers.py", source, EDITS)
    namespace = {}
    exec(compile(source, "host/layers.py", "exec", dont_inherit=True), namespace)
    before, after = found.compile()["Layer.forward"]
    function = namespace["Layer"].forward
    assert function.__code__ == before
    function.__code__ = after

    import torch

    layer = namespace["Layer"]()
    layer.func_d = FuncD(lambda scores: (scores, torch.zeros_like(scores)))
    out, kept = layer.forward(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    assert out.tolist() == [[0, 0], [0, 0]]
    assert kept == [1]


# --- functions of the shapes of hflayers and DeepRC, written for these tests ------------------------------

LOOP = """
def retrieve(q, k, v, steps=1, training=True):
    xi = None
    for _ in range(steps):
        attn_output_weights = torch.bmm(q, k)
        if xi is None:
            xi = nn.functional.softmax(attn_output_weights, dim=-1)
        else:
            xi = 0.5 * xi + 0.5 * nn.functional.softmax(attn_output_weights, dim=-1)
        q = torch.bmm(xi, k.transpose(1, 2))
    attn_output_weights = nn.functional.dropout(xi, p=0.0, training=training)
    attn_output = torch.bmm(attn_output_weights, v)
    return attn_output
"""

BAGS = """
class Bags:
    def forward(self, emb_seqs, attention_weights):
        for _ in range(1):
            attention_weights = torch.softmax(attention_weights, dim=0)
            emb_seqs_after_attention = emb_seqs * attention_weights
        return emb_seqs_after_attention.sum(0)
"""


def _run(source: str, qualname: str, edit) -> tuple:
    import torch

    found = rewriting.plan("host", "host.py", source, {qualname: [edit]}, ["func_d"])
    plain, patched = {"torch": torch, "nn": torch.nn}, {"torch": torch, "nn": torch.nn}
    exec(compile(source, "host.py", "exec", dont_inherit=True), plain)
    exec(compile(found.patched, "patched.py", "exec", dont_inherit=True), patched)
    return plain, patched, found


def test_the_update_loop_of_hflayers():
    import torch

    from lwpf_patch import ReLU
    from lwpf_patch.hosts.hflayers import forget_in_update_loop

    plain, patched, _ = _run(LOOP, "retrieve", forget_in_update_loop)
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(2, 5, 4)
    steps = []

    def relu(scores, training):
        steps.append(training)
        return ReLU()(scores)

    out = patched["retrieve"](q, k, v, 2, training=False, func_d=FuncD(relu))
    assert steps == [False, False]
    xi = torch.bmm(q, k).relu().softmax(-1)
    scores = torch.bmm(torch.bmm(xi, k.transpose(1, 2)), k)
    xi = 0.5 * xi + 0.5 * scores.relu().softmax(-1)
    torch.testing.assert_close(out, torch.bmm((scores > 0) * xi, v))
    everything = patched["retrieve"](q, k, v, func_d=FuncD(lambda scores, training: (scores, 1.0)))
    assert torch.equal(everything, plain["retrieve"](q, k, v))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("if xi is None:", "if xi == None:", "no 'if xi is None:' with the softmax"),
        (
            "else:\n            xi = 0.5 * xi + 0.5 * nn.functional.softmax",
            "else:\n            xi = max",
            "in both arms",
        ),
        ("attn_output = torch.bmm(attn_output_weights, v)", "attn_output = attn_output_weights @ v", "right after the"),
        ("training=True):", "training=True, **more):", "its parameters are not of a kind"),
    ],
)
def test_other_update_loops_are_refused(old, new, message):
    from lwpf_patch.hosts.hflayers import forget_in_update_loop

    assert old in LOOP
    with pytest.raises(RewriteError, match=r"host.retrieve cannot be patched: host.py:\d") as caught:
        _run(LOOP.replace(old, new), "retrieve", forget_in_update_loop)
    assert message in str(caught.value)


def test_calls_get_the_func_d_of_their_module():
    from lwpf_patch.hosts.hflayers import pass_parts

    call = "hopfield_core_forward(\n            1, a=2,  # kept\n        )\n"
    source = f"class Core:\n    def forward(self):\n        return {call}"
    _, _, found = _run(source, "Core.forward", pass_parts)
    assert "            1, a=2, func_d=self.func_d,  # kept\n        )\n" in found.patched
    with pytest.raises(RewriteError, match="does not call hopfield_core_forward"):
        _run("class Core:\n    def forward(self):\n        return 1\n", "Core.forward", pass_parts)


def test_the_bags_of_deeprc():
    import torch

    from lwpf_patch import ReLU
    from lwpf_patch.hosts.deeprc import forget_in_bags

    _, patched, _ = _run(BAGS, "Bags.forward", forget_in_bags)
    embedded, scores = torch.randn(6, 4), torch.randn(6, 1)
    bags = patched["Bags"]()
    bags.func_d = FuncD(lambda scores, dim: ReLU()(scores, dim=dim))
    weights = (scores > 0) * scores.relu().softmax(0)
    torch.testing.assert_close(bags.forward(embedded, scores), (weights * embedded).sum(0))
    with pytest.raises(RewriteError, match=r"no edit covers: torch.softmax\(attention_weights, dim=1\)"):
        _run(BAGS.replace("dim=0", "dim=1"), "Bags.forward", forget_in_bags)


def test_recording_what_is_recorded_changes_nothing(monkeypatch, capsys):
    file = Path(known.__file__).with_name("known.json")
    before = file.read_text()
    monkeypatch.setattr("sys.argv", ["record_sources.py", "timm"])
    record_sources.main()
    assert "Attention.forward" in capsys.readouterr().out
    assert file.read_text() == before
