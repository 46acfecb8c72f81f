"""What of the other hosts' attention is patched, and what can be done with it: found by trying them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from coverage_trying import Called, called_of_func_d, why_not_compiled, why_not_cpu, why_not_folded
from torch import nn

import lwpf_patch

#: Makes a module, and what it is called with; the host is patched.
Make = Callable[[], Called]

E, HEADS = 16, 2


def _mha(need_weights: bool) -> Called:
    module, x = nn.MultiheadAttention(E, HEADS, batch_first=True), torch.randn(2, 5, E)
    return Called(module, (x, x, x), {"need_weights": need_weights})


def _encoder_layer() -> Called:
    return Called(nn.TransformerEncoderLayer(E, HEADS, 8, 0.0, batch_first=True), (torch.randn(2, 5, E),), {})


def _windows(name: str) -> Called:
    from torchvision.models import swin_transformer

    return Called(getattr(swin_transformer, name)(E, [2, 2], [1, 1], HEADS), (torch.randn(1, 4, 4, E),), {})


def _windows_of_videos() -> Called:
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    return Called(ShiftedWindowAttention3d(E, [2, 2, 2], [1, 1, 1], HEADS), (torch.randn(1, 4, 4, 4, E),), {})


def _open_clip(**options: Any) -> Called:
    from open_clip.transformer import Attention

    return Called(Attention(E, HEADS, **options), (torch.randn(2, 5, E),), {})


def _hopfield() -> Called:
    from hflayers import Hopfield

    return Called(Hopfield(E, num_heads=HEADS), (torch.randn(2, 5, E),), {})


def _repertoires() -> Called:
    from deeprc.architectures import AttentionNetwork, DeepRC, OutputNetwork, SequenceEmbeddingCNN

    model = DeepRC(
        max_seq_len=9, sequence_embedding_network=SequenceEmbeddingCNN(23, 3, 6, 1),
        attention_network=AttentionNetwork(6, 1, 5), output_network=OutputNetwork(6, 1, 1, 4),
        device=torch.device("cpu"), sequence_embedding_as_16_bit=False,
    )  # fmt: skip
    bags = torch.tensor([7, 12])
    total = int(bags.sum())
    return Called(model, (torch.randn(total, 9, 23), torch.full((total,), 9), bags), {})


def _transformer(name: str, config: dict[str, Any], options: dict[str, Any] | None = None) -> Called:
    import transformers

    sizes = {
        "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 20,
        "pad_token_id": 0,
    }  # fmt: skip
    family = name.removesuffix("Model")
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**sizes, **config}))
    tokens = {"input_ids": torch.randint(3, 40, (2, 6))}
    if family == "ViT":
        tokens = {"pixel_values": torch.randn(2, 3, 8, 8)}
    if family == "T5":
        tokens["decoder_input_ids"] = torch.randint(3, 40, (2, 4))
    return Called(model, (), {**tokens, **(options or {})})


_GROUPED = {"num_key_value_heads": 2, "head_dim": 6}
_T5 = {"d_model": 24, "d_kv": 6, "d_ff": 20, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}

#: By host, and by what a row is about. The transformers are one model of each kind.
CASES: dict[str, dict[str, Make]] = {
    "torch": {
        "`nn.MultiheadAttention`, `need_weights=False`": functools.partial(_mha, False),
        "`nn.MultiheadAttention`, `need_weights=True`": functools.partial(_mha, True),
        "`nn.TransformerEncoderLayer`": _encoder_layer,
        "torchvision `ShiftedWindowAttention`": functools.partial(_windows, "ShiftedWindowAttention"),
        "torchvision `ShiftedWindowAttentionV2`": functools.partial(_windows, "ShiftedWindowAttentionV2"),
        "torchvision `ShiftedWindowAttention3d`": _windows_of_videos,
        "open_clip `Attention`": _open_clip,
        "open_clip `Attention`, `qk_norm=True`": functools.partial(_open_clip, qk_norm=True),
    },
    "hflayers": {"`HopfieldCore`, and what has one": _hopfield},
    "deeprc": {"`DeepRC`, `AttentionNetwork`": _repertoires},
    "transformers": {
        "an encoder (`BertModel`)": functools.partial(_transformer, "BertModel", {}),
        "the same, `output_attentions=True`": functools.partial(
            _transformer, "BertModel", {}, {"output_attentions": True}
        ),
        "an encoder of images (`ViTModel`)": functools.partial(
            _transformer, "ViTModel", {"image_size": 8, "patch_size": 4}
        ),
        "grouped queries (`LlamaModel`)": functools.partial(_transformer, "LlamaModel", _GROUPED),
        "a position bias (`T5Model`)": functools.partial(_transformer, "T5Model", _T5),
        "a softcap (`Gemma2Model`)": functools.partial(_transformer, "Gemma2Model", _GROUPED),
        "attention sinks (`GptOssModel`)": functools.partial(
            _transformer, "GptOssModel", {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
        ),
        "`DebertaV2Model`": functools.partial(_transformer, "DebertaV2Model", {}),
        "`LongformerModel`": functools.partial(_transformer, "LongformerModel", {"attention_window": 2}),
        '`attn_implementation="flex_attention"` (`ViTModel`)': functools.partial(
            _transformer, "ViTModel", {"image_size": 8, "patch_size": 4, "attn_implementation": "flex_attention"}
        ),
    },
}


def try_out(host: str, row: str) -> dict[str, str]:
    """Makes a module of a patched host, and tries what can be done with it.

    Returns:
        The cells of its row, by column.
    """
    lwpf_patch.apply(host, func_d="relu")
    try:
        try:
            called = CASES[host][row]()
        except lwpf_patch.SettingsError as error:
            nothing = {"uhop": "—", "fold": "—", "compile": "—", "backend": "—"}
            return {"func_d": f"refused: {_reason(str(error))}", **nothing}
        fused = "scaled_dot_product_attention" in called_of_func_d(called)
        reason = why_not_cpu(called) if fused else ""
        compiled = why_not_compiled(called)
        cells = {"func_d": "patched", **_cells_of_maps(host, called)}
    finally:
        lwpf_patch.revert()
    if compiled:
        compiled = "—" if why_not_compiled(called) else f"no: {compiled}"
    backend = "`triton`, `cpu`" if fused and not reason else "`eager`"
    return {**cells, "compile": compiled or "works", "backend": backend}


def _reason(message: str) -> str:
    """Returns why a model is refused, without what to do then."""
    reason = message.partition(" cannot be patched: ")[2] or message
    return re.split(r": leave it out|\. If it shall stay plain", reason)[0]


def _cells_of_maps(host: str, called: Called) -> dict[str, str]:
    try:
        lwpf_patch.apply(host, uhop="on")
    except lwpf_patch.SettingsError:
        return {"uhop": "no", "fold": "—"}
    if not any("feature_map" in module._modules for module in called.module.modules()):
        return {"uhop": "no", "fold": "—"}
    why = why_not_folded(called.module)
    return {"uhop": "yes", "fold": f"no: {why}" if why else "works"}
