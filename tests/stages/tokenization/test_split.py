"""The validation split against its definition, document by document."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.stages.contract import UserError
from lazypipe.stages.tokenization.split import (
    BOTH,
    DIGEST_DTYPE,
    SKIP,
    TRAIN,
    VALIDATION,
    choose_validation,
    divide_tail,
)


def choose(texts: list[bytes], fraction: float):
    digests = np.array([hashlib.sha256(text).digest() for text in texts], DIGEST_DTYPE)
    return choose_validation(digests, np.array([len(text) for text in texts], np.int64), fraction)


def by_definition(texts: list[bytes], fraction: float) -> set[bytes]:
    distinct = sorted({text for text in texts if text}, key=lambda text: hashlib.sha256(text).digest())
    total = sum(map(len, texts))
    held_out: set[bytes] = set()
    for text in distinct[:-1]:
        if sum(len(text) for text in texts if text in held_out) >= fraction * total:
            break
        held_out.add(text)
    return held_out


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=12), max_size=40), st.floats(0.01, 0.99))
def test_documents_in_order_of_their_hash_until_the_fraction(texts, fraction):
    distinct = {text for text in texts if text}
    if len(distinct) < 2:
        return
    split = choose(texts, fraction)
    held_out = by_definition(texts, fraction)
    expected = [SKIP if not text else VALIDATION if text in held_out else TRAIN for text in texts]
    assert split.sides.tolist() == expected
    assert split.validation_bytes == sum(len(text) for text in texts if text in held_out)
    assert {TRAIN, VALIDATION} <= set(split.sides.tolist())


def test_a_single_distinct_text_is_on_both_sides():
    assert choose([b"", b"abcd", b"abcd"], 0.25).sides.tolist() == [SKIP, BOTH, BOTH]


@settings(deadline=None, derandomize=True)
@given(
    st.text(st.sampled_from("aé日🙂\n "), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_the_tail_is_a_tail_of_about_the_fraction(text, fraction, cuts):
    pieces = [text[a:b].encode() for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True)]
    pieces = [piece for piece in pieces if piece]
    divided = list(divide_tail(pieces, len(text.encode()), fraction))
    head = b"".join(data for side, data in divided if side == TRAIN)
    tail = b"".join(data for side, data in divided if side == VALIDATION)
    assert (head + tail).decode() == text
    assert head.decode()
    assert tail.decode()
    assert [side for side, _ in divided] == sorted(side for side, _ in divided)
    # Twice the fraction at most, and up to a character (3 bytes) around either end.
    wanted = fraction * len(text.encode())
    assert wanted - 4 <= len(tail) <= 2 * wanted + 5


def test_the_tail_begins_after_a_line_break_when_one_is_near():
    text = b"x" * 80 + b"\n" + b"y" * 14
    assert list(divide_tail([text], len(text), 0.1)) == [(TRAIN, b"x" * 80 + b"\n"), (VALIDATION, b"y" * 14)]


@pytest.mark.parametrize("texts", [[], [b"", b""]])
def test_no_text_is_refused(texts):
    with pytest.raises(UserError, match="corpus is empty"):
        choose(texts, 0.1)


def test_a_single_character_is_refused():
    with pytest.raises(UserError, match="single character"):
        choose([b"a"], 0.1)
    with pytest.raises(UserError, match="single character"):
        list(divide_tail(["🙂".encode()], 4, 0.3))
