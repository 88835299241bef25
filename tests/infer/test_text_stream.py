import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.infer.text_stream import TextStream


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    """What comes with each token, and at the end."""
    given_out = []
    for token in ids:
        given_out.append(stream.push(token))
        if stream.stopped:
            break
    return [*given_out, stream.finish()]


def test_a_character_comes_whole(byte_tokenizer):
    ids = byte_tokenizer("aé€😀b")["input_ids"]
    assert len(ids) == 11
    found = pieces(TextStream(byte_tokenizer), ids)
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_comes_at_the_end(byte_tokenizer):
    ids = byte_tokenizer("a€")["input_ids"][:-1]
    assert pieces(TextStream(byte_tokenizer), ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_give_no_text(byte_tokenizer):
    ids = [*byte_tokenizer("a")["input_ids"], 256, *byte_tokenizer("b")["input_ids"], 257]
    assert pieces(TextStream(byte_tokenizer), ids) == ["a", "", "b", "", ""]


def test_spaces_between_words_survive(word_tokenizer):
    """A tokenizer whose decoder puts spaces between tokens, and none before the first."""
    ids = word_tokenizer("the cat sat")["input_ids"]
    assert pieces(TextStream(word_tokenizer), ids) == ["the", " cat", " sat", ""]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one###two", ["###"], ["o", "n", "e", "", "", "", ""]),
        ("a##b###c", ["###"], ["a", "", "", "##b", "", "", "", ""]),
        ("aab", ["ab"], ["", "a", "", ""]),  # the first a may begin the stop string, the second does
        ("xyz", ["yz", "y"], ["x", "", ""]),
        ("ab##", ["###"], ["a", "b", "", "", "##"]),
        ("a€b", ["€"], ["a", "", "", "", ""]),
    ],
)
def test_stop_strings_across_tokens(byte_tokenizer, text, stops, expected):
    stream = TextStream(byte_tokenizer, stops)
    assert pieces(stream, byte_tokenizer(text)["input_ids"]) == expected
    assert stream.stopped == any(stop in text for stop in stops)
    assert stream.text == "".join(expected)


def test_of_two_stop_strings_in_one_token_the_first_counts(word_tokenizer):
    assert pieces(TextStream(word_tokenizer, ["e", "h"]), [1, 2]) == ["t", ""]


def test_a_fork_goes_its_own_way(byte_tokenizer):
    a, b, c, d = byte_tokenizer("abcd")["input_ids"]
    one = TextStream(byte_tokenizer, ["cd"])
    one.push(a)
    other = one.fork()
    assert (one.push(b), other.push(c), other.push(d)) == ("b", "", "")
    assert (one.text, one.stopped, other.text, other.stopped) == ("ab", False, "a", True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 257), max_size=40), st.lists(st.text("abé#", min_size=1, max_size=3), max_size=3)
)
def test_all_pieces_are_the_whole_text_up_to_the_stop(byte_tokenizer, ids, stops):
    """Random bytes, mostly no valid text; nothing that was given out is taken back."""
    whole = byte_tokenizer.decode(ids, skip_special_tokens=True)
    places = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(places)] if places else whole
    stream = TextStream(byte_tokenizer, stops)
    assert "".join(pieces(stream, ids)) == stream.text == expected
