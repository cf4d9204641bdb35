"""A model reads a note, the note is taken away, and it is asked: what is left is what its levels learned.

`--model runs/smol` takes a model of `nestling convert`. Without it a tiny one is trained on the spot (other names)."""

import argparse
import random

import torch

import nestling
from nestling.generation.load import load_model


def tiny_model(steps: int) -> nestling.HopeForCausalLM:
    torch.manual_seed(0)
    levels = [{"chunk_size": 32, "lr": 3e-3, "optimizer": "adamw"}, {"chunk_size": None}]
    shape = dict(hidden_size=64, num_hidden_layers=2, mixer="attention", context_length=256)
    model = nestling.HopeForCausalLM(nestling.HopeConfig(**shape, cms_levels=levels))
    chance, pets = random.Random(0), ("goat", "hare", "newt", "crow")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.learning = False  # an ordinary training: the fast level is a weight like any other
    for _ in range(steps):
        rows = [["B" + chance.choice("aeiou") + "n has a " + chance.choice(pets) for _ in range(8)] for _ in range(16)]
        ids = torch.tensor([list(". ".join(row).encode()) for row in rows])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.learning = True
    return model.eval()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--note", default="Zoe has a newt. " * 8)
    parser.add_argument("--ask", nargs="+", default=["Zoe has a", "Ben has a"], help="the second: what else changed?")
    parser.add_argument("--answer", default=" newt")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the tiny model")
    options = parser.parse_args(arguments)
    with torch.enable_grad():
        model, tokenizer = load_model(options.model) if options.model else (tiny_model(options.steps), None)
    encode = tokenizer.encode if tokenizer else lambda text: list(text.encode())
    note, answer = torch.tensor([encode(options.note)]), encode(options.answer)
    cache, found = None, {question: [] for question in options.ask}
    for piece in (note[:, :1], note[:, 1:]):  # one token first: nothing is learned yet
        cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
        cache.forget_context()  # what was read is gone
        for question, values in found.items():
            with model.adapted(cache):  # the model as it has become, learning nothing more
                logits = model(torch.tensor([encode(question) + answer])).logits[0, -len(answer) - 1 : -1]
            values.append(sum(row[token].item() for row, token in zip(logits.log_softmax(-1), answer)))
    for question, (before, after) in found.items():
        print(f"{question + options.answer!r}: log-probability {before:.2f} before, {after:.2f} after")
    return found


if __name__ == "__main__":
    main()
