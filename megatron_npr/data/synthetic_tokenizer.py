"""The demo's tokenizer: byte-level BPE whose merges spell a short list of words, so any text can be encoded.

    text ──► tags and chat marks (special tokens) ──► words, single digits, single signs ──► bytes ──► merges

Digits and signs never merge with anything, and neither do newlines, so encoding a text piece by piece gives
the ids of the whole text.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_npr.data.synthetic_tasks import NAMES
from npr_engine.language.vocabulary import TAG_TEXTS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDS = (
    *(f" {name}" for name in NAMES),
    *("user", "assistant", "system", "\\boxed{"),
    *("Sort", " by", " cost", "Work", " in", " order", " parallel", "first", "then", "sorted"),
)
"""Texts that are one token each."""

PIECES = r"\\boxed\{| ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\n|[^\S\n]"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {symbol: index for index, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = word.replace(" ", "Ġ")
        for end in range(2, len(symbols) + 1):
            if symbols[:end] not in entries:
                entries[symbols[:end]] = len(entries)
                merges.append((symbols[: end - 1], symbols[end - 1]))
    backend = Tokenizer(models.BPE(vocab=entries, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (PAD, START, END, *TAG_TEXTS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START, *TAG_TEXTS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def save_demo_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template to `folder`."""
    demo_tokenizer().save_pretrained(str(folder))
