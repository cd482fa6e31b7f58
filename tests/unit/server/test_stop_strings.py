"""However the text is cut into pieces, what is read is the text up to the stop string that ends first."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_npr.server.text.delta import TextDelta, Token, joined
from megatron_npr.server.text.stop_strings import StopStrings

TEXTS = st.text("ab", max_size=12)


def expected(text: str, stops: list[str]) -> str:
    """By trying every end, the nearest first, and there the longest stop string."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return text


def read(pieces: list[str], stops: list[str]) -> tuple[list[TextDelta], bool]:
    scanner = StopStrings(stops)
    out: list[TextDelta] = []
    for number, piece in enumerate(pieces):
        out += scanner.push(TextDelta(0, False, piece, (Token(number, None),)))
        if scanner.hit:
            return out, True
    return [*out, *scanner.flush()], False


@given(st.lists(TEXTS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
@example(["ab", "ab", "ac"], ["abac"])
@example(["abc"], ["abcd", "c"])
def test_stop_strings_are_found_across_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    deltas, hit = read(pieces, stops)
    assert "".join(delta.text for delta in deltas) == expected(text, stops)
    assert hit == any(stop in text for stop in stops)


@given(st.lists(TEXTS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    scanner = StopStrings(stops)
    read_so_far = given_so_far = ""
    for piece in pieces:
        given_so_far += piece
        read_so_far += "".join(delta.text for delta in scanner.push(TextDelta(0, False, piece)))
        if scanner.hit:
            return
        held = given_so_far.removeprefix(read_so_far)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_after_the_stop_string_nothing_more_is_text() -> None:
    """What comes behind it in its own piece, as a character that was cut in it, or later."""
    scanner = StopStrings(["END", "DE"])
    first = scanner.push(TextDelta(0, False, "xEND and"))
    assert [delta.text for delta in [*first, *scanner.push(TextDelta(0, False, "\ufffd"))]] == ["x"]
    assert scanner.hit and scanner.flush() == []


def test_a_token_stays_with_the_beginning_of_its_text() -> None:
    deltas, hit = read(["x", "ya", "b!"], ["ab"])
    assert hit
    assert joined(deltas) == [TextDelta(0, False, "xy", (Token(0, None), Token(1, None)))]
