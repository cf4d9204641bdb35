"""`nestling label` as a user calls it: learn, ask, learn more, check, forget."""

import json


def test_labels_from_the_shell(call, trained, tmp_path):
    a, b = tmp_path / "a.csv", tmp_path / "b.jsonl"
    a.write_text("text,label\nthe cat sat on the mat,animal\nthe dog ran to the log,animal\n1+2=3,sum\n4+5=9,sum\n")
    b.write_text("".join(json.dumps({"text": t, "label": "shout"}) + "\n" for t in ("STOP! GO!", "HELLO! STOP!")))
    result = call("label", trained, "--learn", a)
    assert result.exit_code == 0, result.stderr
    assert "2 labels from 4 examples" in result.stderr
    state = trained.with_name("run.labels")
    before = state.read_bytes()
    asked = call("label", trained, "4+5=8", "the cat ran", "--top", 2)
    assert [line.split()[0] for line in asked.stdout.splitlines()] == ["sum", "animal"]
    assert state.read_bytes() == before
    found = json.loads(call("label", trained, "--learn", b, "--check", a, "STOP!", "--json").stdout)
    assert (found["labels"], found["examples"], found["check"]["right"]) == (3, 6, 4)
    assert found["texts"][0]["labels"] == ["shout"] and found["state_bytes"] == state.stat().st_size
    gone = json.loads(call("label", trained, "--forget", b, "STOP!", "--json").stdout)
    assert gone["examples"] == 4 and gone["texts"][0]["labels"] != ["shout"]


def test_what_is_missing_is_said(call, trained, tmp_path):
    (tmp_path / "a.csv").write_text("text,category\na,b\n")
    for arguments, said in (
        ((), "nothing to do"), (("a",), "no labels at"), (("a", "--top", 0), "--top must be at least 1"),
        (("--learn", tmp_path / "a.csv"), "--columns"),
        (("--learn", tmp_path / "a.csv", "--columns", "text"), "two names"),
    ):  # fmt: skip
        result = call("label", trained, *arguments)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert call("label", trained, "--learn", tmp_path / "a.csv", "--columns", "text, category").exit_code == 0
