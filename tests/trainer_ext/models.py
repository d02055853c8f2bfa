"""Tiny random models of the supported architectures and the views their weights must get.

Two layers, width 32, four heads of size 8 unless the case is about other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Views = Mapping[str, tuple[str, ...]]

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**TINY, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
FALCON = {**TINY, "new_decoder_architecture": False}
MOE = {**GQA, "num_experts_per_tok": 2}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 11).view(1, 8)}


def text_pair() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": torch.arange(20, 27).view(1, 7)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 8, 8)}


def speech() -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(1, 8, 20),
        "decoder_input_ids": torch.arange(20, 27).view(1, 7),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Parameter names of one attention layer; a fused kernel is named for each of its pieces."""

    q: str
    k: str
    v: str
    o: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One architecture.

    Attributes:
        name: test id.
        model: class name in transformers.
        config: class name of its config.
        options: arguments of the config.
        views: parameter name to the text of its views, per head.
        attention: attention layers whose split the tests prove on the forward pass.
        inputs: arguments of the forward pass.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    views: Views
    attention: tuple[Attention, ...] = ()
    inputs: Callable[[], dict[str, Tensor]] = field(default=text)

    def build(self, **changes: Any) -> nn.Module:
        """Returns the model in evaluation mode, with the same weights every time."""
        torch.manual_seed(0)
        config = getattr(hf, self.config)(**{**self.options, **changes})
        return getattr(hf, self.model)(config).eval()


def weights(prefix: str, views: Mapping[str, str | tuple[str, ...]]) -> Views:
    """Full parameter names; a single view may be given as plain text."""
    return {
        f"{prefix}.{name}.weight": (value,) if isinstance(value, str) else value
        for name, value in views.items()
    }


def attention(prefix: str, q: str, k: str, v: str, o: str) -> Attention:
    """Attention layer of the kernels ``prefix.q`` and so on."""
    return Attention(
        **{
            piece: f"{prefix}.{name}.weight"
            for piece, name in zip("qkvo", (q, k, v, o), strict=True)
        }
    )


def fused(prefix: str, qkv: str, o: str) -> Attention:
    """Attention layer with one kernel for q, k and v."""
    return attention(prefix, qkv, qkv, qkv, o)


QKV = ("q: 4 x [8, 32]", "k: 4 x [8, 32]", "v: 4 x [8, 32]")
QKV_SHARED = ("q: 4 x [8, 32]", "k: 2 x [8, 32]", "v: 2 x [8, 32]")
QKV_MULTI_QUERY = ("q: 4 x [8, 32]", "k: 1 x [8, 32]", "v: 1 x [8, 32]")
GATE_UP = ("gate: 1 x [48, 32]", "up: 1 x [48, 32]")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
OUT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
BERT_PARTS = ("self.query", "self.key", "self.value", "output.dense")


def separate(
    prefix: str,
    names: tuple[str, str, str, str] = PROJECTIONS,
    *,
    q: str = "4 x [8, 32]",
    kv: str = "4 x [8, 32]",
    o: str = "4 x [32, 8]",
) -> Views:
    """Views of four separate attention kernels."""
    return weights(prefix, dict(zip(names, (q, kv, kv, o), strict=True)))


def llama_like(name: str, model: str, config: str, **options: Any) -> Case:
    """Separate kernels with two key heads and a gated MLP; head size 8 or the config's."""
    layer, size = "model.layers.1", options.get("head_dim", 8)
    return Case(
        name=name,
        model=model,
        config=config,
        options={**GQA, **options},
        views={
            **separate(
                f"{layer}.self_attn",
                q=f"4 x [{size}, 32]",
                kv=f"2 x [{size}, 32]",
                o=f"4 x [32, {size}]",
            ),
            **weights(
                f"{layer}.mlp",
                {
                    "gate_proj": "1 x [48, 32]",
                    "up_proj": "1 x [48, 32]",
                    "down_proj": "1 x [32, 48]",
                },
            ),
            "model.embed_tokens.weight": (),
            "lm_head.weight": (),
            f"{layer}.input_layernorm.weight": (),
        },
        attention=(attention(f"{layer}.self_attn", *PROJECTIONS),),
    )


def bert_like(name: str, model: str, config: str, prefix: str, head: Views) -> Case:
    """Query, key, value below ``self``, the output kernel beside it."""
    layer = f"{prefix}.encoder.layer.1"
    return Case(
        name=name,
        model=model,
        config=config,
        options=TINY,
        views={
            **separate(f"{layer}.attention", BERT_PARTS),
            **weights(
                layer, {"intermediate.dense": "1 x [48, 32]", "output.dense": "1 x [32, 48]"}
            ),
            f"{prefix}.embeddings.word_embeddings.weight": (),
            **head,
        },
        attention=(attention(f"{layer}.attention", *BERT_PARTS),),
    )


def falcon(name: str, qkv: tuple[str, ...], **options: Any) -> Case:
    """Falcon's three layouts of one kernel."""
    layer = "transformer.h.1.self_attention"
    return Case(
        name=name,
        model="FalconForCausalLM",
        config="FalconConfig",
        options={**FALCON, **options},
        views=weights(layer, {"query_key_value": qkv, "dense": "4 x [32, 8]"}),
        attention=(fused(layer, "query_key_value", "dense"),),
    )


def mixture(name: str, model: str, config: str, experts: Views, **options: Any) -> Case:
    """LLaMA's attention with stacked experts."""
    layer, size = "model.layers.1", options.get("head_dim", 8)
    return Case(
        name=name,
        model=model,
        config=config,
        options={**MOE, **options},
        views={
            **separate(
                f"{layer}.self_attn",
                q=f"4 x [{size}, 32]",
                kv=f"2 x [{size}, 32]",
                o=f"4 x [32, {size}]",
            ),
            **{f"{layer}.{local}": views for local, views in experts.items()},
        },
        attention=(attention(f"{layer}.self_attn", *PROJECTIONS),),
    )


GPT2_BLOCK = {
    "attn.c_attn": QKV,
    "attn.c_proj": "4 x [32, 8]",
    "mlp.c_fc": "1 x [128, 32]",
    "mlp.c_proj": "1 x [32, 128]",
}

CASES: tuple[Case, ...] = (
    Case(
        name="gpt2",
        model="GPT2LMHeadModel",
        config="GPT2Config",
        options=GPT2,
        views={
            **weights("transformer.h.1", GPT2_BLOCK),
            "transformer.wte.weight": (),
            "transformer.wpe.weight": (),
            "transformer.h.1.attn.c_attn.bias": (),
        },
        attention=(fused("transformer.h.1.attn", "c_attn", "c_proj"),),
    ),
    Case(
        name="gpt2-cross-attention",
        model="GPT2LMHeadModel",
        config="GPT2Config",
        options={**GPT2, "add_cross_attention": True},
        views={
            **weights("transformer.h.1", GPT2_BLOCK),
            **weights(
                "transformer.h.1.crossattention",
                {
                    "q_attn": "4 x [8, 32]",
                    "c_attn": ("k: 4 x [8, 32]", "v: 4 x [8, 32]"),
                    "c_proj": "4 x [32, 8]",
                },
            ),
        },
        attention=(
            attention("transformer.h.1.crossattention", "q_attn", "c_attn", "c_attn", "c_proj"),
        ),
        inputs=lambda: {**text(), "encoder_hidden_states": torch.randn(1, 6, 32)},
    ),
    llama_like("llama", "LlamaForCausalLM", "LlamaConfig"),
    llama_like("mistral", "MistralForCausalLM", "MistralConfig"),
    llama_like("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    llama_like("qwen3", "Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    llama_like("gemma", "GemmaForCausalLM", "GemmaConfig", head_dim=16, tie_word_embeddings=False),
    Case(
        name="gpt-neox",
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        options=TINY,
        views={
            **weights(
                "gpt_neox.layers.1",
                {
                    "attention.query_key_value": QKV,
                    "attention.dense": "4 x [32, 8]",
                    "mlp.dense_h_to_4h": "1 x [48, 32]",
                    "mlp.dense_4h_to_h": "1 x [32, 48]",
                },
            ),
            "gpt_neox.embed_in.weight": (),
        },
        attention=(fused("gpt_neox.layers.1.attention", "query_key_value", "dense"),),
    ),
    Case(
        name="phi3",
        model="Phi3ForCausalLM",
        config="Phi3Config",
        options=GQA,
        views=weights(
            "model.layers.1",
            {
                "self_attn.qkv_proj": QKV_SHARED,
                "self_attn.o_proj": "4 x [32, 8]",
                "mlp.gate_up_proj": GATE_UP,
                "mlp.down_proj": "1 x [32, 48]",
            },
        ),
        attention=(fused("model.layers.1.self_attn", "qkv_proj", "o_proj"),),
    ),
    bert_like(
        "bert",
        "BertForMaskedLM",
        "BertConfig",
        "bert",
        {"cls.predictions.transform.dense.weight": ("1 x [32, 32]",)},
    ),
    bert_like(
        "roberta",
        "RobertaForMaskedLM",
        "RobertaConfig",
        "roberta",
        {"lm_head.dense.weight": ("1 x [32, 32]",)},
    ),
    Case(
        name="t5",
        model="T5ForConditionalGeneration",
        config="T5Config",
        options={
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 6,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        views={
            **{
                name: views
                for block in (
                    "encoder.block.1.layer.0.SelfAttention",
                    "decoder.block.1.layer.0.SelfAttention",
                    "decoder.block.1.layer.1.EncDecAttention",
                )
                for name, views in separate(
                    block, ("q", "k", "v", "o"), q="4 x [6, 32]", kv="4 x [6, 32]", o="4 x [32, 6]"
                ).items()
            },
            **weights(
                "encoder.block.1.layer.1.DenseReluDense",
                {"wi": "1 x [48, 32]", "wo": "1 x [32, 48]"},
            ),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (),
            "shared.weight": (),
        },
        attention=(
            attention("encoder.block.1.layer.0.SelfAttention", "q", "k", "v", "o"),
            attention("decoder.block.1.layer.1.EncDecAttention", "q", "k", "v", "o"),
        ),
        inputs=text_pair,
    ),
    Case(
        name="vit",
        model="ViTForImageClassification",
        config="ViTConfig",
        options={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        views={
            **separate("vit.layers.1.attention"),
            **weights(
                "vit",
                {
                    "layers.1.mlp.fc1": "1 x [48, 32]",
                    "layers.1.mlp.fc2": "1 x [32, 48]",
                    "embeddings.patch_embeddings.projection": "1 x [32, 48]",
                },
            ),
            "vit.embeddings.position_embeddings": (),
            "vit.embeddings.cls_token": (),
        },
        attention=(attention("vit.layers.1.attention", *PROJECTIONS),),
        inputs=image,
    ),
    Case(
        name="whisper",
        model="WhisperForConditionalGeneration",
        config="WhisperConfig",
        options=WHISPER,
        views={
            **separate("model.encoder.layers.1.self_attn", OUT_PROJECTIONS),
            **separate(
                "model.decoder.layers.1.encoder_attn",
                OUT_PROJECTIONS,
                q="2 x [16, 32]",
                kv="2 x [16, 32]",
                o="2 x [32, 16]",
            ),
            **weights(
                "model.encoder",
                {
                    "conv1": "1 x [32, 24]",
                    "conv2": "1 x [32, 96]",
                    "layers.1.fc1": "1 x [48, 32]",
                    "layers.1.fc2": "1 x [32, 48]",
                },
            ),
            "model.decoder.embed_tokens.weight": (),
            "model.decoder.embed_positions.weight": (),
        },
        attention=(
            attention("model.encoder.layers.1.self_attn", *OUT_PROJECTIONS),
            attention("model.decoder.layers.1.self_attn", *OUT_PROJECTIONS),
            attention("model.decoder.layers.1.encoder_attn", *OUT_PROJECTIONS),
        ),
        inputs=speech,
    ),
    Case(
        name="gpt-j",
        model="GPTJForCausalLM",
        config="GPTJConfig",
        options={**GPT2, "rotary_dim": 4},
        views=separate("transformer.h.1.attn", OUT_PROJECTIONS),
        attention=(attention("transformer.h.1.attn", *OUT_PROJECTIONS),),
    ),
    Case(
        name="opt",
        model="OPTForCausalLM",
        config="OPTConfig",
        options={**TINY, "ffn_dim": 48, "word_embed_proj_dim": 16},
        views={
            **separate("model.decoder.layers.1.self_attn", OUT_PROJECTIONS),
            **weights(
                "model.decoder",
                {
                    "layers.1.fc1": "1 x [48, 32]",
                    "project_in": "1 x [32, 16]",
                    "project_out": "1 x [16, 32]",
                },
            ),
        },
        attention=(attention("model.decoder.layers.1.self_attn", *OUT_PROJECTIONS),),
    ),
    Case(
        name="bloom",
        model="BloomForCausalLM",
        config="BloomConfig",
        options={"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        views=weights(
            "transformer.h.1.self_attention", {"query_key_value": QKV, "dense": "4 x [32, 8]"}
        ),
        attention=(fused("transformer.h.1.self_attention", "query_key_value", "dense"),),
    ),
    falcon("falcon-multi-query", QKV_MULTI_QUERY, multi_query=True),
    falcon("falcon-multi-head", QKV, multi_query=False),
    falcon("falcon-grouped", QKV_SHARED, num_kv_heads=2, new_decoder_architecture=True),
    Case(
        name="phi",
        model="PhiForCausalLM",
        config="PhiConfig",
        options=GQA,
        views={
            **separate("model.layers.1.self_attn", (*PROJECTIONS[:3], "dense"), kv="2 x [8, 32]"),
        },
        attention=(attention("model.layers.1.self_attn", *PROJECTIONS[:3], "dense"),),
    ),
    *(
        Case(
            name=f"gpt-bigcode-{name}",
            model="GPTBigCodeForCausalLM",
            config="GPTBigCodeConfig",
            options={**GPT2, "multi_query": multi_query},
            views=weights("transformer.h.1.attn", {"c_attn": views, "c_proj": "4 x [32, 8]"}),
            attention=(fused("transformer.h.1.attn", "c_attn", "c_proj"),),
        )
        for name, multi_query, views in (
            ("multi-query", True, QKV_MULTI_QUERY),
            ("multi-head", False, QKV),
        )
    ),
    Case(
        name="mpt",
        model="MptForCausalLM",
        config="MptConfig",
        options={"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        views=weights("transformer.blocks.1.attn", {"Wqkv": QKV, "out_proj": "4 x [32, 8]"}),
        attention=(fused("transformer.blocks.1.attn", "Wqkv", "out_proj"),),
    ),
    Case(
        name="dbrx",
        model="DbrxForCausalLM",
        config="DbrxConfig",
        options={
            "vocab_size": 64,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e3, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        },
        views=weights(
            "transformer.blocks.1.norm_attn_norm.attn",
            {"Wqkv": QKV_SHARED, "out_proj": "4 x [32, 8]"},
        ),
        attention=(fused("transformer.blocks.1.norm_attn_norm.attn", "Wqkv", "out_proj"),),
    ),
    Case(
        name="modernbert",
        model="ModernBertForMaskedLM",
        config="ModernBertConfig",
        options={**TINY, "cls_token_id": 1, "sep_token_id": 2},
        views=weights(
            "model.layers.1",
            {"attn.Wqkv": QKV, "attn.Wo": "4 x [32, 8]", "mlp.Wi": GATE_UP},
        ),
        attention=(fused("model.layers.1.attn", "Wqkv", "Wo"),),
    ),
    Case(
        name="distilbert",
        model="DistilBertForMaskedLM",
        config="DistilBertConfig",
        options={
            "vocab_size": 64,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
        views=separate(
            "distilbert.transformer.layer.1.attention", ("q_lin", "k_lin", "v_lin", "out_lin")
        ),
        attention=(
            attention(
                "distilbert.transformer.layer.1.attention", "q_lin", "k_lin", "v_lin", "out_lin"
            ),
        ),
    ),
    Case(
        name="albert",
        model="AlbertForMaskedLM",
        config="AlbertConfig",
        options={**TINY, "embedding_size": 16},
        views=separate(
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
            ("query", "key", "value", "dense"),
        ),
    ),
    bert_like("electra", "ElectraForMaskedLM", "ElectraConfig", "electra", {}),
    Case(
        name="deberta-v2",
        model="DebertaV2ForMaskedLM",
        config="DebertaV2Config",
        options=TINY,
        views=separate(
            "deberta.encoder.layer.1.attention",
            ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
        ),
        attention=(
            attention(
                "deberta.encoder.layer.1.attention",
                "self.query_proj",
                "self.key_proj",
                "self.value_proj",
                "output.dense",
            ),
        ),
    ),
    mixture(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {
            "mlp.experts.gate_up_proj": ("gate: 3 x [48, 32]", "up: 3 x [48, 32]"),
            "mlp.experts.down_proj": ("3 x [32, 48]",),
            "mlp.gate.weight": ("1 x [3, 32]",),
        },
        num_local_experts=3,
    ),
    mixture(
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            "mlp.experts.gate_up_proj": ("gate: 3 x [16, 32]", "up: 3 x [16, 32]"),
            "mlp.experts.down_proj": ("3 x [32, 16]",),
            "mlp.shared_expert.gate_proj.weight": ("1 x [24, 32]",),
        },
        num_experts=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    mixture(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "mlp.experts.gate_up_proj": ("gate: 3 x [16, 32]", "up: 3 x [16, 32]"),
            "mlp.experts.down_proj": ("3 x [32, 16]",),
        },
        num_experts=3,
        moe_intermediate_size=16,
        head_dim=16,
    ),
    mixture(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "mlp.experts.gate_up_proj": ("gate: 3 x [48, 32]", "up: 3 x [48, 32]"),
            "mlp.experts.down_proj": ("3 x [32, 48]",),
            "mlp.experts.gate_up_proj_bias": (),
            "mlp.experts.down_proj_bias": (),
        },
        num_local_experts=3,
        head_dim=16,
        layer_types=["full_attention", "full_attention"],
    ),
    mixture(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "feed_forward.experts.gate_up_proj": ("gate: 3 x [48, 32]", "up: 3 x [48, 32]"),
            "feed_forward.experts.down_proj": ("3 x [32, 48]",),
        },
        num_local_experts=3,
        intermediate_size_mlp=40,
        head_dim=8,
    ),
)
