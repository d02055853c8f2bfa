"""Which weights of which module classes are more than one matrix: one row per kind of layer.

A row names module classes (shell patterns on the class names, base classes included) and says what
each weight is. The first row whose class matches *and* whose attributes all exist wins, so variants
of one class (self and cross attention, releases of transformers) are further rows. Head counts are
not here: they come from the module or its config. A new architecture is a new row, after reading
how the model's forward splits the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One row of the table.

    Attributes:
        classes: patterns of module class names.
        kernels: dotted attribute of the module to its role, a key of ``roles.ROLES``.
        core: dotted attribute of the module with the head counts; ``""`` for the module itself.
    """

    classes: tuple[str, ...]
    kernels: Mapping[str, str]
    core: str = ""


LAYOUTS: tuple[Layout, ...] = (
    # GPT-2: Conv1D weights [I, O]; self attention stacks q, k, v, cross attention k, v.
    Layout(
        classes=("GPT2Attention", "DecisionTransformerGPT2Attention", "ImageGPTAttention"),
        kernels={"q_attn": "q", "c_attn": "kv", "c_proj": "output"},
    ),
    Layout(
        classes=("GPT2Attention", "DecisionTransformerGPT2Attention", "ImageGPTAttention"),
        kernels={"c_attn": "qkv", "c_proj": "output"},
    ),
    # Rows run (key head, its query heads + k + v, head_dim): GPT-NeoX and BLOOM with one query head
    # each, Falcon with H/K, multi-query GPT-BigCode and Falcon with all H and a single key head.
    Layout(
        classes=(
            "GPTNeoXAttention",
            "GPTNeoXJapaneseAttention",
            "PersimmonAttention",
            "BloomAttention",
            "FalconAttention",
        ),
        kernels={"query_key_value": "interleaved qkv", "dense": "output"},
    ),
    Layout(
        classes=("GPTBigCodeAttention",),
        kernels={"c_attn": "interleaved qkv", "c_proj": "output"},
    ),
    # Rows run q, k, v, each head-major.
    Layout(
        classes=("Phi3Attention", "Phi4MultimodalAttention"),
        kernels={"qkv_proj": "qkv", "o_proj": "output"},
    ),
    Layout(
        classes=("MptAttention", "DbrxAttention"),
        kernels={"Wqkv": "qkv", "out_proj": "output"},
    ),
    Layout(classes=("ModernBertAttention",), kernels={"Wqkv": "qkv", "Wo": "output"}),
    # The BERT family keeps the output kernel beside the module with the heads.
    Layout(
        classes=(
            "BertAttention",
            "RobertaAttention",
            "RobertaPreLayerNormAttention",
            "XLMRobertaAttention",
            "XLMRobertaXLAttention",
            "CamembertAttention",
            "ElectraAttention",
            "Data2VecTextAttention",
            "ErnieAttention",
            "LayoutLMAttention",
        ),
        kernels={
            "self.query": "q",
            "self.key": "k",
            "self.value": "v",
            "output.dense": "output",
        },
        core="self",
    ),
    Layout(
        classes=("DebertaV2Attention",),
        kernels={
            "self.query_proj": "q",
            "self.key_proj": "k",
            "self.value_proj": "v",
            "output.dense": "output",
        },
        core="self",
    ),
    # ViT and its relatives before transformers gave them q_proj, k_proj, v_proj, o_proj.
    Layout(
        classes=("ViTAttention", "DeiTAttention", "Dinov2Attention"),
        kernels={
            "attention.query": "q",
            "attention.key": "k",
            "attention.value": "v",
            "output.dense": "output",
        },
        core="attention",
    ),
    Layout(
        classes=("AlbertAttention",),
        kernels={"query": "q", "key": "k", "value": "v", "dense": "output"},
    ),
    Layout(
        classes=("DistilBertSelfAttention",),
        kernels={"q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "output"},
    ),
    # T5: the inner width num_heads * d_kv may differ from the model's.
    Layout(
        classes=("*T5*Attention", "SwitchTransformersAttention", "Pop2PianoAttention"),
        kernels={"q": "q", "k": "k", "v": "v", "o": "output"},
    ),
    # Separate head-major kernels, GQA included: LLaMA, Mistral, Qwen, Gemma, ViT; Whisper, OPT,
    # GPT-J, BART, CLIP; Phi. Counts that do not fit leave a kernel whole.
    Layout(
        classes=("*Attention",),
        kernels={"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"},
    ),
    Layout(
        classes=("*Attention",),
        kernels={"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "output"},
    ),
    Layout(
        classes=("PhiAttention",),
        kernels={"q_proj": "q", "k_proj": "k", "v_proj": "v", "dense": "output"},
    ),
    # Gated feed-forward layers with both halves in one weight, the activated one first.
    Layout(
        classes=("Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP", "Glm4vTextMLP"),
        kernels={"gate_up_proj": "gate up"},
    ),
    Layout(classes=("ModernBertMLP", "ModernBertDecoderMLP"), kernels={"Wi": "gate up"}),
)
