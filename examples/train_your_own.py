"""Train a small Hope on your own text, then let it write.

    python examples/train_your_own.py my_notes/ --steps 500

The model reads bytes, so any text will do. A run that was killed goes on with `nestling train --out FOLDER --resume`.
"""

import argparse

from nestling.generation import Sampling, TextGenerator
from nestling.generation.load import load_model
from nestling.training import TrainConfig, train


def main(arguments: list[str] | None = None) -> str:
    """Train, then return what the model writes after the prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="text files or folders")
    parser.add_argument("--out", default="runs/mine")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--window", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    options = parser.parse_args(arguments)

    config = TrainConfig.from_dict({
        "out": options.out,
        "steps": options.steps,
        "model": {"options": {"hidden_size": options.width, "num_hidden_layers": options.layers}},
        "data": {"text": options.text, "seq_len": options.window, "batch_size": options.batch_size},
        "optim": {"lr": 3e-3},
    })  # fmt: skip
    result = train(config)
    print(f"held-out text: {result.evaluation.bits_per_byte:.3f} bits per byte")

    model, tokenizer = load_model(options.out)
    writer = TextGenerator(model, tokenizer, seed=0)
    sampling = Sampling(temperature=0.8, top_p=0.95)
    text = "".join(writer.stream(options.prompt, max_new_tokens=options.tokens, sampling=sampling))
    print(options.prompt + text)
    return text


if __name__ == "__main__":
    main()
