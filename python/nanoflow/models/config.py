"""What an adapter of a model family hands to the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanoflow.models.rope import Rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Dimensions and traits of a decoder-only model: csrc/model/spec.h and a few more."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope: Rope
    max_position_embeddings: int  # that scaling makes of those in the config
    layer_windows: tuple[int, ...] = ()  # keys a token sees at most, by layer; empty or 0: all
    num_experts: int = 0  # 0: one dense MLP; else intermediate_size is that of an expert
    experts_per_token: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts add up to 1
    rope_local: Rope | None = None  # of layers with a window, where it is another
    activation: str = "silu"
    embed_scale: float = 1.0
    attention_scale: float = 0.0  # 0: head_dim^-0.5
    norm_unit_offset: bool = False
    post_norms: bool = False

    def spec_arguments(self, dtype: str, max_model_len: int | None = None) -> dict[str, Any]:
        """Keyword arguments of `_core.ModelSpec`.

        `dtype` is the name of the computing dtype. Some rope scalings depend on `max_model_len`:
        see rope.py.
        """
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_inv_freq": tuple(self.rope.inv_freq(max_model_len).tolist()),
            "rope_attention_factor": self.rope.attention_factor,
            "rope_local_inv_freq": ()
            if self.rope_local is None
            else tuple(self.rope_local.inv_freq(max_model_len).tolist()),
            "layer_windows": self.layer_windows,
            "activation": self.activation,
            "embed_scale": self.embed_scale,
            "attention_scale": self.attention_scale,
            "norm_unit_offset": self.norm_unit_offset,
            "post_norms": self.post_norms,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "norm_topk_prob": self.norm_topk_prob,
            "dtype": dtype,
        }


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """Rows [row_begin, row_begin + rows) of one of the engine's tensors."""

    name: str
    row_begin: int
    rows: int


@dataclass(frozen=True, slots=True)
class CheckpointWeight:
    """A tensor a checkpoint must hold, and the targets its rows fill one after the other.

    A tensor of three dimensions is one of matrices, whose rows these are.
    """

    shape: tuple[int, ...]
    targets: tuple[WeightTarget, ...]
