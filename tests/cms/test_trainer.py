"""The trainer of transformers: a step of accumulated small batches is the step of one large batch."""

import copy

import torch
from transformers import Trainer, TrainingArguments

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from slowly import some


def build(kind, make):
    if kind == "stacked":
        return stack_levels(make(num_hidden_layers=2), [Level(4, lr=0.5), Level(8, lr=0.25)])
    torch.manual_seed(0)
    levels = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}] if "levels" in kind else None
    config = HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cms_levels=levels,
                        mixer="selfmod")  # fmt: skip
    return HopeForCausalLM(config).double()


@some("kind", ["stacked", "hope with levels"], ["stacked", "hope", "hope with levels"])
def test_two_by_four_accumulated_is_a_batch_of_eight(kind, make, tmp_path):
    """Also where rows are padded, so that small batches hold unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for n in (13, 6, 13, 2, 9, 13, 13, 4):
        ids, real = torch.randint(31, (13,), generator=generator), torch.arange(13) < n
        rows.append(dict(input_ids=ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)))
    model, weights = build(kind, make), []
    for size in (8, 2):
        mine = copy.deepcopy(model)
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.5)
        options = TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        Trainer(mine, options, train_dataset=rows, optimizers=(optimizer, constant)).train()
        weights.append(list(mine.parameters()))
    moved = 0.0
    for one, many, old in zip(*weights, model.parameters(), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)  # the loss is taken in float32
        moved += float((one - old).detach().abs().sum())
    assert moved > 1
