"""Text that comes piece by piece against the tokenizer's decoding of the whole."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import _tokenizer as make_tokenizer
from tokenizers import Tokenizer, decoders, models

from ojfa_export.runtime.text import REPLACEMENT, TextStream

BYTE_LEVEL = make_tokenizer()
END_OF_TEXT = 0
token_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def sentencepiece() -> Tokenizer:
    """As of Llama 2: words begin with a mark, rare characters are bytes."""
    pieces = ["<unk>", "<s>", "▁", "▁def", "▁parse", "(", "self", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    vocab |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


SENTENCEPIECE = sentencepiece()
FIRST_BYTE = SENTENCEPIECE.token_to_id("<0x00>")

SPECIAL = Tokenizer.from_str(BYTE_LEVEL.to_str())
SPECIAL.add_special_tokens(["<|im_end|>"])
SPECIAL.add_tokens(["<plain>"])


def stream_pieces(tokenizer, ids, *, stop=(), prompt=()) -> list[str]:
    """What a caller gets who stops where the stream says so."""
    stream = TextStream(tokenizer, stop, prompt)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@given(texts)
@example("naïve 漢字 👩‍👩‍👧‍👦")
def test_text_comes_in_whole_characters(text):
    ids = BYTE_LEVEL.encode(text).ids
    pieces = stream_pieces(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(texts.filter(lambda text: REPLACEMENT not in text))
def test_a_character_comes_with_its_last_token(text):
    """Nothing is held back that is whole already."""
    ids = BYTE_LEVEL.encode(text).ids
    stream = TextStream(BYTE_LEVEL)
    given_text = ""
    for count, token in enumerate(ids, 1):
        given_text += stream.push(token)
        assert given_text == BYTE_LEVEL.decode(ids[:count]).rstrip(REPLACEMENT)


@given(token_ids)
def test_any_tokens(ids):
    """A model may write bytes that are no text; the stream says what the tokenizer says."""
    assert "".join(stream_pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(texts, token_ids)
@example("x" + REPLACEMENT, [70])
@example("", [END_OF_TEXT, 70])
def test_the_prompt_is_not_part_of_the_text(prompt, ids):
    prompt_ids = BYTE_LEVEL.encode(prompt).ids
    whole = BYTE_LEVEL.decode(prompt_ids + ids)
    assert "".join(stream_pieces(BYTE_LEVEL, ids, prompt=prompt_ids)) == whole[len(prompt) :]


def test_a_character_that_the_prompt_began():
    ids = BYTE_LEVEL.encode("é漢x").ids
    for split in range(1, len(ids)):
        began = BYTE_LEVEL.decode(ids[:split]).rstrip(REPLACEMENT)
        pieces = stream_pieces(BYTE_LEVEL, ids[split:], prompt=ids[:split])
        assert began + "".join(pieces) == "é漢x"


def ids_of(*pieces: str) -> list[int]:
    return [SENTENCEPIECE.token_to_id(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("prompt", "pieces", "expected"),
    [
        ([], ["▁def", "▁parse", "("], ["def", " parse", "(", ""]),
        (["<s>"], ["▁def", "▁parse"], ["def", " parse", ""]),
        (["▁def"], ["▁parse", "▁def"], [" parse", " def", ""]),
        (["<s>", "▁def"], ["<s>", "▁parse"], ["", " parse", ""]),
        (["▁def"], ["▁", "▁def", "▁▁", "self"], [" ", " def", "  ", "self", ""]),
        (["self"], ["<0xE6>", "<0xBC>", "<0xA2>", "▁def"], ["", "", "漢", " def", ""]),
        (["self"], ["<0xE6>", "<0xBC>"], ["", "", 2 * REPLACEMENT]),
    ],
)
def test_leading_spaces_and_fallback_bytes(prompt, pieces, expected):
    actual = stream_pieces(SENTENCEPIECE, ids_of(*pieces), prompt=ids_of(*prompt))
    assert actual == expected
    whole = SENTENCEPIECE.decode(ids_of(*prompt, *pieces))
    assert SENTENCEPIECE.decode(ids_of(*prompt)) + "".join(actual) == whole


@given(st.lists(st.integers(0, SENTENCEPIECE.get_vocab_size() - 1), max_size=30))
@example([FIRST_BYTE + byte for byte in "漢".encode()] + [FIRST_BYTE + 0xFF])
def test_any_sentencepiece_tokens(ids):
    """Bytes spoil a character before them after the fact; all else is as decoded."""
    text = "".join(stream_pieces(SENTENCEPIECE, ids))
    if REPLACEMENT not in (whole := SENTENCEPIECE.decode(ids)):
        assert text == whole
    else:
        assert REPLACEMENT in text


@given(
    st.lists(st.sampled_from("abc "), max_size=20).map("".join),
    st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example("aab", ["aab"])
@example("ab", ["abc", "b"])
def test_stop_strings(text, stop):
    """Against a search of all text so far at each token, where nothing is ever held back."""
    ids = BYTE_LEVEL.encode(text).ids
    expected, so_far = text, ""
    for piece in stream_pieces(BYTE_LEVEL, ids):
        so_far += piece
        starts = [so_far.find(string) for string in stop if string in so_far]
        if starts:
            expected = so_far[: min(starts)]
            break
    assert "".join(stream_pieces(BYTE_LEVEL, ids, stop=stop)) == expected


@given(
    st.lists(st.sampled_from([*"ab", "<|endoftext|>", "<|im_end|>", "<plain>"]), max_size=20),
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "a<|im_end|>", "<|im_end|>b", "<|im_end|><|endoftext|>a", "<plain>"]
        ),
        min_size=1,
        max_size=2,
    ),
)
@example(["a", "<|im_end|>", "b"], ["<|im_end|>"])
def test_stop_strings_that_name_special_tokens(pieces, stop):
    """Against a search of all text with the named ones in it; text that is given has none."""
    named = [token for token in ("<|endoftext|>", "<|im_end|>") if token in "".join(stop)]
    heard = [piece for piece in pieces if piece in named or not piece.startswith("<|")]
    expected = heard
    for count in range(len(heard) + 1):
        so_far = "".join(heard[:count])
        if starts := [so_far.find(string) for string in stop if string in so_far]:
            expected = [so_far[: min(starts)]]
            break
    ids = [SPECIAL.token_to_id(piece) for piece in pieces]
    text = "".join(expected)
    for token in named:
        text = text.replace(token, "")
    assert "".join(stream_pieces(SPECIAL, ids, stop=stop)) == text


@pytest.mark.parametrize("stop", [["<|im_end|>"], ["a<|im_end|>b", "b<|im_end|>"]])
def test_streams_stop_where_transformers_stops(rng, stop):
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=SPECIAL)
    criteria = transformers.StopStringCriteria(wrapped, stop)
    for _ in range(20):
        pieces = rng.choice(["a", "b", "<|im_end|>", "<plain>"], 12)
        ids = [SPECIAL.token_to_id(piece) for piece in pieces]
        stream = TextStream(SPECIAL, stop)
        for count, token in enumerate(ids, 1):
            stream.push(token)
            assert stream.stopped == bool(criteria(torch.tensor([ids[:count]]), None))
            if stream.stopped:
                break


def test_a_stop_string_across_tokens():
    ids = BYTE_LEVEL.encode("x = 1\n\ny").ids
    stream = TextStream(BYTE_LEVEL, ["1\n\ny"])
    text = ""
    for token in ids[:-1]:
        text += stream.push(token)
        assert not stream.stopped
        assert "1" not in text
    assert text + stream.push(ids[-1]) == "x = "
    assert stream.stopped
    assert stream.finish() == ""


def test_text_that_only_began_like_a_stop_string_is_given_in_the_end():
    [first, second] = (BYTE_LEVEL.encode(text).ids for text in ("a#", "#"))
    stream = TextStream(BYTE_LEVEL, ["###"])
    assert [stream.push(token) for token in first + second] == ["a", "", ""]
    assert stream.finish() == "##"
    assert not stream.stopped


def test_a_stop_string_of_several_tokens_per_character():
    text = "ab漢字cd"
    assert "".join(stream_pieces(BYTE_LEVEL, BYTE_LEVEL.encode(text).ids, stop=["漢字"])) == "ab"
