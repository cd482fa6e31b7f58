"""A character-level vocabulary and a writer of canonical responses: what tests of the language speak."""

from npr_engine.language.grammar import Grammar
from npr_engine.language.vocabulary import TAG_TEXTS, Vocabulary
from npr_ext import TagIds

CHARACTERS = "\n abcdefgh0123456789:+*=;,.?{}\\oxed"
EOS_TEXT = "<eos>"
PIECES = ("<pad>", EOS_TEXT, *TAG_TEXTS, *dict.fromkeys(CHARACTERS))
EOS = 1
VOCABULARY = Vocabulary(PIECES, eos_id=EOS, tags=TagIds(*range(2, 10)))
GRAMMAR = Grammar(VOCABULARY)


def encode(text: str) -> list[int]:
    """Token ids of text; tags and <eos> are one token, everything else a character each."""
    ids: list[int] = []
    while text:
        piece = next((p for p in PIECES[1:10] if text.startswith(p)), text[0])
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def block(*items: str, takeaway: str = "8") -> str:
    """A canonical block; each item is `plan|step`."""
    plans = "\n".join(f"<plan>{n}: {item.split('|')[0]}</plan>" for n, item in enumerate(items, 1))
    steps = "\n".join(f"<step>\n{n}: {item.split('|')[1]}\n</step>" for n, item in enumerate(items, 1))
    return f"<guideline>\n{plans}\n</guideline>\n{steps}\n<takeaway>\n{takeaway}\n</takeaway>"


def answer(text: str) -> str:
    """A conclusion."""
    return f"\n\\boxed{{{text}}}{EOS_TEXT}"
