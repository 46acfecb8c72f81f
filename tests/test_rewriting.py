"""Rewriting on functions written for these tests: what is edited, what is refused, and how exactly."""

from __future__ import annotations

import ast
import textwrap

import pytest

from lwpf_patch import RewriteError, rewriting
from lwpf_patch.edits import sdpa_call, softmax_lines
from lwpf_patch.rewriting import Site

SITE = Site("host.layers", "Layer.forward", (sdpa_call, softmax_lines), {})


def plan(body: str, header: str = "def forward(self, q, k, v):") -> rewriting.Plan:
    source = "import torch\n\n\nclass Layer:\n" + textwrap.indent(header + "\n" + textwrap.indent(body, "    "), "    ")
    return rewriting.plan("host/layers.py", source, [SITE])


def changes(plan: rewriting.Plan) -> list[str]:
    return [line.strip() for line in plan.diff().splitlines()[2:] if line[0] in "+-"]


def test_the_two_lines():
    found = changes(plan("attn = q @ k\nattn = attn.softmax(dim=-1)\nattn = self.attn_drop(attn)\nreturn attn @ v\n"))
    assert found == ["+        attn, mask = self.func_d(attn)", "+        attn = mask * attn"]


@pytest.mark.parametrize(
    "body",
    [
        "s = q @ k\ns = s.softmax(-1)\nreturn (s @ v).transpose(1, 2)\n",
        "if q.any():\n    s = q @ k\n    s = s.softmax(dim=-1)\n    o = s @ v\nelse:\n    o = v\nreturn o\n",
        "for i in range(3):\n    s = q @ k\n    s = s.softmax(dim=-1)\n    s = self.drop(s)\n    q = s @ v\nreturn q\n",
    ],
)
def test_shapes_of_the_eager_form(body):
    found = changes(plan(body))
    assert [line.split()[1:] for line in found] == [["s,", "mask", "=", "self.func_d(s)"], ["s", "=", "mask", "*", "s"]]


def test_a_name_that_is_taken_is_not_used():
    found = changes(plan("s = q @ k + mask\ns = s.softmax(-1)\nreturn s @ v\n", "def forward(self, q, k, v, mask):"))
    assert "forget_mask" in found[0]
    assert "forget_mask" in found[1]


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
    "another dimension": ("s = q @ k\ns = s.softmax(dim=1)\nreturn s @ v\n", "that no edit covers"),
    "softmax of another": ("s = q.softmax(dim=-1)\nreturn s @ v\n", "that no edit covers"),
    "one branch only": (
        "if q:\n    s = k.softmax(dim=-1)\n    return s @ v\nreturn F.scaled_dot_product_attention(q, k, v)\n",
        "that no edit covers",
    ),
    "no use": ("s = q @ k\ns = s.softmax(dim=-1)\nreturn s\n", "no 's @ ...' follows the softmax"),
    "something in between": (
        "s = q @ k\ns = s.softmax(dim=-1)\ns = self.mix(s)\nreturn s @ v\n",
        "no 's @ ...' follows the softmax over keys with nothing but dropout in between",
    ),
    "weights used twice": (
        "s = q @ k\ns = s.softmax(dim=-1)\nself.seen = s\nreturn s @ v\n",
        "no 's @ ...' follows the softmax",
    ),
    "two statements in a line": ("s = q @ k; s = s.softmax(dim=-1)\nreturn s @ v\n", "does not begin its line"),
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
            rewriting.plan("host/layers.py", source, [SITE])


def test_the_hash_knows_syntax_and_nothing_else():
    def tree_hash(text: str) -> str:
        return rewriting.tree_hash(ast.parse(text).body[0])

    base = tree_hash("def f(self, q):\n    return q.softmax(dim=-1)\n")
    assert tree_hash('def f(self, q):\n    """Doc."""\n    # comment\n    return q . softmax( dim = -1 )\n') == base
    assert tree_hash("def f(self, q):\n    return q.softmax(dim=-2)\n") != base
    assert tree_hash("def f(self, q, k):\n    return q.softmax(dim=-1)\n") != base
    assert base == "2c7c6b403a253693"  # the same on every version of Python


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
    found = rewriting.plan("host/layers.py", source, [SITE])
    namespace = {}
    exec(compile(source, "host/layers.py", "exec", dont_inherit=True), namespace)
    before, after = found.compile()["Layer.forward"]
    function = namespace["Layer"].forward
    assert function.__code__ == before
    function.__code__ = after

    import torch

    layer = namespace["Layer"]()
    layer.func_d = lambda scores: (scores, torch.zeros_like(scores))
    out, kept = layer.forward(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    assert out.tolist() == [[0, 0], [0, 0]]
    assert kept == [1]
