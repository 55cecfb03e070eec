"""Writes tiny random models: Hugging Face checkpoints, GGUF files, and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = (
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "def main(argc, argv):\n    return argc + len(argv)  # 0123456789\n",
    "Voilà: naïve café, Übergröße, Привет мир, 東京都, 안녕하세요!",
    "the then there their these those this that with without within",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_CONFIGS = {"Gemma3": "Gemma3Text"}  # where the name of a family's config is another


def tiny_llama(
    *,
    family: str = "Llama",
    seed: int = 0,
    dtype: str = "float32",
    vocab_size: int = 160,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    initializer_range: float = 0.15,
    **config: Any,
) -> LlamaForCausalLM:
    """A random Llama whose logits have a standard deviation of about 1.

    Norms and biases are random too. `family`: or another of transformers' with the same structure.
    """
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{_CONFIGS.get(family, family)}Config")(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            initializer_range=initializer_range,
            bos_token_id=1,
            eos_token_id=2,
            **{"max_position_embeddings": 256, "rms_norm_eps": 1e-5, **config},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def write_tiny_llama(
    directory: Path,
    *,
    tokenizer: bool = False,
    max_shard_size: str = "5GB",
    **model: Any,
) -> Path:
    """Saves `tiny_llama(**model)` with save_pretrained, and a tokenizer if asked; the directory."""
    if tokenizer:
        write_tokenizer(directory)
        model.setdefault("vocab_size", train_byte_level().get_vocab_size())
    tiny_llama(**model).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def write_tokenizer(directory: Path, **config: Any) -> Path:
    """Saves a byte-level tokenizer with special tokens and a chat template; the directory."""
    PreTrainedTokenizerFast(
        tokenizer_object=train_byte_level(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        **config,
    ).save_pretrained(directory)
    return directory


def train_byte_level(vocab_size: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer of the corpus above; ids 0 to 2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """The tokenizer.ggml entries of a byte-level tokenizer, as a GGUF file holds them."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    special = tokenizer.get_added_tokens_decoder()
    model = gguf_model(tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


def sentence_piece_metadata(**more: Any) -> dict[str, Any]:
    """The tokenizer.ggml entries of a SentencePiece BPE vocabulary of the corpus above.

    As in Llama's own: special tokens, all bytes, joint pieces best first, then single characters.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(CORPUS, trainer)
    joined = ["".join(merge) for merge in gguf_model(tokenizer)["merges"]]
    pieces = list(dict.fromkeys(joined))
    pieces += sorted(set(tokenizer.get_vocab()) - set(pieces))
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


def gguf_model(tokenizer: Tokenizer) -> dict[str, Any]:
    """The BPE model of a tokenizer as data."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] = {},
    rope_factors: NDArray[np.float32] | None = None,
) -> Path:
    """Writes a Llama as converters to GGUF do; matrices are stored as `kind`, vectors as F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        _add_value(writer, key, value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = parameter.float().numpy()
        if "q_proj" in name:
            data = _interleave_halves(data, config.num_attention_heads)
        elif "k_proj" in name:
            data = _interleave_halves(data, config.num_key_value_heads)
        stored_as = kind if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            _gguf_name(name), gguf.quants.quantize(data, stored_as), raw_dtype=stored_as
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, Sequence)
        writer.add_array(key, value)


def _interleave_halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows i and i + D/2 of each head become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3).reshape(rows.shape))


def _gguf_name(name: str) -> str:
    short = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in short.items():
        name = name.replace(theirs, ours)
    return name
