"""Give a pre-trained model levels that learn while it reads, and look at what they do.

    python examples/stack_levels.py --model SmolLM2-135M --text notes.txt --other book.txt

Without --model a small Llama with random weights shows the mechanics. No rule and rate is right for every model:
compare before and after, on the text that was read and on text that was not.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nestling
from nestling.cms.pretrained import load_pretrained


@torch.no_grad()
def loss(model, cache, ids: torch.Tensor) -> float:
    """Mean nats per token of ids [1, T], in a fresh context, by what the levels know; nothing is learned."""
    with model.adapted(cache):
        logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a Llama-family model, or a name that is installed")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what it reads")
    parser.add_argument("--other", type=Path, default=Path(__file__).parent / "m3_drop_in.py", help="what it does not")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--chunk", type=int, default=64, help="tokens between two updates")
    options = parser.parse_args(arguments)

    if options.model:
        model, tokenizer = load_pretrained(options.model)
        encode = lambda path: tokenizer(path.read_text(), return_tensors="pt").input_ids  # noqa: E731
    else:
        torch.manual_seed(0)
        shape = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=4))
        encode = lambda path: torch.tensor([list(path.read_bytes())])  # noqa: E731

    model = nestling.stack_levels(model.eval(), [nestling.Level(options.chunk, lr=options.lr, optimizer="adamw")])
    texts = {"read": encode(options.text), "not read": encode(options.other)}
    with torch.no_grad():
        cache = model(texts["read"][:, :1], use_cache=True).past_key_values  # one token: nothing learned yet
        before = {name: loss(model, cache, ids) for name, ids in texts.items()}
        cache = model(texts["read"][:, 1:], past_key_values=cache).past_key_values  # reads, and learns
    found = {name: (before[name], loss(model, cache, ids)) for name, ids in texts.items()}
    for name, (was, now) in found.items():
        print(f"{name:9s} {was:.3f} -> {now:.3f} nats per token")
    return found


if __name__ == "__main__":
    main()
