"""Positions: three readings of the same bytes, what they are beside each other, one run and its table."""

import pytest
import torch

from experiments.positions import experiment, reading, study
from nestling.models import HopeForCausalLM
from nestling.models.hope import HopeConfig
from nestling.training.data import Tokens
from nestling.training.evaluation import token_losses

VOCABULARY = 32


@pytest.fixture
def model():
    def make(mixer, **options):
        torch.manual_seed(0)
        config = HopeConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY, intermediate_size=32,
            mixer=mixer, mixer_options=options,
        )  # fmt: skip
        return HopeForCausalLM(config).eval()

    return make


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (97,), generator=torch.Generator().manual_seed(1))


def test_short_contexts_are_read_from_nothing(model, tokens):
    read = torch.stack([tokens[:49], tokens[30:79]])
    transformer = model("attention")
    found, whole = reading.cut(transformer, read, context=16, stride=4), reading.whole(transformer, read)
    assert found.shape == whole.shape == (2, 48)
    torch.testing.assert_close(found[:, :16], whole[:, :16])
    for place in range(16, 48):
        first = (place - 16) // 4 * 4 + 4  # the context's first token
        with torch.no_grad():
            alone = token_losses(transformer, read[:, first : place + 2])[:, -1]
        torch.testing.assert_close(found[:, place], alone)
        assert 12 < place + 1 - first <= 16
    with pytest.raises(ValueError, match="no multiple of stride"):
        reading.cut(transformer, read, context=16, stride=5)


def test_a_state_is_carried_from_the_first_token_on(model, tokens):
    book = Tokens(tokens.numpy().astype("u2"), 1)
    hope = model("selfmod", chunk_size=4)
    found = reading.streamed(hope, book, [8, 40], 24, window=8, piece=16)
    whole = reading.whole(hope, tokens[None])[0]
    torch.testing.assert_close(found, torch.stack([whole[8:32], whole[40:64]]), atol=1e-5, rtol=1e-4)


def test_attention_is_bounded_in_a_stream_alone(model, tokens):
    book = Tokens(tokens.numpy().astype("u2"), 1)
    transformer, windowed = model("attention"), model("window_attention", window=8)
    windowed.load_state_dict(transformer.state_dict())
    found = reading.streamed(transformer, book, [40], 24, window=8, piece=16)
    torch.testing.assert_close(found, reading.whole(windowed, tokens[None])[:, 40:64], atol=1e-5, rtol=1e-4)
    assert all(layer.mixer.window is None for layer in transformer.model.layers)


def test_stretches_double_beyond_the_trained_length():
    assert experiment.defaults().edges == [0, 16, 64, 256, 512, 1024, 2048, 4096]
    with pytest.raises(ValueError, match="multiple of 4"):
        experiment.defaults().changed(**{"data.seq_len": 30})


def test_a_run_and_its_table(tmp_path):
    settings = experiment.defaults().smoke().changed(out=str(tmp_path), seeds=[0])
    work, rows = experiment.work(settings, None, True), {}
    contender = settings.contenders[2:3]
    for _ in range(2):
        for job in experiment.plan(settings, contender, rows.get):
            rows[job] = rows.get(job) or work(job)
    assert [job.kind for job in rows] == ["train", "test"]
    train, test = rows
    assert settings.fingerprint(train, "x") == settings.changed(times=1).fingerprint(train, "x")
    assert settings.fingerprint(test, "x") != settings.changed(times=1).fingerprint(test, "x")
    bits = rows[test]["bits"]
    assert [len(bits[name]) for name in ("whole", "cut", "carried")] == [2, 2, 2]
    inside = settings.edges.index(settings.data.seq_len)
    torch.testing.assert_close(*(torch.tensor(bits[name])[:, :inside] for name in ("whole", "cut")), atol=1e-3, rtol=0)
    torch.testing.assert_close(*(torch.tensor(bits[n][0])[:inside] for n in ("whole", "carried")), atol=1e-3, rtol=0)
    assert not list((tmp_path / "weights").iterdir())
    summary = experiment.summarize(settings, settings.contenders, rows.get)
    table = experiment.table(summary)
    assert "| transformer + conv | 1 |" in table and "25-48" in table
    experiment.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_book_shorter_than_a_window_is_refused(tmp_path):
    settings = experiment.defaults().smoke().changed(out=str(tmp_path), times=100_000)
    work = experiment.work(settings, None, True)
    job = study.TrainingJob("hope", 3e-3, 0, kind="test")
    with pytest.raises(ValueError, match="lower times"):
        study.read(settings, job, work.texts, None, "cpu")
