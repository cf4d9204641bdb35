import json

import pytest


def texts(result):
    assert result.exit_code == 0, result.stderr
    return [row["text"] for row in json.loads(result.stdout)["results"]]


def test_streams_the_prompt_and_what_follows(call, trained):
    result = call("generate", trained, "--prompt", "the cat", "-n", 10, "--greedy")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("the cat")
    written = texts(call("generate", trained, "-p", "the cat", "-n", 10, "--greedy", "--json"))
    assert result.stdout == "the cat" + written[0] + "\n"


def test_a_seed_repeats(call, trained):
    arguments = ["generate", trained, "-p", "a", "-n", 12, "--json", "--seed"]
    assert texts(call(*arguments, 1)) == texts(call(*arguments, 1))
    assert texts(call(*arguments, 1)) != texts(call(*arguments, 2))


def test_state_is_carried_over_prompts_and_over_calls(call, trained, tmp_path):
    options = ["-n", 12, "--greedy", "--json"]
    together = texts(call("generate", trained, "-p", "the cat ", "-p", "sat", *options))
    state = tmp_path / "a.state"
    first = texts(call("generate", trained, "-p", "the cat ", *options, "--state", state))
    second = texts(call("generate", trained, "-p", "sat", *options, "--state", state))
    assert first + second == together
    separate = texts(call("generate", trained, "-p", "the cat ", "-p", "sat", *options, "--fresh"))
    assert separate == [first[0], texts(call("generate", trained, "-p", "sat", *options))[0]]


def test_a_damaged_or_foreign_state_is_refused_and_kept(call, trained, tmp_path):
    state = tmp_path / "a.state"
    state.write_bytes(b"no state")
    result = call("generate", trained, "-p", "a", "--state", state)
    assert result.exit_code == 2
    assert "a.state is damaged" in result.stderr
    assert state.read_bytes() == b"no state"


def test_interactive_reads_until_an_empty_line(call, trained):
    result = call("generate", trained, "-i", "-n", 3, "--greedy", input="the\ncat\n\nnever\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("> ") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "temperature must not be negative"),
        (["--top-p", "2"], "top_p"),
        (["-n", "-3"], "--max-new-tokens"),
        (["--fresh", "--state", "x"], "--fresh"),
        (["-i", "--json"], "--interactive"),
    ],
)
def test_bad_options_are_one_clear_line(call, trained, arguments, words):
    result = call("generate", trained, "-p", "a", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_bad_checkpoints_are_named(call, trained, tmp_path):
    result = call("generate", tmp_path / "nowhere", "-p", "a")
    assert result.exit_code == 2
    assert "no model at" in result.stderr
    file = trained / "checkpoints" / "step-00000004" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    result = call("generate", trained, "-p", "a")
    assert result.exit_code == 2
    assert "truncated" in result.stderr
