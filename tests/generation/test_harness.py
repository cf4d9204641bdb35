"""lm-evaluation-harness on models whose levels learn: every request is a stream of its own, whatever the batch."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.training.tokenizers import byte_tokenizer

harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'nestling[harness]'")

SIZES = dict(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
TOKENS = dict(bos_token_id=256, eos_token_id=257, pad_token_id=258)
FAST = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}]
PAIRS = [("The cats sleep.", "The cats sleeps."), ("She ran.", "She run."), ("Who has it?", "Who have it there?")]


def hope(**changes):
    return HopeForCausalLM(HopeConfig(**SIZES, **TOKENS, **changes))


MODELS = {
    "selfmod": hope,
    "hybrid": lambda: hope(mixers=["gated_deltanet", "window_attention"]),
    "levels": lambda: hope(mixer="attention", cms_levels=FAST, context_length=512),
    "stacked": lambda: stack_levels(LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS)), [Level(4, lr=0.5)]),
}


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("kind", MODELS)
def test_batches_change_nothing(kind):
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    sentences = [("", text) for text in itertools.chain(*PAIRS)] + [("A cat ", "sat."), ("A", " dog barks")]
    asked = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    prompts = [(text, asked) for text in ("a b", "the cat", "x", "one")]
    found = {}
    for batch in (1, 4, 8):
        lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=batch, device="cpu")
        scores = [score for score, _ in lm.loglikelihood(instances("loglikelihood", sentences), disable_tqdm=True)]
        written = lm.generate_until(instances("generate_until", prompts), disable_tqdm=True) if batch < 8 else None
        found[batch] = scores, written
    torch.testing.assert_close(found[8][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[4][1] == found[1][1]
    alone = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1, device="cpu")
    last = alone.loglikelihood(instances("loglikelihood", sentences[-1:]), disable_tqdm=True)
    assert last[0][0] == pytest.approx(found[1][0][-1], abs=1e-5)  # nothing is left of the requests before it
