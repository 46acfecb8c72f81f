"""The Hopfield layers, patched, against the oracle: every option, every iteration, both ways of masking."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from conftest import require_host

require_host("hflayers")

import hflayers.functional  # noqa: E402
import oracle  # noqa: E402
from hflayers import Hopfield, HopfieldLayer, HopfieldPooling  # noqa: E402
from hflayers.activation import HopfieldCore  # noqa: E402
from hflayers.transformer import HopfieldDecoderLayer, HopfieldEncoderLayer  # noqa: E402
from oracle import Forgetting  # noqa: E402
from oracle_hflayers import hopfield_core  # noqa: E402
from seps import SEPS  # noqa: E402

import lwpf_patch  # noqa: E402

FUNC_DS = {
    "relu": Forgetting("relu"),
    "pfu:mu=0.02,bias=-0.2,sigma=0": Forgetting("pfu", 0.02, -0.2),
    "pfu:sigma=0": Forgetting("pfu", "dmedian", "mu"),
}
NOTHING = "pfu:mu=-inf,bias=0,sigma=0"
L, S, N, E = 4, 6, 2, 8

#: How a core is made, and how it is called.
CASES: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {}),
    "three steps": ({}, dict(update_steps_max=3)),
    "until convergence": ({}, dict(update_steps_max=None, update_steps_eps=1e-3)),
    "steps of each head": ({}, dict(update_steps_max=torch.tensor([0, 3]))),
    "scaling": ({}, dict(scaling=0.7, update_steps_max=2)),
    "scaling of each head": ({}, dict(scaling=torch.tensor([0.4, 1.3]), update_steps_max=2)),
    "static key": (dict(key_as_static=True), {}),
    "static query": (dict(query_as_static=True), {}),
    "static value": (dict(value_as_static=True), {}),
    "normalised": (dict(normalize_pattern=True), dict(update_steps_max=2)),
    "affine norm": (dict(normalize_pattern=True, normalize_pattern_affine=True, head_dim=4), {}),
    "other sizes": (dict(head_dim=3, pattern_dim=5, out_dim=7), {}),
    "connected value": (dict(value_as_connected=True), {}),
    "no bias": (dict(bias=False), {}),
    "a zero key": (dict(add_zero_attn=True), {}),
    "no output projection": (dict(disable_out_projection=True), {}),
    "everything returned": ({}, dict(return_raw_associations=True, return_pattern_projections=True)),
}


def _masks() -> dict[str, dict]:
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, -2:] = True
    hidden = (torch.rand(L, S) < 0.3) & (torch.arange(S) > 0)
    bias = torch.randn(L, S, dtype=torch.float64)
    return {
        "none": {},
        "padding": dict(key_padding_mask=padding),
        "boolean": dict(attn_mask=hidden),
        "boolean, 3 dimensions": dict(attn_mask=hidden.expand(2 * N, L, S).clone()),
        "additive": dict(attn_mask=bias),
        "additive with -inf, and padding": dict(
            attn_mask=bias.masked_fill(hidden, -torch.inf), key_padding_mask=padding
        ),
    }


def _core(**options) -> HopfieldCore:
    core = HopfieldCore(embed_dim=E, num_heads=2, **options).double()
    for parameter in core.parameters():  # hflayers starts with scores near 0
        torch.nn.init.normal_(parameter, std=0.35)
    return core


def _patterns(core: HopfieldCore) -> list[torch.Tensor]:
    dims = (core.head_dim if core.query_as_static else E, core.head_dim if core.key_as_static else E,
            core.pattern_dim if core.value_as_static else E)  # fmt: skip
    shapes = [(L, N, dims[0]), (S, N, dims[1]), (S, N, dims[2])]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _compare(core: HopfieldCore, call: dict, **oracle_options) -> None:
    inputs = _patterns(core)
    ours = core(*inputs, **call)
    expected = hopfield_core(core, *inputs, **call, **oracle_options)
    assert len(ours) == len(expected)
    for got, wanted in zip(ours, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            oracle.assert_equal(got, wanted)
    leaves = [*inputs, *(p for p in core.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(ours[0])
    got = torch.autograd.grad(ours[0], leaves, cotangent, materialize_grads=True)
    wanted = torch.autograd.grad(expected[0], leaves, cotangent, materialize_grads=True)
    allowed = _moved_by_rounding(core, inputs, cotangent, wanted, leaves, call, oracle_options)
    for ours_grad, oracle_grad in zip(got, wanted, strict=True):
        oracle.assert_equal(ours_grad, oracle_grad, *wanted, allowed=allowed)


def _moved_by_rounding(core, inputs, cotangent, wanted, leaves, call, oracle_options) -> float:
    """How far the oracle's gradients may move by rounding where there are several iterations.

    Each iteration multiplies the rounding of the ones before, by a factor that
    depends on the patterns; a step rounds some hundred times.
    """
    if "update_steps_max" not in call:
        return 0.0
    rounded = [(each.detach() * (1 + 2**-52 * torch.randint_like(each, -1, 2))).requires_grad_() for each in inputs]
    outputs = hopfield_core(core, *rounded, **call, **oracle_options)[0]
    moved = torch.autograd.grad(outputs, [*rounded, *leaves[len(rounded) :]], cotangent, materialize_grads=True)
    return 200 * max(float((a - b).abs().max()) for a, b in zip(moved, wanted, strict=True) if a.numel())


@pytest.mark.drawn(cases=15)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("func_d", FUNC_DS)
def test_the_core_equals_the_oracle(func_d, case):
    lwpf_patch.apply("hflayers", func_d=func_d)
    making, calling = CASES[case]
    _compare(_core(**making), calling, func_d=FUNC_DS[func_d])


@pytest.mark.drawn(cases=12)
@pytest.mark.parametrize("mask", _masks())
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("func_d", FUNC_DS)
def test_masks_equal_the_oracle(func_d, steps, mask):
    lwpf_patch.apply("hflayers", func_d=func_d)
    _compare(_core(), {"update_steps_max": steps, **_masks()[mask]}, func_d=FUNC_DS[func_d])


#: The official PFU is NaN wherever a key is hidden, so that there only ReLU has something to compare.
PAPER = [(f, m) for f in FUNC_DS for m in _masks() if f == "relu" or m in ("none", "additive")]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("func_d", "mask"), PAPER)
def test_paper_masking_equals_the_oracle(func_d, mask, steps):
    lwpf_patch.apply("hflayers", func_d=func_d, masking="paper")
    core = _core().eval()  # in training the official threshold is float32
    _compare(core, {"update_steps_max": steps, **_masks()[mask]}, func_d=FUNC_DS[func_d], masking="paper")


def test_the_noise_of_training_is_drawn_in_every_iteration():
    lwpf_patch.apply("hflayers", func_d="pfu:mu=0.1,bias=mu,sigma=0.7")
    core = _core()
    inputs = _patterns(core)
    torch.manual_seed(4)
    ours = core(*inputs, update_steps_max=2)[0]
    torch.manual_seed(4)
    draws = [float(torch.randn(1) * 0.7**2) for _ in range(3)]
    options = dict(func_d=Forgetting("pfu", 0.1, "mu"), update_steps_max=2)
    torch.testing.assert_close(ours, hopfield_core(core, *inputs, **options, eps_per_step=draws)[0], rtol=0, atol=1e-12)
    core.eval()
    torch.testing.assert_close(
        core(*inputs, update_steps_max=2)[0], hopfield_core(core, *inputs, **options)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("steps", [0, 3])
def test_dropout_and_its_mask(steps):
    lwpf_patch.apply("hflayers")
    core = _core(dropout=0.4)
    inputs = _patterns(core)
    torch.manual_seed(2)
    ours = core(*inputs, update_steps_max=steps)
    torch.manual_seed(2)
    keep = torch.nn.functional.dropout(torch.ones(2 * N, L, S, dtype=torch.float64), 0.4) != 0
    expected = hopfield_core(core, *inputs, func_d=Forgetting("relu"), update_steps_max=steps, dropout_keep=keep)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=1e-12)


def test_padding_changes_nothing():
    """What stands in padded places is of no consequence, in ours; in the official recipe it is."""
    lwpf_patch.apply("hflayers")
    layer = Hopfield(input_size=E, num_heads=2, hidden_size=4, update_steps_max=2).double().eval()
    stored = torch.randn(1, 6, E, dtype=torch.float64)
    query = torch.randn(1, 3, E, dtype=torch.float64)
    longer = torch.cat([stored, torch.randn(1, 9, E, dtype=torch.float64)], dim=1)
    mask = torch.arange(15)[None] >= 6
    short = layer((stored, query, stored))
    torch.testing.assert_close(layer((longer, query, longer), stored_pattern_padding_mask=mask), short)
    lwpf_patch.apply("hflayers", masking="paper")
    leaking = layer((longer, query, longer), stored_pattern_padding_mask=mask)
    assert (leaking - layer((stored, query, stored))).norm() > 0.01 * short.norm()


LAYERS = {
    "Hopfield": lambda: Hopfield(input_size=E, num_heads=2, update_steps_max=2),
    "HopfieldPooling": lambda: HopfieldPooling(input_size=E, num_heads=2, quantity=3),
    "HopfieldLayer": lambda: HopfieldLayer(input_size=E, num_heads=2, quantity=5),
    "encoder": lambda: HopfieldEncoderLayer(Hopfield(input_size=E, num_heads=2)),
    "decoder": lambda: HopfieldDecoderLayer(Hopfield(input_size=E, num_heads=2), Hopfield(input_size=E, num_heads=2)),
}


def _call(name: str, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x, x) if name == "decoder" else layer(x)


def _lively(layer: torch.nn.Module) -> torch.nn.Module:
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return layer.eval()


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_patched_and_restored(name):
    layer, x = _lively(LAYERS[name]()), torch.randn(2, 5, E)
    plain, text = _call(name, layer, x), repr(layer)
    codes = hflayers.functional.hopfield_core_forward.__code__, HopfieldCore.forward.__code__
    lwpf_patch.apply("hflayers", func_d=NOTHING)
    assert torch.equal(_call(name, layer, x), plain)
    lwpf_patch.apply("hflayers")
    relu = _call(name, layer, x)
    assert not torch.allclose(relu, plain)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(_call(name, again, x), relu)
    fresh = LAYERS[name]()
    assert list(fresh.state_dict()) == list(layer.state_dict())
    lwpf_patch.revert()
    assert hflayers.functional.hopfield_core_forward.__code__ is codes[0]
    assert HopfieldCore.forward.__code__ is codes[1]
    assert hflayers.functional.hopfield_core_forward.__kwdefaults__ is None
    assert torch.equal(_call(name, layer, x), plain)
    assert repr(layer) == text


def test_each_layer_its_own_func_d():
    first, second, x = _lively(LAYERS["Hopfield"]()), _lively(LAYERS["Hopfield"]()), torch.randn(2, 5, E)
    plain = first(x), second(x)
    with lwpf_patch.patched("hflayers"):
        relu = first(x)
    assert lwpf_patch.patch_model(first) == ["association_core"]
    assert torch.equal(first(x), relu)
    assert torch.equal(second(x), plain[1])
    lwpf_patch.patch_model(second, func_d="pfu")
    assert not torch.equal(second(x), plain[1])
    assert torch.equal(first(x), relu)
    for again in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(again(x), relu)
    lwpf_patch.apply("hflayers", func_d="pfu:mu=0.1")
    assert torch.equal(first(x), relu)
    lwpf_patch.unpatch_model(first)
    assert repr(first.association_core.func_d).startswith("PFU(mu=0.1")
    lwpf_patch.revert()
    assert torch.equal(first(x), plain[0])


def test_the_function_called_without_its_module_forgets_as_its_host():
    lwpf_patch.apply("hflayers")
    core = _core().eval()
    inputs = _patterns(core)
    direct = hflayers.functional.hopfield_core_forward(
        *inputs, E, 2, core.in_proj_weight, core.in_proj_bias, None, None, False, 0.0, core.out_proj.weight,
        core.out_proj.bias, training=False, head_dim=core.head_dim, pattern_dim=core.pattern_dim,
    )  # fmt: skip
    assert torch.equal(direct[0], core(*inputs)[0])
    lwpf_patch.apply("hflayers", func_d=NOTHING)
    assert not torch.equal(core(*inputs)[0], direct[0])


def test_its_sites_cannot_be_parted():
    with pytest.raises(lwpf_patch.SettingsError, match=r"the sites of hflayers work only together.*patch_model"):
        lwpf_patch.apply("hflayers", include="*.HopfieldCore")


def test_uint8_masks_warn_instead_of_failing():
    core = _core()
    inputs = _patterns(core)
    mask = torch.zeros(N, S, dtype=torch.uint8)
    with pytest.raises(NameError, match="warnings"):
        core(*inputs, key_padding_mask=mask)
    with lwpf_patch.patched("hflayers"), pytest.warns(UserWarning, match="deprecated"):
        core(*inputs, key_padding_mask=mask)
    with lwpf_patch.patched("hflayers", compat=False), pytest.raises(NameError):
        core(*inputs, key_padding_mask=mask)
    assert not hasattr(hflayers.functional, "warnings")


@pytest.mark.drawn(cases=2)
@pytest.mark.parametrize(
    "imports", ["import hflayers", "import hflayers.functional", "from hflayers.activation import HopfieldCore"]
)
@pytest.mark.parametrize("before", [True, False])
def test_every_way_of_import(python, imports, before):
    apply = "import lwpf_patch; lwpf_patch.apply('hflayers')"
    first, second = (apply, imports) if before else (imports, apply)
    code = f"{first}\n{second}\n" + (
        "import torch, hflayers\n"
        "layer = hflayers.Hopfield(input_size=8)\n"
        "layer(torch.randn(2, 3, 8))\n"
        "print(layer.association_core.func_d)\n"
    )
    out = python(code=code)
    assert out.stdout.strip() == "ReLU()"
    assert out.stderr.count("hopfield_core_forward, HopfieldCore patched") == 1
    assert "nothing ran" not in out.stderr


@pytest.mark.drawn(days=2)
def test_the_environment_variable_patches_two_hosts(python):
    code = (
        "import timm.layers, hflayers, torch\nattention = timm.layers.Attention(8, 2)\nprint(attention.func_d)\n"
        "attention(torch.randn(1, 3, 8))\n"
    )
    out = python(code=code, LWPF_PATCH="timm,hflayers", LWPF_FUNC_D="pfu")
    assert out.stdout.startswith("PFU(")
    assert "hflayers was patched, but no patched forward was ever called" in out.stderr


# --- U-Hop ----------------------------------------------------------------------------------------------------------


def _with_map(core: HopfieldCore, func_d: str = "none") -> HopfieldCore:
    lwpf_patch.patch_model(core, func_d=func_d, uhop="iters=4,lr=0.5")
    torch.nn.init.normal_(core.feature_map.weight, std=0.3)
    core.feature_map.steps.fill_(1)
    core.feature_map.take_settings(core.feature_map.settings)
    return core


@pytest.mark.parametrize("func_d", [None, "relu", "pfu:sigma=0"])
@pytest.mark.parametrize("case", CASES)
def test_query_and_key_are_mapped_at_each_scoring(case, func_d):
    options, call = CASES[case]
    core = _with_map(_core(**options), func_d or "none")
    matrices = torch.eye(core.head_dim, dtype=torch.float64) + core.feature_map.weight
    forgetting = Forgetting("pfu", -1e9, 0.0) if func_d is None else FUNC_DS[func_d]
    _compare(core, call, func_d=forgetting, feature_map=matrices)


@pytest.mark.parametrize("case", CASES)
def test_until_stage_one_hflayers_computes_bit_by_bit_what_it_does_without(case):
    options, call = CASES[case]
    core = _core(**options)
    inputs = _patterns(core)
    lwpf_patch.patch_model(core, func_d="none")
    without = core(*inputs, **call)
    lwpf_patch.patch_model(core, uhop="on")
    for ours, theirs in zip(core(*inputs, **call), without, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


FOLDABLE = {"plain", "three steps", "until convergence", "steps of each head", "scaling", "other sizes", "no bias",
            "static value", "a zero key", "no output projection", "everything returned"}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"scaling of each head"}))
def test_folding(case):
    options, call = CASES[case]
    core = _with_map(_core(**options))
    inputs = _patterns(core)
    expected = core(*inputs, **call)
    if case not in FOLDABLE:
        with pytest.raises(lwpf_patch.FoldError, match="cannot become part of its projections"):
            lwpf_patch.fold(core)
        return
    lwpf_patch.fold(core)
    lwpf_patch.unpatch_model(core)
    for ours, theirs in zip(core(*inputs, **call), expected, strict=True):
        assert ours is theirs is None or torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_folding_is_refused_where_a_tensor_scales_features():
    lwpf_patch.apply("hflayers", uhop="on")
    layer = Hopfield(input_size=E, num_heads=2, scaling=torch.tensor([0.3, 0.5]))
    torch.nn.init.normal_(layer.association_core.feature_map.weight)
    with pytest.raises(lwpf_patch.RewriteError, match="its scaling is a tensor"):
        lwpf_patch.fold(layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}])
@pytest.mark.parametrize("norm", ["weight_norm", "parametrizations.weight_norm"])
def test_folding_is_refused_where_a_weight_is_made_anew(norm, options):
    core = _with_map(_core(**options))
    name = "q_proj_weight" if options else "in_proj_weight"
    operator.attrgetter(norm)(torch.nn.utils)(core, name)
    with pytest.raises(lwpf_patch.FoldError, match=f"its {name} is (no parameter.*WeightNorm|parametrized)"):
        lwpf_patch.fold(core)


def test_stage_one_runs_while_a_pooling_layer_trains():
    """Its stored patterns are what is pooled; a lookup layer's are parameters, the same for every item of a batch."""
    lwpf_patch.apply("hflayers", uhop="iters=20,lr=0.1")
    for make in (HopfieldPooling, lambda **options: HopfieldLayer(quantity=7, **options)):
        layer = make(input_size=E, num_heads=2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(3, 5, E)).square().sum().backward()
            optimizer.step()
        maps = [m for m in layer.modules() if type(m).__name__ == "HostFeatureMap"]
        assert len(maps) == 1
        assert maps[0].weight.any()


def test_a_core_without_projections_has_no_map():
    lwpf_patch.apply("hflayers", uhop="on")
    with pytest.raises(lwpf_patch.SettingsError, match="projects nothing"):
        HopfieldCore(
            embed_dim=None, num_heads=1, key_as_static=True, query_as_static=True, value_as_static=True,
            disable_out_projection=True,
        )  # fmt: skip


def test_the_function_called_past_the_modules_is_an_error_with_uhop():
    lwpf_patch.apply("hflayers", uhop="on")
    core = _core()
    patterns = _patterns(core)
    with pytest.raises(lwpf_patch.LwpfError, match="only modules have a feature map"):
        hflayers.functional.hopfield_core_forward(
            *patterns, E, 2, core.in_proj_weight, core.in_proj_bias, None, None, False, 0.0,
            core.out_proj.weight, core.out_proj.bias,
        )  # fmt: skip


# --- normalisations ---------------------------------------------------------------------------------------------------


@pytest.mark.drawn(cases=8)
@pytest.mark.parametrize("case", ["plain", "three steps", "steps of each head", "scaling of each head", "static key"])
@pytest.mark.parametrize("func_d", ["none", "pfu:sigma=0"])
@pytest.mark.parametrize("sep", SEPS)
def test_every_iteration_is_normalised(sep, func_d, case):
    lwpf_patch.apply("hflayers", func_d=func_d, sep=sep)
    making, calling = CASES[case]
    _compare(_core(**making), calling, func_d=FUNC_DS.get(func_d, Forgetting("none")), **SEPS[sep])


@pytest.mark.drawn(cases=8)
@pytest.mark.parametrize("mask", ["padding", "boolean", "additive with -inf, and padding"])
@pytest.mark.parametrize("func_d", ["none", "relu"])
@pytest.mark.parametrize("sep", SEPS)
def test_a_normalisation_under_masks(sep, func_d, mask):
    lwpf_patch.apply("hflayers", func_d=func_d, sep=sep)
    call = _masks()[mask] | dict(update_steps_max=2)
    _compare(_core(), call, func_d=FUNC_DS.get(func_d, Forgetting("none")), **SEPS[sep])


@pytest.mark.parametrize("sep", SEPS)
def test_a_normalisation_with_feature_maps(sep):
    core = _core()
    lwpf_patch.patch_model(core, sep=sep, uhop="on")
    torch.nn.init.normal_(core.feature_map.weight, std=0.3)
    core.feature_map.steps.fill_(1)
    core.feature_map.take_settings(core.feature_map.settings)
    matrices = torch.eye(core.head_dim, dtype=torch.float64) + core.feature_map.weight
    _compare(core, dict(update_steps_max=2), func_d=Forgetting("none"), feature_map=matrices, **SEPS[sep])
