"""A Hugging Face tokenizer from a GGUF file's metadata (byte-level BPE), with the eight tags on spare special ids.

tokens, merges ──► byte-level BPE (single digits) ──► tags' old pieces ──► special tokens, tags among them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_npr.hf.tag_tokens import assign_carriers
from npr_engine.language.vocabulary import TAG_TEXTS
from npr_ext.errors import UserError

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that llama.cpp matches in the text before BPE (llama.cpp's llama_token_type)."""


@dataclass(frozen=True)
class TokenizerData:
    """What a GGUF file says of its tokenizer.

    Attributes:
        tokens: text of each id, bytes spelled as GPT-2 does.
        kinds: llama_token_type of each id.
        merges: pairs, the most frequent first.
        roles: ids by role: bos, eos, pad, unk; only those that the file names.
        chat_template: Jinja, None where the model has none.
        context_length: tokens that the model was trained for.
    """

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    roles: Mapping[str, int]
    chat_template: str | None
    context_length: int

    def __post_init__(self) -> None:
        if len(self.kinds) != len(self.tokens):
            raise UserError(f"the tokenizer has {len(self.tokens)} tokens and {len(self.kinds)} token types")
        known = set(self.tokens)
        if len(known) != len(self.tokens):
            raise UserError("the tokenizer has the same token text at two ids")
        for left, right in self.merges:
            if not {left, right, left + right} <= known:
                raise UserError(f"the tokenizer merges {left!r} and {right!r}, which are no tokens of it")
        for role, token in self.roles.items():
            if not 0 <= token < len(self.tokens):
                raise UserError(f"the tokenizer's {role} token {token} is none of its {len(self.tokens)}")
        if "eos" not in self.roles:
            raise UserError("the tokenizer names no end-of-sequence token")

    @cached_property
    def carriers(self) -> dict[str, int]:
        """Ids of the tags that the file lacks: control tokens without a role, which the template does not write."""
        template = self.chat_template or ""
        spare = [
            token
            for token, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind == CONTROL and token not in self.roles.values() and text not in TAG_TEXTS
            if text not in template
        ]
        return assign_carriers(self.tokens, spare)

    def tag_pieces(self) -> dict[int, tuple[int, ...]]:
        """For each carrier the ids that spelled its tag before it was one token."""
        plain = _byte_level_bpe(self.tokens, self.merges)
        return {token: tuple(plain.encode(tag).ids) for tag, token in self.carriers.items()}

    @cached_property
    def tokens_with_tags(self) -> tuple[str, ...]:
        """`tokens`, the carriers' texts replaced by their tags."""
        tags = {token: tag for tag, token in self.carriers.items()}
        return tuple(tags.get(token, text) for token, text in enumerate(self.tokens))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens, tags included, by id."""
        typed = zip(self.tokens_with_tags, self.kinds, strict=True)
        return tuple(text for text, kind in typed if kind == CONTROL or text in TAG_TEXTS)

    def backend(self) -> Tokenizer:
        """tokenizer.json; it adds nothing of its own to a text (no beginning-of-sequence token)."""
        tokenizer = _byte_level_bpe(self.tokens_with_tags, self.merges)
        typed = zip(self.tokens_with_tags, self.kinds, strict=True)
        own = [text for text, kind in typed if kind == USER_DEFINED and text not in TAG_TEXTS]
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in own])
        tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in self.special_texts])
        return tokenizer

    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json, in the spelling that transformers 4 and 5 both read."""
        roles = {f"{role}_token": self.tokens_with_tags[token] for role, token in self.roles.items()}
        others = [text for text in self.special_texts if text not in roles.values()]
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "additional_special_tokens": others,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.context_length,
            **template,
        }


def _byte_level_bpe(tokens: tuple[str, ...], merges: tuple[tuple[str, str], ...]) -> Tokenizer:
    """SmolLM's: digits stand alone, then GPT-2's byte-level BPE."""
    entries = {text: token for token, text in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=entries, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
