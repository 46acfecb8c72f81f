"""PyTorch's own attention, and torchvision's and open_clip's, patched: against the oracle, and past no fast path."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import re

import oracle
import pytest
import torch
import torchvision
from oracle import Forgetting
from oracle_torch import multihead_attention, swin_attention
from seps import SEPS
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.swin_transformer import ShiftedWindowAttention as Swin
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2 as SwinV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d as Swin3d

import lwpf_patch
from lwpf_patch import rewriting
from lwpf_patch.hosts import HOSTS

pytestmark = pytest.mark.drawn(days=2)

FUNC_DS = {
    "relu": Forgetting("relu"),
    "pfu:mu=0.02,bias=-0.2,sigma=0": Forgetting("pfu", 0.02, -0.2),
    "pfu:sigma=0": Forgetting("pfu", "dmedian", "mu"),
}
both_branches = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
L, S, N, E, H = 3, 5, 2, 8, 2
#: A finite number that hides a key, as well as -inf.
LOWEST = torch.finfo(torch.float64).min

#: Options of nn.MultiheadAttention.
OPTIONS = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "other sizes": dict(kdim=5, vdim=7, batch_first=True),
    "no bias": dict(bias=False),
    "bias_kv and a zero key": dict(add_bias_kv=True, add_zero_attn=True),
}


def lively(module: nn.Module) -> nn.Module:
    """Makes scores that lie on both sides of the thresholds, and no two queries alike."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


def mha(**options) -> nn.MultiheadAttention:
    return lively(nn.MultiheadAttention(E, H, **options))


def patterns(module: nn.MultiheadAttention) -> list[torch.Tensor]:
    sizes = ((L, module.embed_dim), (S, module.kdim), (S, module.vdim))
    shapes = [(N, *size) if module.batch_first else (size[0], N, size[1]) for size in sizes]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masks() -> dict[str, dict]:
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, -2:] = True
    hidden = torch.rand(L, S) < 0.3
    bias = torch.randn(L, S, dtype=torch.float64)
    whole = hidden.index_fill(0, torch.tensor([1]), True)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    added = bias.masked_fill(hidden, -torch.inf)
    return {
        "padding": dict(key_padding_mask=padding),
        "boolean": dict(attn_mask=hidden),
        "boolean, of each head": dict(attn_mask=torch.rand(N * H, L, S) < 0.3),
        "additive": dict(attn_mask=bias),
        "additive with -inf, and padding": dict(attn_mask=added, key_padding_mask=padding.double() * LOWEST),
        "a row without keys": dict(attn_mask=whole),
        "an item without keys": dict(key_padding_mask=torch.tensor([[True] * S, [False] * S])),
        "causal": dict(attn_mask=causal, is_causal=True),
        "causal, and padding": dict(attn_mask=causal, key_padding_mask=padding, is_causal=True),
    }


MASKS = list(masks())


def compare(module: nn.MultiheadAttention, call: dict, training: bool = True, **more) -> None:
    """Compares output, weights and gradients with the oracle, with ``need_weights`` and without; and in evaluation."""
    inputs = patterns(module)
    given = {name: value for name, value in call.items() if name != "is_causal"}
    expected, wanted_weights = multihead_attention(module, *inputs, **given, **more)
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, cotangent, materialize_grads=True)
    for need_weights in (True, False):
        output, weights = module.train(training)(*inputs, need_weights=need_weights, **call)
        oracle.assert_equal(output, expected)
        assert (weights is None) != need_weights
        if need_weights:
            oracle.assert_equal(weights, wanted_weights)
        got = torch.autograd.grad(output, leaves, cotangent, materialize_grads=True)
        for ours, theirs in zip(got, wanted, strict=True):
            oracle.assert_equal(ours, theirs, *wanted)
        with torch.no_grad():
            oracle.assert_equal(module.eval()(*inputs, need_weights=need_weights, **call)[0], expected)


@pytest.mark.parametrize("func_d", FUNC_DS)
@pytest.mark.parametrize("options", OPTIONS)
def test_multihead_attention_equals_the_oracle(func_d, options):
    lwpf_patch.apply("torch", func_d=func_d)
    compare(mha(**OPTIONS[options]), {}, func_d=FUNC_DS[func_d])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("func_d", ["relu", "pfu:sigma=0"])
def test_masks_equal_the_oracle(func_d, mask):
    lwpf_patch.apply("torch", func_d=func_d)
    compare(mha(batch_first=True), masks()[mask], func_d=FUNC_DS[func_d], excluded_below=LOWEST)


@pytest.mark.parametrize("mask", ["padding", "additive with -inf, and padding"])
def test_masks_reach_over_the_keys_that_the_module_adds(mask):
    lwpf_patch.apply("torch")
    module = mha(add_bias_kv=True, add_zero_attn=True)
    compare(module, masks()[mask], func_d=Forgetting("relu"), excluded_below=LOWEST)


@pytest.mark.parametrize(("func_d", "mask"), [("relu", "padding"), ("relu", "boolean"), ("pfu:sigma=0", "additive")])
def test_paper_masking_equals_the_oracle(func_d, mask):
    lwpf_patch.apply("torch", func_d=func_d, masking="paper")
    # In training the official threshold is float32.
    compare(mha(), masks()[mask], training=False, func_d=FUNC_DS[func_d], masking="paper")


@pytest.mark.parametrize("sep", SEPS)
def test_normalisations(sep):
    lwpf_patch.apply("torch", func_d="relu", sep=sep)
    compare(mha(), masks()["padding"], func_d=Forgetting("relu"), **SEPS[sep])


def test_an_input_without_a_batch_and_the_weights_of_each_head():
    lwpf_patch.apply("torch")
    module, query, key = mha(), torch.randn(L, E).double(), torch.randn(S, E).double()
    options = dict(key_padding_mask=torch.arange(S) > 3, average_attn_weights=False)
    ours = module(query, key, key, **options)
    for got, wanted in zip(
        ours, multihead_attention(module, query, key, key, func_d=FUNC_DS["relu"], **options), strict=True
    ):
        oracle.assert_equal(got, wanted)
    assert ours[1].shape == (H, L, S)


@both_branches
def test_dropout_comes_before_the_mask(need_weights):
    lwpf_patch.apply("torch", backend="eager")
    module = mha(dropout=0.4)
    inputs = patterns(module)
    torch.manual_seed(2)
    ours = module(*inputs, need_weights=need_weights, average_attn_weights=False)
    torch.manual_seed(2)
    shape = (N * H, L, S) if need_weights else (N, H, L, S)
    keep = F.dropout(torch.ones(shape, dtype=torch.float64), 0.4).reshape(N, H, L, S) != 0
    expected = multihead_attention(
        module, *inputs, func_d=FUNC_DS["relu"], dropout_keep=keep, average_attn_weights=False
    )
    oracle.assert_equal(ours[0], expected[0])
    if need_weights:
        oracle.assert_equal(ours[1], expected[1])


@both_branches
def test_the_noise_of_training(need_weights):
    lwpf_patch.apply("torch", func_d="pfu:mu=0.1,bias=mu,sigma=0.7", backend="eager")
    module = mha()
    inputs = patterns(module)
    torch.manual_seed(4)
    ours = module(*inputs, need_weights=need_weights)[0]
    torch.manual_seed(4)
    eps = float(torch.randn(1) * 0.7**2)
    oracle.assert_equal(ours, multihead_attention(module, *inputs, func_d=Forgetting("pfu", 0.1, "mu", eps))[0])
    still = multihead_attention(module, *inputs, func_d=Forgetting("pfu", 0.1, "mu"))[0]
    oracle.assert_equal(module.eval()(*inputs, need_weights=need_weights)[0], still)


# --- models ---------------------------------------------------------------------------------------------------------


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 12, dropout=0.0, batch_first=True, **options)
    return lively(nn.TransformerEncoder(layer, 2))


def transformer() -> nn.Module:
    return lively(nn.Transformer(E, H, 2, 2, 12, dropout=0.0, batch_first=True))


def vit() -> nn.Module:
    return lively(torchvision.models.VisionTransformer(8, 4, 2, 2, E, 12, num_classes=3))


def swin() -> nn.Module:
    return lively(SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0))


def swin_v2() -> nn.Module:
    blocks = dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    model = SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0, **blocks)
    return lively(model)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def tokens(length: int = 5) -> torch.Tensor:
    return torch.randn(2, length, E, dtype=torch.float64)


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
#: Models, each with the arguments of a call.
MODELS = {
    "encoder": (encoder, lambda: (tokens(),), {}),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), lambda: (tokens(),), {}),
    "encoder with padding": (encoder, lambda: (tokens(),), {"src_key_padding_mask": PADDING}),
    "encoder with a mask": (encoder, lambda: (tokens(),), {"mask": CAUSAL}),
    "transformer": (
        transformer,
        lambda: (tokens(), tokens(3)),
        {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING},
    ),
    "ViT": (vit, lambda: (images(),), {}),
    "Swin": (swin, lambda: (images(20),), {}),
    "Swin V2": (swin_v2, lambda: (images(20),), {}),
}
every_model = pytest.mark.parametrize("name", MODELS)


@contextlib.contextmanager
def each_attention_compared(model: nn.Module, **more):
    """Compares what each attention module of a model gives with the oracle; yields those that were called."""
    called = []

    def compare_call(module, arguments, options, output):
        called.append(module)
        options = {name: value for name, value in options.items() if name not in ("is_causal", "need_weights")}
        if isinstance(module, nn.MultiheadAttention):
            oracle.assert_equal(output[0], multihead_attention(module, *arguments, **options, **more)[0])
        else:
            oracle.assert_equal(output, swin_attention(module, *arguments, **more))

    kinds = (nn.MultiheadAttention, Swin, Swin3d)
    handles = [
        each.register_forward_hook(compare_call, with_kwargs=True)
        for each in model.modules()
        if isinstance(each, kinds)
    ]
    yield called
    for handle in handles:
        handle.remove()


@every_model
def test_every_attention_of_a_model_equals_the_oracle(name):
    func_d = "pfu:sigma=0" if "Swin" in name else "relu"  # V2 has hardly a score below 0
    lwpf_patch.apply("torch", func_d=func_d)
    make, inputs, options = MODELS[name]
    model = make()
    with each_attention_compared(model, func_d=FUNC_DS[func_d]) as called:
        model(*inputs(), **options)
    assert len(called) == sum(hasattr(each, "func_d") for each in model.modules()) > 0


@every_model
def test_evaluation_without_gradients_takes_no_fast_path(name):
    make, inputs, options = MODELS[name]
    model, given = make(), inputs()
    plain = model(*given, **options)
    lwpf_patch.apply("torch", func_d="pfu:sigma=0")
    trained = model(*given, **options)
    assert not torch.allclose(trained, plain, atol=1e-3)
    model.eval()
    with torch.no_grad():
        evaluated = model(*given, **options)
    shown = torch.ones(evaluated.shape[:2], dtype=torch.bool)  # padded places are 0 after a conversion to nested
    if name == "encoder with padding":
        shown = ~PADDING
    torch.testing.assert_close(evaluated[shown], trained[shown])
    torch.testing.assert_close(model(*given, **options), trained)


def fast_paths(monkeypatch) -> list[str]:
    """Returns a list of the fast paths that are taken from now on."""
    taken = []
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_nested_tensor_from_mask"):
        original = getattr(torch, name)

        def noted(*arguments, _name=name, _original=original, **options):
            taken.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(torch, name, noted)
    return taken


@torch.no_grad()
def test_fast_paths_are_closed_where_something_is_forgotten_and_open_again_elsewhere(monkeypatch):
    taken = fast_paths(monkeypatch)
    module, model = mha(batch_first=True).eval(), encoder().eval()
    x = tokens()

    def call() -> list[torch.Tensor]:
        taken.clear()
        outputs = [module(x, x, x)[0], model(x), model(x, src_key_padding_mask=PADDING)]
        return [*outputs, outputs[0].new_tensor(len(taken))]

    plain = call()
    assert set(taken) == {
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "_nested_tensor_from_mask",
    }
    for settings in (dict(func_d="relu"), dict(sep="softmax_n"), dict(uhop="on")):
        with lwpf_patch.patched("torch", **settings):
            call()
            assert taken == []
    with lwpf_patch.patched("torch", func_d="none"):
        assert all(map(torch.equal, call(), plain))
    with lwpf_patch.patched("torch", exclude_models="TransformerEncoder"):
        assert all(map(torch.equal, call()[1:3], plain[1:3]))
        assert "_native_multi_head_attention" not in taken
    lwpf_patch.patch_model(model)
    assert not torch.equal(call()[1], plain[1])
    assert taken == ["_native_multi_head_attention"]
    lwpf_patch.unpatch_model(model)
    assert all(map(torch.equal, call(), plain))


def test_a_nested_tensor_is_refused_with_the_reason():
    lwpf_patch.apply("torch")
    module = mha(batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E).double(), torch.randn(2, E).double()])
    with torch.no_grad(), pytest.raises(AssertionError, match="lwpf_patch computes this attention"):
        module(nested, nested, nested)


@pytest.mark.parametrize("name", ["encoder with padding", "transformer", "ViT", "Swin"])
def test_forgetting_nothing_is_the_unpatched_model_bit_for_bit(name):
    make, inputs, options = MODELS[name]
    model, given = make(), inputs()
    plain = model(*given, **options)
    names = set(vars(torch.nn.modules.activation))
    functions = (F.multi_head_attention_forward, nn.MultiheadAttention.forward, nn.TransformerEncoder.forward)
    codes = [function.__code__ for function in functions]
    lwpf_patch.apply("torch", func_d="none")
    assert torch.equal(model(*given, **options), plain)
    lwpf_patch.apply("torch", func_d="pfu:sigma=0")
    assert not torch.equal(model(*given, **options), plain)
    lwpf_patch.revert()
    assert torch.equal(model(*given, **options), plain)
    assert all(function.__code__ is code for function, code in zip(functions, codes, strict=True))
    assert F.multi_head_attention_forward.__kwdefaults__ is None
    assert set(vars(torch.nn.modules.activation)) == names
    assert not any(hasattr(each, "func_d") for each in model.modules())


# --- Swin -----------------------------------------------------------------------------------------------------------

WINDOWS = {
    "V1": lambda shift: (Swin(E, [3, 3], [shift, shift], H, attention_dropout=0.3), (1, 5, 6, E)),
    "V2": lambda shift: (SwinV2(E, [3, 3], [shift, shift], H, attention_dropout=0.3), (1, 5, 6, E)),
    "3d": lambda shift: (Swin3d(E, [2, 2, 2], [0, shift, shift], H, attention_dropout=0.3), (1, 2, 4, 3, E)),
}
every_window = pytest.mark.parametrize("kind", WINDOWS)


def windows(kind: str, shift: int) -> tuple[nn.Module, torch.Tensor]:
    module, shape = WINDOWS[kind](shift)
    return lively(module), torch.randn(shape, dtype=torch.float64, requires_grad=True)


def compare_windows(module: nn.Module, x: torch.Tensor, **more) -> None:
    output, expected = module(x), swin_attention(module, x, **more)
    oracle.assert_equal(output, expected)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, cotangent, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, cotangent, materialize_grads=True)
    for ours, theirs in zip(got, wanted, strict=True):
        oracle.assert_equal(ours, theirs, *wanted)


@pytest.mark.parametrize("shift", [0, 1])
@every_window
@pytest.mark.parametrize("func_d", ["relu", "pfu:sigma=0"])
def test_windows_equal_the_oracle(func_d, kind, shift):
    """Keys of another region of a shifted window, which torchvision scores 100 lower, are excluded."""
    lwpf_patch.apply("torch", func_d=func_d)
    module, x = windows(kind, shift)
    compare_windows(module.eval(), x, func_d=FUNC_DS[func_d])


def test_scores_of_a_cosine_attention_may_be_as_low_as_a_mask():
    lwpf_patch.apply("torch", func_d="pfu:mu=-80,bias=-90,sigma=0")
    module, x = windows("V2", 1)
    nn.init.constant_(module.logit_scale, 10.0)  # 100, which is the limit
    compare_windows(module.eval(), x, func_d=Forgetting("pfu", -80.0, -90.0))


@every_window
def test_windows_in_the_masking_of_the_paper(kind):
    lwpf_patch.apply("torch", masking="paper")
    module, x = windows(kind, 1)
    compare_windows(module.eval(), x, func_d=FUNC_DS["relu"], masking="paper")


def test_the_dropout_of_windows():
    lwpf_patch.apply("torch")
    module, x = windows("V1", 1)
    torch.manual_seed(2)
    output = module(x)
    torch.manual_seed(2)
    keep = F.dropout(torch.ones(4, H, 9, 9, dtype=torch.float64), 0.3).reshape(1, 4, H, 9, 9) != 0
    oracle.assert_equal(output, swin_attention(module, x, func_d=FUNC_DS["relu"], dropout_keep=keep))


# --- what becomes of a model ----------------------------------------------------------------------------------------


def compiled(model, given):
    return torch.compile(model, fullgraph=True, backend="eager")


def exported(model, given):
    return torch.export.export(model, given).module()


def traced(model, given):
    return torch.jit.trace(model, given, check_trace=False)


def traced_by_fx(model, given):
    return torch.fx.symbolic_trace(model)


def deep_copied(model, given):
    return copy.deepcopy(model)


def pickled(model, given):
    return pickle.loads(pickle.dumps(model))


def saved(model, given):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


TRANSFORMATIONS = [compiled, exported, traced, traced_by_fx, deep_copied, pickled, saved]


@pytest.mark.drawn(cases=5)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("transform", "name", "way"),
    [
        *((transform, *each) for transform in TRANSFORMATIONS for each in (("ViT", "apply"), ("Swin", "patch_model"))),
        *((transform, "ViT", "patch_model") for transform in (compiled, pickled)),
        *((transform, "Swin", "apply") for transform in (traced_by_fx, deep_copied)),
    ],
)
def test_a_transformed_model_computes_the_same(transform, name, way):
    make, inputs, _ = MODELS[name]
    model, given = make().eval(), inputs()
    if way == "apply":
        lwpf_patch.apply("torch", func_d="pfu:sigma=0")
    else:
        lwpf_patch.patch_model(model, func_d="pfu:sigma=0")
    expected = model(*given)
    torch.testing.assert_close(transform(model, given)(*given), expected)
    if transform in (deep_copied, pickled, saved):
        with torch.no_grad():
            torch.testing.assert_close(transform(model, given)(*given), expected)


@pytest.mark.parametrize("name", ["mha", "encoder", "Swin"])
def test_torch_jit_script_is_refused_and_works_after_revert(name):
    model = mha() if name == "mha" else MODELS[name][0]()
    with (
        lwpf_patch.patched("torch"),
        pytest.raises(lwpf_patch.SettingsError, match="functions of TorchScript take no modules"),
    ):
        torch.jit.script(model)
    lwpf_patch.patch_model(model)
    with pytest.raises(lwpf_patch.SettingsError, match=r"patched for one model alone|use torch\.compile"):
        torch.jit.script(model)
    lwpf_patch.unpatch_model(model)
    torch.jit.script(model)


def test_torch_jit_script_refuses_the_function():
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.multi_head_attention_forward(x, x, x, 8, 2, weight, None, None, None, False, 0.0, weight, None)[0]

    with lwpf_patch.patched("torch"), pytest.raises(Exception, match="func_d"):
        torch.jit.script(call)


def test_compiled_in_training():
    lwpf_patch.apply("torch", func_d="pfu:sigma=0")
    make, inputs, options = MODELS["encoder with padding"]
    model, given = make(), inputs()
    expected = model(*given, **options)
    wanted = torch.autograd.grad(expected.sum(), model.parameters())
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(*given, **options)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), model.parameters()), wanted)


def test_compiled_before_and_after_the_patch():
    module, x = mha(), torch.randn(3, N, E).double()
    program = torch.compile(lambda x: module(x, x, x)[0], backend="eager", fullgraph=True)
    plain = program(x)
    lwpf_patch.apply("torch")
    torch.testing.assert_close(program(x), module(x, x, x)[0])
    assert not torch.allclose(program(x), plain)
    lwpf_patch.apply("torch", uhop="on", func_d="relu")  # the function takes another argument
    torch.testing.assert_close(program(x), module(x, x, x)[0])
    lwpf_patch.revert()
    torch.testing.assert_close(program(x), plain)


def test_gradient_checkpointing():
    lwpf_patch.apply("torch", func_d="pfu")
    model, x = encoder(), tokens().requires_grad_()
    found = []
    for call in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(call(x).sum(), [x, *model.parameters()]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_half_precision(mode):
    lwpf_patch.apply("torch", func_d="pfu:mu=0.02,bias=-0.2,sigma=0")
    model, x = encoder().float(), tokens().float()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else contextlib.nullcontext():
        found = model(x) if mode == "autocast" else model.bfloat16()(x.bfloat16())
    # Rounding takes single scores across the threshold.
    assert (found.float() - expected).abs().median() < 0.05 * expected.abs().median()


def test_state_dicts_do_not_change():
    names = list(transformer().state_dict())
    lwpf_patch.apply("torch")
    assert list(transformer().state_dict()) == names


class Likeness(torch.Tensor):
    """A tensor that answers for torch's functions."""


@pytest.mark.parametrize("way", ["apply", "patch_model"])
@both_branches
def test_tensors_that_answer_for_functions(need_weights, way):
    module = mha()
    lwpf_patch.apply("torch") if way == "apply" else lwpf_patch.patch_model(module)
    query, key, value = patterns(module)
    expected = module(query, key, value, need_weights=need_weights)[0]
    found = module(query.as_subclass(Likeness), key, value, need_weights=need_weights)[0]
    torch.testing.assert_close(torch.Tensor(found), expected, check_dtype=False)
    assert type(found) is Likeness


def test_the_function_called_without_its_module_forgets_as_its_host():
    """As CLIP's pooling does, and subclasses with a forward of their own."""
    lwpf_patch.apply("torch", func_d="pfu:mu=0,sigma=3")
    module = mha().eval()
    query, key, value = patterns(module)

    def call(training: bool, need_weights: bool) -> torch.Tensor:
        return F.multi_head_attention_forward(
            query, key, value, E, H, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, training=training, need_weights=need_weights,
        )[0]  # fmt: skip

    for need_weights in (True, False):
        torch.testing.assert_close(call(False, need_weights), module(query, key, value)[0])
        assert not torch.allclose(call(True, need_weights), call(False, need_weights))  # the noise of training
    lwpf_patch.apply("torch", uhop="on")
    with pytest.raises(lwpf_patch.LwpfError, match="only modules have a feature map"):
        call(False, True)


# --- one model, some sites ------------------------------------------------------------------------------------------


def test_one_model_alone():
    first, second, x = encoder().eval(), encoder().eval(), tokens()
    with torch.no_grad():
        plain = [first(x, src_key_padding_mask=PADDING), second(x, src_key_padding_mask=PADDING)]
        with lwpf_patch.patched("torch"):
            expected = first(x, src_key_padding_mask=PADDING)
        names = ["layers.0.self_attn", "layers.1.self_attn"]
        # Whatever is asked for by name, nothing goes around it.
        assert lwpf_patch.patch_model(first, include="*.self_attn") == names
        torch.testing.assert_close(first(x, src_key_padding_mask=PADDING), expected)
        assert torch.equal(second(x, src_key_padding_mask=PADDING), plain[1])
        assert type(first.layers[0]).__name__ == "TransformerEncoderLayer"
        lwpf_patch.apply("torch", func_d="pfu")
        torch.testing.assert_close(first(x, src_key_padding_mask=PADDING), expected)
        lwpf_patch.revert()
        assert lwpf_patch.unpatch_model(first) == names
        assert torch.equal(first(x, src_key_padding_mask=PADDING), plain[0])
        assert type(first.layers[0]) is nn.TransformerEncoderLayer


def test_one_layer_of_a_model():
    model, x = encoder().eval(), tokens()
    assert lwpf_patch.patch_model(model, exclude="layers.0*") == ["layers.1.self_attn"]
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert not hasattr(model.layers[0].self_attn, "func_d")


def test_a_layer_with_a_forward_of_its_own_may_go_around_its_attention():
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src):
            return super().forward(src)

    layer, x = lively(Layer(E, H, 12, dropout=0.0, batch_first=True)).eval(), tokens()
    with pytest.raises(lwpf_patch.ConflictError, match=r"use lwpf_patch.apply\(\)"):
        lwpf_patch.patch_model(layer)
    lwpf_patch.apply("torch")
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_sites_of_other_packages_alone():
    lwpf_patch.apply("torch", include="torchvision.*.ShiftedWindowAttention")
    assert not hasattr(mha(), "func_d")
    assert all(hasattr(make(1)[0], "func_d") == (kind != "3d") for kind, make in WINDOWS.items())
    with pytest.raises(lwpf_patch.SettingsError, match=r"its sites are .*MultiheadAttention"):
        lwpf_patch.apply("torch", exclude="*.TransformerEncoderLayer")


def test_a_func_d_of_ones_own_in_a_layer():
    lwpf_patch.apply("torch")
    model, x = encoder().eval(), tokens()
    model.layers[0].self_attn.func_d = lwpf_patch.PFU(mu=0.02, bias=-0.2, sigma=0)
    first, second = model.layers[0].self_attn, model.layers[1].self_attn
    for module, func_d in ((first, Forgetting("pfu", 0.02, -0.2)), (second, Forgetting("relu"))):
        oracle.assert_equal(module(x, x, x)[0], multihead_attention(module, x, x, x, func_d=func_d)[0])
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


# --- U-Hop ----------------------------------------------------------------------------------------------------------


def with_map(module: nn.Module, func_d: str = "none") -> torch.Tensor:
    """Gives a module a trained feature map, and returns its matrices."""
    lwpf_patch.patch_model(module, func_d=func_d, uhop="iters=4,lr=0.5")
    nn.init.normal_(module.feature_map.weight, std=0.3)
    module.feature_map.steps.fill_(1)
    module.feature_map.take_settings(module.feature_map.settings)
    return torch.eye(E // H, dtype=torch.float64) + module.feature_map.weight


@pytest.mark.parametrize("func_d", ["none", "relu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_query_and_key_are_mapped(options, func_d):
    module = mha(**OPTIONS[options])
    matrices = with_map(module, func_d)
    given = dict(func_d=FUNC_DS.get(func_d, Forgetting("none")), feature_map=matrices)
    compare(module, {}, **given)


@pytest.mark.parametrize("func_d", ["none", "relu"])
@every_window
def test_windows_are_mapped(kind, func_d):
    module, x = windows(kind, 1)
    matrices = with_map(module.eval(), func_d)
    compare_windows(module, x, func_d=FUNC_DS.get(func_d, Forgetting("none")), feature_map=matrices)


@pytest.mark.parametrize("options", OPTIONS)
def test_folding(options):
    module = mha(**OPTIONS[options])
    with_map(module)
    inputs = patterns(module)
    expected = module(*inputs)
    lwpf_patch.fold(module)
    lwpf_patch.unpatch_model(module)
    torch.testing.assert_close(module(*inputs), expected)


@every_window
def test_folding_of_windows(kind):
    module, x = windows(kind, 1)
    with_map(module.eval())
    expected = module(x)
    if kind == "V2":
        with pytest.raises(lwpf_patch.FoldError, match="query and key are normalised"):
            lwpf_patch.fold(module)
        return
    lwpf_patch.fold(module)
    lwpf_patch.unpatch_model(module)
    torch.testing.assert_close(module(x), expected)


def test_stage_one_runs_and_a_transformer_begins_with_the_identity():
    """nn.Transformer makes all of its parameters anew, but for those."""
    lwpf_patch.apply("torch", uhop="iters=5,lr=0.1")
    model = nn.Transformer(E, H, 1, 1, 12, batch_first=True)
    maps = [each.feature_map for each in model.modules() if hasattr(each, "feature_map")]
    assert len(maps) == 3
    assert not any(each.weight.any() for each in maps)
    assert all(each.abs().max() > 0 for each in (model.encoder.layers[0].linear1.weight,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens().float(), tokens(3).float()).square().sum().backward()
        optimizer.step()
    assert all(each.weight.any() for each in maps)


# --- open_clip ------------------------------------------------------------------------------------------------------


def clip(**vision):
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed, so that its models were not tested: pip install open_clip_torch")
    import open_clip

    sizes = dict(image_size=16, layers=2, width=16, head_width=8, patch_size=8)
    text = dict(context_length=6, vocab_size=20, width=16, heads=2, layers=2)
    return open_clip.CLIP(8, {**sizes, **vision}, text).double()


CLIPS = {
    "nn.MultiheadAttention": {},
    "attentional pooling": dict(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
    "an Attention of its own": dict(block_type="custom"),
    "ResNet": dict(layers=[1, 1, 1, 1], width=8, image_size=32),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_open_clip(kind):
    lwpf_patch.apply("torch")
    model = clip(**CLIPS[kind])
    size = CLIPS[kind].get("image_size", 16)
    image, text = images(size), torch.randint(1, 20, (2, 6))
    with each_attention_compared(model, func_d=FUNC_DS["relu"]) as called:
        trained = model(image, text)
    attentions = [each for each in model.modules() if "func_d" in each._modules]
    assert len(attentions) >= len(called) >= 2
    model.eval()
    if kind != "ResNet":  # whose batch norm knows training from evaluation
        with torch.no_grad():
            for got, wanted in zip(model(image, text), trained, strict=True):
                torch.testing.assert_close(got, wanted)
    patched = model(image, text)[0]
    with lwpf_patch.patched("torch", func_d="none"):
        assert not torch.allclose(model(image, text)[0], patched, atol=1e-6)


def test_the_attention_of_open_clip_itself():
    clip()
    from open_clip.transformer import Attention

    for options in ({}, dict(qk_norm=True, norm_layer=nn.LayerNorm), dict(qkv_bias=False)):
        module, x = lively(Attention(E, H, **options)), tokens().requires_grad_()
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        with lwpf_patch.patched("torch", func_d="pfu:sigma=0"):
            output = module(x, attn_mask=hidden)
        q, k, v = (torch.stack(each.split(E // H, dim=-1), dim=1) for each in module_projections(module, x))
        q, k = module.ln_q(q), module.ln_k(k)
        mixed = oracle.attention(q, k, v, func_d=FUNC_DS["pfu:sigma=0"], attn_mask=~hidden)
        expected = module.out_proj(torch.cat(mixed.unbind(1), dim=-1))
        oracle.assert_equal(output, expected)
        leaves = [x, *module.parameters()]
        got, wanted = (torch.autograd.grad(each.square().sum(), leaves) for each in (output, expected))
        for ours, theirs in zip(got, wanted, strict=True):
            oracle.assert_equal(ours, theirs, *wanted)


def test_the_feature_map_of_open_clip_and_its_folding():
    clip()
    from open_clip.transformer import Attention

    module, x = lively(Attention(E, H)), tokens()
    plain = module(x)
    matrices = with_map(module)
    mapped = module(x)
    q, k, v = (torch.stack(each.split(E // H, dim=-1), dim=1) for each in module_projections(module, x))
    q, k = (torch.stack([each[:, h] @ matrices[h].T for h in range(H)], dim=1) for each in (q, k))
    mixed = oracle.attention(q, k, v, func_d=Forgetting("none"))
    oracle.assert_equal(mapped, module.out_proj(torch.cat(mixed.unbind(1), dim=-1)))
    lwpf_patch.fold(module)
    lwpf_patch.unpatch_model(module)
    torch.testing.assert_close(module(x), mapped)
    assert not torch.allclose(mapped, plain)


def module_projections(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)


# --- other sources --------------------------------------------------------------------------------------------------

OTHERS = {
    "a softmax over something else": (
        "multi_head_attention_forward",
        "softmax(attn_output_weights, dim=-1)",
        "softmax(attn_output_weights, dim=1)",
        "has a softmax that is not",
    ),
    "weights that are used elsewhere": (
        "multi_head_attention_forward",
        "attn_output = torch.bmm(attn_output_weights, v)",
        "x = attn_output_weights.sum()",
        "follows 'softmax",
    ),
    "a second fused call": (
        "multi_head_attention_forward",
        "attn_output = torch.bmm(attn_output_weights, v)",
        "attn_output = scaled_dot_product_attention(q, k, v)",
        "2 times 'scaled_dot_product_attention",
    ),
    "another way to decide": (
        "MultiheadAttention.forward",
        "if not why_not_fast_path:\n            tensor_args",
        "if fast:\n            tensor_args",
        "no 'if not why_not_fast_path:'",
    ),
    "another core": (
        "MultiheadAttention.forward",
        "F.multi_head_attention_forward(",
        "F.another(",
        "does not call",
    ),
    "another condition of a layer": (
        "TransformerEncoderLayer.forward",
        "if not why_not_sparsity_fast_path:\n            tensor_args",
        "if fast:\n            tensor_args",
        "not why_not_sparsity_fast_path",
    ),
    "a mask under another name": (
        "shifted_window_attention",
        "attn = attn + attn_mask",
        "attn = attn + mask",
        "no 'attn = attn \\+ attn_mask",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_sources_are_refused(case):
    qualname, old, new, message = OTHERS[case]
    host = HOSTS["torch"]
    (site,) = (each for each in host.sites if each.qualname == qualname)
    path, source = rewriting.source_of(importlib.util.find_spec(site.module))
    assert old in source
    with pytest.raises(lwpf_patch.RewriteError, match=message):
        host.plan(path, source.replace(old, new), [site], {"func_d", "feature_map"})


# --- a fresh process ------------------------------------------------------------------------------------------------

USE = """
import torch
module = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
x = torch.randn(2, 3, 8)
expected = module(x, x, x, need_weights=False)[0]
with torch.no_grad():
    assert torch.allclose(module(x, x, x, need_weights=False)[0], expected, atol=1e-6)
print(module.func_d if hasattr(module, "func_d") else None)
"""
BEFORE = "import lwpf_patch; lwpf_patch.apply('torch', func_d='pfu')\n"
PFU = "PFU(mu=dmedian, bias=mu, sigma=0.01)"


def test_the_variable_and_torchvision(python):
    code = """
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2
module = ShiftedWindowAttentionV2(8, [2, 2], [1, 1], 2)
module(torch.randn(1, 4, 4, 8))
print(module.func_d)
"""
    out = python(code=USE + code, LWPF_PATCH="torch", LWPF_FUNC_D="pfu")
    assert out.stdout.split("\n") == [PFU, PFU, ""]
    line, backend, *further = out.stderr.strip().splitlines()
    assert re.match(
        r"lwpf_patch: torch \S+: multi_head_attention_forward, MultiheadAttention patched; func_d pfu", line
    )  # fmt: skip
    assert backend.startswith("lwpf_patch: torch: attention is computed by backend")
    assert "ShiftedWindowAttention of torchvision.models.swin_transformer patched, too" in further[0]


def test_lwpf_run(python, tmp_path):
    (tmp_path / "script.py").write_text(USE)
    out = python("-m", "lwpf_patch", "run", "--patch", "torch", "--uhop", "on", "script.py")
    assert out.stdout.strip().startswith("NoForgetting(")
    assert "nothing ran" not in out.stderr


def test_apply_before_the_import(python):
    out = python(code=BEFORE + USE)
    assert out.stdout.strip() == PFU
    assert out.stderr.count("MultiheadAttention") == 1
    assert "nothing ran" not in out.stderr


def test_the_report_at_exit(python):
    code = "import torch; torch.nn.Linear(2, 2)(torch.ones(1, 2))"
    message = "torch was patched, but no patched forward was ever called: nothing ran with partial forgetting"
    assert message in python("-c", code, LWPF_PATCH="torch").stderr


def test_the_verbs(python):
    status = python("-m", "lwpf_patch", "status").stdout
    for name in ("torch.nn.functional.multi_head_attention_forward", "torch.nn.modules.activation.MultiheadAttention",
                 "torchvision.models.swin_transformer.ShiftedWindowAttention"):  # fmt: skip
        assert f"  {name}" in status
    diff = python("-m", "lwpf_patch", "diff", "torch").stdout
    assert re.search(r"^\+ +attn_output_weights = func_d.normalise\(attn_output_weights\)$", diff, re.MULTILINE)


def test_a_saved_model_is_refused_where_torch_is_not_patched(python, tmp_path):
    with lwpf_patch.patched("torch"):
        torch.save(encoder(), tmp_path / "model.pt")
    code = "import torch; print(torch.load('model.pt', weights_only=False).layers[0].self_attn.func_d)"
    out = python("-c", code, check=False)
    assert out.returncode == 1
    assert "Here torch is not patched" in out.stderr
    assert python("-c", code, LWPF_UNPICKLE="patch").stdout.strip() == "ReLU()"
