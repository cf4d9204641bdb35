import pytest
import torch

from nestling.generation import Sampling, TextGenerator

GREEDY = Sampling(temperature=0)


def text(session, prompt, count, sampling=GREEDY):
    return "".join(session.stream(prompt, count, sampling))


@pytest.mark.parametrize("mixer", ["selfmod", "attention"])
def test_greedy_streaming_is_generate(make_model, tokenizer, mixer):
    model = make_model(mixer)
    ids = torch.tensor([list(b"Once upon")])
    wanted = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=257, pad_token_id=258)[0, 9:]
    assert text(TextGenerator(model, tokenizer), "Once upon", 20) == tokenizer.decode(wanted, skip_special_tokens=True)


class Records:
    """Chooses greedily and keeps the logits it saw."""

    def __init__(self):
        self.seen = []

    def choose(self, logits, generator=None):
        self.seen.append(logits)
        return int(logits[:256].argmax())


def test_a_carried_state_is_as_if_read_in_one_piece(make_model, tokenizer):
    model = make_model().double()
    whole, carried, fresh = Records(), Records(), Records()
    text(TextGenerator(model, tokenizer), "Once upon a time, there", 5, whole)
    session = TextGenerator(model, tokenizer)
    text(session, "Once upon", 0)
    text(session, " a time", 0)
    text(session, ", there", 5, carried)
    text(TextGenerator(model, tokenizer), ", there", 5, fresh)
    assert torch.allclose(torch.stack(carried.seen), torch.stack(whole.seen), atol=1e-9)
    assert not torch.allclose(fresh.seen[0], whole.seen[0], atol=1e-3)


def test_what_was_written_is_part_of_the_state(make_model, tokenizer):
    model = make_model()
    ids = list(b"Once upon")
    session = TextGenerator(model, tokenizer)
    text(session, "Once upon", 5)
    assert session.state.get_seq_length() == len(ids) + 5


def test_a_seed_repeats_and_temperature_varies(make_model, tokenizer):
    model = make_model()
    hot = Sampling(temperature=3.0)
    one, two, three = (text(TextGenerator(model, tokenizer, seed=s), "Hello", 20, hot) for s in (1, 1, 2))
    assert one == two
    assert one != three


def test_pieces_end_with_whole_characters(make_model, tokenizer):
    class Speaks:
        """Says the bytes of a text, whatever it reads."""

        def __init__(self, content):
            self.content, self.place = content, 0

        def choose(self, logits, generator=None):
            self.place += 1
            return self.content[self.place - 1]

    said = "aé世🙂b"
    pieces = list(TextGenerator(make_model(), tokenizer).stream("x", len(said.encode()), Speaks(said.encode())))
    assert pieces == list(said)
    cut = list(TextGenerator(make_model(), tokenizer).stream("x", 3, Speaks("a世".encode())))
    assert cut == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_the_end_of_text_token_ends_the_stream(make_model, tokenizer):
    class Ends:
        def choose(self, logits, generator=None):
            return 257

    assert list(TextGenerator(make_model(), tokenizer).stream("x", 9, Ends())) == []


def test_an_empty_prompt_starts_a_text_but_cannot_continue_one(make_model, tokenizer):
    session = TextGenerator(make_model(), tokenizer)
    text(session, "", 3)
    with pytest.raises(ValueError, match="prompt is empty"):
        text(session, "", 3)


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0}, {0}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2, "temperature": 5}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.9, "temperature": 1}, {0, 1, 2}),
        ({"temperature": 5}, {0, 1, 2, 3}),
    ],
)
def test_sampling_chooses_what_it_may(options, allowed):
    generator = torch.Generator().manual_seed(0)
    assert {Sampling(**options).choose(LOGITS, generator) for _ in range(300)} == allowed


def test_sampling_follows_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[Sampling(temperature=1.0).choose(LOGITS, generator)] += 1
    assert torch.allclose(counts / 4000, LOGITS.softmax(0), atol=0.03)


def test_bad_sampling_is_named():
    for options, word in (({"temperature": -1}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0}, "top_p")):
        with pytest.raises(ValueError, match=word):
            Sampling(**options)
    with pytest.raises(ValueError, match="not finite"):
        Sampling().choose(torch.full((4,), float("nan")))
