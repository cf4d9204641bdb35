import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nestling.training.tokenizers import byte_tokenizer, encode, fingerprint, is_bytes, load_tokenizer, train_bpe

BYTES = byte_tokenizer()


def test_byte_i_is_id_i():
    assert len(BYTES) == 259
    assert [BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id] == [256, 257, 258]
    for byte in range(128):
        assert encode(BYTES, chr(byte)) == [byte]
    assert is_bytes(BYTES)


@given(st.text(max_size=40))
def test_any_text_round_trips_as_its_bytes(text):
    ids = encode(BYTES, text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_special_tokens_in_a_text_stay_text():
    assert encode(BYTES, "a<|eos|>b") == list(b"a<|eos|>b")


def test_invalid_bytes_decode_to_replacement_characters():
    assert BYTES.decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"
    assert BYTES.decode([65, 257], skip_special_tokens=True) == "A"


def test_saved_tokenizer_is_the_same(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(loaded, "Grüße, 世界") == list("Grüße, 世界".encode())
    assert fingerprint(loaded) == fingerprint(BYTES)
    assert is_bytes(loaded)


def test_trained_bpe_shortens_and_round_trips():
    text = "the cat sat on the mat, the cat sat on the hat. " * 50
    tokenizer = train_bpe([text], 300)
    ids = encode(tokenizer, text + "ü<|eos|>")
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text + "ü<|eos|>"
    assert len(tokenizer) <= 300
    assert max(ids) < len(tokenizer)
    assert tokenizer.eos_token_id not in ids
    assert not is_bytes(tokenizer)
    assert fingerprint(tokenizer) != fingerprint(BYTES)


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match="bpe:100"):
        train_bpe(["a"], 100)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
