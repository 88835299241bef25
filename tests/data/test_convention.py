import numpy as np
import pytest

from twofold.data.convention import (
    Convention,
    Example,
    check_example,
    example_from_prompt,
    make_example,
    split_inputs,
)
from twofold.objectives.pair import Pair

BOS, STOP, TURN_END = 2, 1, 7


def convention(**changes):
    fields = {
        "decoder_start": "bos",
        "bos_token_id": BOS,
        "source_bos": False,
        "stop_token_ids": (STOP, TURN_END),
    }
    return Convention(**{**fields, "pad_token_id": 0, **changes})


LOSSLESS = convention(decoder_start="last_source_token")


def array(*ids):
    return np.asarray(ids, dtype=np.int64)


def lists(example):
    return [field.tolist() for field in example[:3]]


def test_t5gemma_starts_the_decoder_with_bos():
    # The published table: encoder A B C, decoder input <s> 1 2 3, target 1 2 3 </s>.
    example = example_from_prompt(array(10, 11, 12), array(21, 22, 23), convention())
    assert example.source.tolist() == [10, 11, 12]
    assert example.decoder_input_ids.tolist() == [BOS, 21, 22, 23]
    assert example.labels.tolist() == [21, 22, 23, STOP]
    assert example.ends
    assert example.decoder_length == 4


def test_source_bos_is_added_once():
    for source in (array(10), array(BOS, 10)):
        assert make_example(
            Pair(source, array(5)), convention(source_bos=True), ends=False
        ).source.tolist() == [2, 10]
    assert make_example(Pair(array(), array(5)), convention(source_bos=True), ends=False).source.tolist() == [
        2
    ]


def test_lossless_moves_the_last_source_token():
    example = make_example(Pair(array(10, 11, 12), array(21, 22)), LOSSLESS, ends=False)
    assert lists(example) == [[10, 11], [12], [21, 22]]
    # Encoder, decoder inputs and the last label are the text in order.
    assert example.decoder_input_ids.tolist() == [12, 21]
    assert example.labels.tolist() == [21, 22]
    with_bos = convention(decoder_start="last_source_token", source_bos=True)
    assert lists(make_example(Pair(array(10), array(21)), with_bos, ends=False)) == [[2], [10], [21]]


def test_header_goes_where_the_convention_says():
    header = array(30, 31)
    example = make_example(Pair(array(10), array(21)), LOSSLESS, ends=True, header=header)
    assert lists(example) == [[10], [30, 31], [21, STOP]]
    assert example.decoder_input_ids.tolist() == [30, 31, 21]
    assert example.labels.tolist() == [-100, 21, STOP]
    assert lists(make_example(Pair(array(10), array(21)), convention(), ends=True, header=header))[:2] == [
        [10, 30, 31],
        [BOS],
    ]
    assert [part.tolist() for part in split_inputs(array(10, 11), LOSSLESS, array())] == [[10], [11]]


@pytest.mark.parametrize("stop", [STOP, TURN_END])
def test_stop_token_is_appended_once(stop):
    assert make_example(Pair(array(1), array(5, stop)), convention(), ends=True).target.tolist() == [5, stop]
    assert make_example(Pair(array(1), array(5)), convention(), ends=False).target.tolist() == [5]


def test_refused_examples():
    with pytest.raises(ValueError, match="the target is empty"):
        make_example(Pair(array(1), array()), convention(), ends=True)
    with pytest.raises(ValueError, match="source is empty"):
        make_example(Pair(array(), array(5)), LOSSLESS, ends=True)
    with pytest.raises(ValueError, match="source starts with two BOS"):
        make_example(Pair(array(BOS, BOS, 5), array(5)), convention(source_bos=True), ends=True)
    with pytest.raises(ValueError, match="source starts with two BOS"):
        split_inputs(array(BOS, BOS), LOSSLESS)  # one would move to the decoder and hide the mistake
    with pytest.raises(ValueError, match="decoder input starts with two BOS"):
        make_example(Pair(array(5), array(BOS, 5)), convention(), ends=True)
    with pytest.raises(ValueError, match=r"target holds negative ids \(-100\)"):
        make_example(Pair(array(5), array(-100, 5)), convention(), ends=True)
    with pytest.raises(ValueError, match="ends in token 5 and not in a stop token"):
        check_example(Example(array(5), array(BOS), array(5), True), convention())
    with pytest.raises(ValueError, match="got 0 and 1 tokens"):
        check_example(Example(array(5), array(), array(5), False), convention())


def test_bos_that_opens_turns_is_no_double_bos():
    example = make_example(Pair(array(BOS, 5, BOS, 6), array(8)), LOSSLESS, ends=False, header=array(BOS, 9))
    assert example.source.tolist() == [BOS, 5, BOS, 6]


def test_convention_needs_its_tokens():
    with pytest.raises(ValueError, match="stop_token_ids"):
        convention(stop_token_ids=())
    with pytest.raises(ValueError, match="need a bos_token_id"):
        convention(bos_token_id=None)
    with pytest.raises(ValueError, match="need a bos_token_id"):
        convention(decoder_start="last_source_token", bos_token_id=None, source_bos=True)
    assert convention(decoder_start="last_source_token", bos_token_id=None).bos_token_id is None
