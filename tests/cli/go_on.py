"""A run of each Trainer with each optimiser, whole or in parts: `go_on.py FOLDER STOP [resume]`, a process a part."""

import sys
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.optim import M3
from nestling.training import TrainConfig, Trainer

FOLDER, STOP, RESUME, STEPS = Path(sys.argv[1]), int(sys.argv[2]), "resume" in sys.argv, 5
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
LEVELS = {"cms_levels": [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}], "context_length": 32}


def ours(optimizer: str) -> torch.nn.Module:
    """`nestling.training` up to step STOP, where it is saved."""
    text = FOLDER / "text.txt"
    text.write_text("the cat sat on the mat, and the dog ran to the log. " * 60)
    values = dict(
        out=str(FOLDER / f"ours-{optimizer}"), steps=STEPS, device="cpu", model={"options": {**SIZES, **LEVELS}},
        data=dict(text=[str(text)], seq_len=16, batch_size=2), optim=dict(name=optimizer, accumulate=2),
        logging=dict(eval_every=0, save_every=0, progress=False),
    )  # fmt: skip
    trainer = Trainer(TrainConfig.from_dict(values), resume=RESUME)
    while trainer.step < STOP:
        trainer.train_step()
    trainer.save()
    return trainer.model


class Texts(torch.utils.data.Dataset):
    """Eight rows of 12 tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(40, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def theirs(kind: str, optimizer: str) -> torch.nn.Module:
    """transformers' Trainer up to step STOP, where it saves."""
    torch.manual_seed(0)
    if kind == "stacked":
        model = stack_levels(LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)), [Level(4, lr=0.5)])
    else:
        model = HopeForCausalLM(HopeConfig(vocab_size=40, **SIZES, **LEVELS))
    settings = TrainingArguments(
        output_dir=str(FOLDER / f"{kind}-{optimizer}"), per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", max_steps=STOP, save_steps=STOP,
    )  # fmt: skip
    chosen = M3(model, lr=1e-2, periods=(1, 2)) if optimizer == "m3" else None
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Texts(), optimizers=(chosen, None))
    trainer.train(resume_from_checkpoint=RESUME)
    return model


weights = {}
for optimizer in ("adamw", "m3"):
    weights[f"ours {optimizer}"] = ours(optimizer).state_dict()
    for kind in ("hope", "stacked"):
        weights[f"{kind} {optimizer}"] = theirs(kind, optimizer).state_dict()
torch.save(weights, FOLDER / f"{STOP}.pt")
