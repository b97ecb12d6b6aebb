"""A real 260 K-parameter model learns a two-class cloze through the loss, from a user's own file."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoft.tasks import batch_indices, collate, evaluate, loss, pad_id, prepare

NAMES = ("Lily", "Tom", "Sam", "Anna", "Ben", "Mia", "Max", "Lucy")
THINGS = ("toy", "ball", "hat", "car")


def rows(names):
    for name in names:
        for thing in THINGS:
            for label, event in enumerate((f"got a new {thing}", f"lost the {thing}")):
                yield {"prompt": f"{name} {event}. {name} was", "choices": [" happy", " sad"], "label": label}


def test_stories260k_learns_a_cloze(stories260k, tmp_path):
    for split, names in (("train", NAMES[:6]), ("dev", NAMES[6:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(names)))
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    prepared = prepare(None, tmp_path, tokenizer, context_length=512)
    before = evaluate(model, tokenizer, prepared.task, prepared.dev, batch_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(12):
        indices = batch_indices(len(prepared.train), 8, seed=0, step=step)
        batch = collate([prepared.train[i] for i in indices], pad_id(tokenizer), "cpu")
        loss(model, prepared.task, batch).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model, tokenizer, prepared.task, prepared.dev, batch_size=16)
    assert before.metric < 0.7
    assert after.metric > 0.95
    assert after.loss < before.loss / 2
