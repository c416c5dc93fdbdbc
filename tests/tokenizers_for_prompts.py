"""Three families of tokenizers, the same words in each: what prompts have to cope with."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import fastpeft.models

FAMILIES = ("byte-level", "word-piece", "unigram")
WORDS = (
    *("it", "was", "is", "this", "a", "film", "dull", "lovely", "great", "terrible", "bad", "good", "yes", "no"),
    *("maybe", "the", "plot", "very", "long", "story", "greater", "terribly"),
)
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz.,?!:")


@cache
def make_tokenizer(family: str) -> Any:
    """A tokenizer with a mask token: the bundled byte-level BPE, a WordPiece or a Unigram one."""
    if family == "byte-level":
        return transformers.AutoTokenizer.from_pretrained(fastpeft.models.resolve_model("demo"))
    return _word_piece() if family == "word-piece" else _unigram()


def _word_piece() -> Any:
    """As BERT's: lower-casing, `##` continues a word, two segments."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = [*special, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *WORDS]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _unigram() -> Any:
    """As sentencepiece's: a space is part of the word after it, written `▁`."""
    scores = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": -20.0, "▁": -9.0}
    scores |= dict.fromkeys(_LETTERS, -8.0) | {f"▁{word}": -4.0 for word in WORDS}
    core = Tokenizer(models.Unigram(list(scores.items()), unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True),
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
