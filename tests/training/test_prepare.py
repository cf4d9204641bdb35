"""`nestling data`: a folder of tokens by several processes, resumed after a kill, and read by `nestling train`."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from nestling.cli.main import app
from nestling.training import checkpoint, tokenizers
from nestling.training import prepare as module
from nestling.training.data import load_corpus
from nestling.training.evaluation import positions_apart, token_losses
from nestling.training.loop import train
from nestling.training.prepare import encoder_of, prepare
from nestling.training.texts import pieces_of
from slowly import examples

EOS = 257
ENCODE = """
import sys
sys.argv[0] = "lib/nestling/__main__.py"  # as multiprocessing sets it for the processes of python -m nestling
import pickle
from nestling.training.prepare import encode
encode(*pickle.loads(bytes.fromhex(sys.argv[1])))
print([name for name in ("torch", "transformers", "typer") if name in sys.modules])
"""


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Pieces are encoded here: starting processes costs seconds (one test does)."""

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def shutdown(self, **_): ...
        def submit(self, function, *given):
            from concurrent.futures import Future

            future = Future()
            try:
                future.set_result(function(*given))
            except BaseException as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)


@pytest.fixture
def texts(tmp_path):
    """A text of indented lines, rows of JSON and a table, and the documents they are."""
    folder = tmp_path / "texts"
    folder.mkdir()
    book = "".join(
        f"{'  ' * (i % 3)}line {i} of the book, gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n\n" for i in range(900)
    )
    rows = [f"row {i}\nof many" * (i % 4) for i in range(500)]
    (folder / "a.txt").write_text(book, encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows) + "\n")
    found = [book, *filter(None, rows)]
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pq.write_table(pyarrow.table({"text": ["one", None, "two"] * 50}), folder / "c.parquet", row_group_size=40)
    return folder, found + ["one", "two"] * 50


def documents(ids):
    """The texts of a stream of bytes."""
    ends = np.flatnonzero(ids == EOS)
    return [bytes(part[part != EOS].astype(np.uint8)).decode() for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("piece", [1 << 20, 700])
def test_documents_come_out_as_they_went_in_whatever_the_pieces(texts, tmp_path, config, piece):
    folder, wanted = texts
    made = prepare([str(folder)], tmp_path / "out", val_fraction=0, piece=piece)
    data = config.changed(**{"data.text": [str(tmp_path / "out")], "data.seq_len": 16}).data
    corpus = load_corpus(data)
    assert documents(np.asarray(corpus.train.ids)) == wanted
    ends = np.fromfile(tmp_path / "out" / "train.ends", "<i8")
    assert (ends == np.flatnonzero(np.asarray(corpus.train.ids) == EOS) + 1).all()
    assert made["train"]["bytes"] == corpus.train.num_bytes == sum(len(text.encode()) for text in wanted)
    assert not (tmp_path / "out" / "parts").exists()


def test_what_is_held_out_is_not_trained_on_and_bytes_are_counted(texts, tmp_path):
    folder, wanted = texts
    made = prepare([str(folder)], tmp_path / "out", val_fraction=0.1, piece=9000)
    train, val = (np.fromfile(tmp_path / "out" / f"{name}.bin", made["dtype"]) for name in ("train", "val"))
    total = sum(len(text.encode()) for text in wanted)
    assert made["train"]["bytes"] + made["val"]["bytes"] == total
    assert (train != EOS).sum() == made["train"]["bytes"]
    assert 0.05 * total < made["val"]["bytes"] < 0.15 * total
    assert val[-1] == train[-1] == EOS


def test_a_kill_costs_the_pieces_that_were_open(texts, tmp_path, monkeypatch):
    folder, _ = texts
    whole = prepare([str(folder)], tmp_path / "whole", piece=4000)
    encode, seen = module.encode, []

    def dying(out, number, *rest):
        seen.append(number)
        if len(seen) == 5:
            (out / "parts" / "000007.bin").write_bytes(b"half")  # of one that was killed before its description
            raise KeyboardInterrupt
        encode(out, number, *rest)

    monkeypatch.setattr(module, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(folder)], tmp_path / "out", piece=4000)
    with pytest.raises(ValueError, match="not whole"):
        module.read_manifest(tmp_path / "out")
    with pytest.raises(ValueError, match="other texts or settings"):
        prepare([str(folder)], tmp_path / "out", piece=5000)
    told = []
    assert prepare([str(folder)], tmp_path / "out", piece=4000, told=lambda *x: told.append(x)) == whole
    assert told[0][0] > 0
    assert not set(seen[:4]) & set(seen[5:])
    for name in ("train.bin", "val.bin", "train.ends"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_weights_say_how_often_a_source_is_read(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 1000)
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    made = prepare(sources, tmp_path / "out", weights=(0.5, 3), val_fraction=0, piece=100)
    ids = np.fromfile(tmp_path / "out" / "train.bin", made["dtype"])
    assert (ids == ord("a")).sum() == 500
    assert (ids == ord("b")).sum() == 3000


def test_a_run_on_a_folder_goes_on_where_it_was(text, tmp_path, config):
    prepare([str(text)], tmp_path / "tokens", val_fraction=0.1)
    data = {"data.text": [str(tmp_path / "tokens")], "data.documents": "apart", "steps": 6, "logging.save_every": 3}
    whole = train(config.changed(**data, out=str(tmp_path / "whole")))
    train(config.changed(**data))
    last = checkpoint.list_checkpoints(config.out)[-1]
    shutil.rmtree(last)  # as if it had been killed after step 3
    resumed = train(config.changed(**data), resume=True)
    assert last.name != checkpoint.list_checkpoints(config.out)[0].name
    assert resumed.evaluation.loss == whole.evaluation.loss


@settings(max_examples=examples(60))
@given(st.lists(st.sampled_from(["\n", " ", "ab", "c", "\n\n", "\u2028"]), max_size=40).map("".join), st.integers(1, 9))
def test_pieces_of_a_text_end_with_lines(text, size):
    found = list(pieces_of(text, size))
    assert "".join(found) == text
    for piece, after in zip(found, found[1:]):
        assert len(piece) >= size
        assert piece[-1] == "\n"
        assert not after[0].isspace()
        places = range(size, len(piece))  # the first such place is taken
        assert not any(piece[at - 1] == "\n" and not piece[at].isspace() for at in places)


def test_ids_of_a_process_are_those_of_the_tokenizer(text):
    made = tokenizers.train_bpe([text.read_text()], 300)
    encoder = encoder_of("any", made)
    for given_text in (text.read_text(), "<|eos|>", "", " gr\u00fcn <|bos|>\n\n  x", "\U0001f600\t"):
        assert list(encoder.ids(given_text)) == tokenizers.encode(made, given_text)
    slow = encoder_of("any", type("Slow", (), {"eos_token_id": 3, "__len__": lambda _: 70_000})())
    assert slow.core is None
    assert slow.dtype == np.uint32


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_process_that_encodes_does_not_import_torch(text, tmp_path, kind):
    import pickle

    made = tokenizers.byte_tokenizer() if kind == "bytes" else tokenizers.train_bpe([text.read_text()], 300)
    piece = module.Piece(str(text), "text", 0, text.stat().st_size, True, 0)
    (tmp_path / "parts").mkdir()
    given_args = pickle.dumps((tmp_path, 0, piece, encoder_of(kind, made), "text", 0.1)).hex()
    done = subprocess.run([sys.executable, "-c", ENCODE, given_args], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "parts" / "000000.json").is_file()


@pytest.mark.parametrize("mixer", ["hope", "selfmod", "attention"])
def test_nothing_reaches_a_text_from_the_one_before(mixer):
    from nestling.models.hope import HopeConfig, HopeForCausalLM

    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mixer=mixer)
    ).double()
    window = torch.randint(0, 256, (2, 14))
    window[0, 4] = window[1, 7] = EOS
    assert positions_apart(window, EOS)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    changed = window.clone()
    changed[0, :4] = 7
    a, b = (token_losses(model, w, apart=EOS) for w in (window, changed))
    joined = token_losses(model, changed)
    torch.testing.assert_close(a[0, 5:], b[0, 5:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a[0, 5:], token_losses(model, window[:1, 5:])[0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(joined[0, 5:], b[0, 5:])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere"], "no file or folder"),
        (["a.txt", "--weight", "1", "--weight", "2"], "weights must be 1"),
        (["a.txt", "--tokenizer", "bpe:500"], "trained on all"),
        (["bad.txt"], "not UTF-8"),
        (["bad.jsonl"], "no JSON object"),
        (["a.txt", "--val-fraction", "1"], "val_fraction"),
        (["a.txt", "--workers", "0"], "workers"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("fine\n")
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n')
    result = CliRunner().invoke(app, ["data", *arguments, "--out", "out"])
    assert result.exit_code == 2
    assert word in result.output.replace("\n", " ")
    assert not (tmp_path / "out" / "data.json").exists()


def test_a_folder_is_read_alone_and_by_its_own_tokenizer(text, tmp_path, config):
    prepare([str(text)], tmp_path / "tokens")
    for options, word in (
        ({"data.text": [str(tmp_path / "tokens"), str(text)]}, "read alone"),
        ({"data.text": [str(tmp_path / "tokens")], "data.tokenizer": "bpe:300"}, "leave tokenizer out"),
    ):
        with pytest.raises(ValueError, match=word):
            load_corpus(config.changed(**options).data)
    with pytest.raises(ValueError, match="other files"):
        prepare([str(text)], tmp_path)
