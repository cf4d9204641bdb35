"""Hugging Face's Trainer beyond a plain run: label smoothing, resuming."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nestling import Level, stack_levels
from nestling.optim import M3, split_parameters
from slowly import some

LEVELS = {"cms_levels": [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}], "context_length": 32}


class Texts(torch.utils.data.Dataset):
    """Eight rows of 12 tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def make(kind, make_model):
    torch.manual_seed(0)
    if kind == "stacked":
        config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=2)  # fmt: skip
        return stack_levels(LlamaForCausalLM(config), [Level(4, lr=0.5)])
    return make_model("attention", **(LEVELS if kind == "levels" else {})).float()


def trainer(model, folder, optimizer=None, **options):
    settings = dict(output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True,
                    disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant")  # fmt: skip
    arguments = TrainingArguments(**(settings | options))
    return Trainer(model=model, args=arguments, train_dataset=Texts(), optimizers=(optimizer, None))


@pytest.mark.parametrize("kind", ["plain", "levels", "stacked"])
def test_label_smoothing_predicts_the_next_token(make_model, tmp_path, kind):
    model = make(kind, make_model)
    ids = torch.stack([row["input_ids"] for row in map(Texts().__getitem__, range(8))])
    labels = ids.clone()
    labels[:, :3] = -100
    got = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(model, {"input_ids": ids, "labels": labels})
    logs, scored = model(ids).logits[:, :-1].log_softmax(-1), labels[:, 1:] != -100
    right = -logs.gather(-1, ids[:, 1:, None])[..., 0]
    want = (0.9 * right + 0.1 * -logs.mean(-1))[scored].mean()
    torch.testing.assert_close(got, want)


@some(
    "kind, optimizer", [("plain", "m3"), ("levels", "m3"), ("stacked", "adamw")],
    ("plain", "levels", "stacked"), ("adamw", "m3"),
)  # fmt: skip
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(make_model, tmp_path, kind, optimizer):
    def run(folder, steps, resume):
        model = make(kind, make_model)
        chosen = M3(split_parameters(model), lr=1e-2) if optimizer == "m3" else None
        trainer(model, folder, chosen, max_steps=steps, save_steps=2).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run(tmp_path / "whole", 4, None)
    run(tmp_path / "cut", 2, None)
    resumed = run(tmp_path / "cut", 4, True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
