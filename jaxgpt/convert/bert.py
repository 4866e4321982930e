"""BERT with its masked-LM head (Devlin et al. 2019)."""

from __future__ import annotations

from typing import Any

from jaxgpt.config import Bert
from jaxgpt.convert.family import Family, Fields, Place

_BLOCK = "bert.encoder.layer.{layer}."
_ACTIVATIONS: dict[str, Any] = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
}
_DEFAULTS = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}


def _read(f: Fields) -> Bert:
    f.only("hidden_act", *_ACTIVATIONS)
    f.only("position_embedding_type", "absolute")
    f.only("is_decoder", False)
    f.only("add_cross_attention", False)
    f.only("tie_word_embeddings", True)
    return Bert(
        vocab_size=f["vocab_size"],
        context=f["max_position_embeddings"],
        layers=f["num_hidden_layers"],
        width=f["hidden_size"],
        heads=f["num_attention_heads"],
        mlp_width=f["intermediate_size"],
        mlp=_ACTIVATIONS.get(f["hidden_act"], "gelu_exact"),
        types=f["type_vocab_size"],
        norm_eps=f["layer_norm_eps"],
        dropout=float(f["hidden_dropout_prob"]),
    )


def _write(model: Bert) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.hidden,
        "hidden_act": names[model.mlp],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "type_vocab_size": model.types,
        "layer_norm_eps": model.norm_eps,
    }


BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
    places={
        "": Place("cls.predictions"),
        "embed": Place("bert.embeddings.word_embeddings"),
        "position": Place("bert.embeddings.position_embeddings"),
        "types": Place("bert.embeddings.token_type_embeddings"),
        "embed_norm": Place("bert.embeddings.LayerNorm"),
        "blocks.attention.q": Place(_BLOCK + "attention.self.query"),
        "blocks.attention.k": Place(_BLOCK + "attention.self.key"),
        "blocks.attention.v": Place(_BLOCK + "attention.self.value"),
        "blocks.attention.out": Place(_BLOCK + "attention.output.dense"),
        "blocks.attention_norm": Place(_BLOCK + "attention.output.LayerNorm"),
        "blocks.mlp.up": Place(_BLOCK + "intermediate.dense"),
        "blocks.mlp.down": Place(_BLOCK + "output.dense"),
        "blocks.mlp_norm": Place(_BLOCK + "output.LayerNorm"),
        "dense": Place("cls.predictions.transform.dense"),
        "dense_norm": Place("cls.predictions.transform.LayerNorm"),
    },
    renames=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"^(?=(embeddings|encoder|pooler)\.)", "bert."),  # a base model saved alone has no prefix
    ),
    unused=r"^(bert\.pooler\.|cls\.seq_relationship\.|bert\.embeddings\.(position|token_type)_ids$)",
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)
