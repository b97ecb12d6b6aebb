"""Compare MeZO and DiZO on a masked language model that is trained here, since none comes without the Hub.

    python benchmarks/masked.py DATA --out FOLDER [--shots 16] [--budget 2000] [--pretrain 2500]

A byte-level BPE tokenizer and a RoBERTa of two layers (0.96 M parameters, float32, one thread) learn the training
sentences of DATA by the masked-language-model loss (arXiv 1907.11692: 15 % of the tokens, 80 / 10 / 10). Then
`zoft.compare` trains it on SST-2 with K rows a class: zero-shot, MeZO, DiZO and first-order Adam as the bound, a budget
of forward passes each, learning rates chosen on dev. It prints a table, and FOLDER holds the page. A model so small
knows little: after 2,500 steps (loss 5.96) it is at chance, and 16 or 200 rows a class take no method, Adam included,
far from there. So it shows that the way is open, and no figure can be put beside a paper's. Called again, it goes on.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from zoft.compare import CompareConfig, compare
from zoft.model.load import save
from zoft.quiet import quiet_transformers
from zoft.tasks.rows import read

FIELDS = ("sentence", "text", "premise", "hypothesis", "sentence1", "sentence2", "choice1", "choice2", "question")
VOCABULARY, LENGTH, BATCH, MASKED = 4096, 48, 32, 0.15
RATES = {"mezo": (1e-4, 3e-4, 1e-3), "dizo": (1e-4, 3e-4, 1e-3), "adam": (1e-4, 3e-4, 1e-3)}


def main() -> None:
    arguments = _parsed()
    torch.set_num_threads(1)
    base = arguments.out / "base"
    if not base.is_dir():
        pretrain(arguments.data, base, arguments.pretrain)
    result = compare(
        CompareConfig(
            models=[{"model": str(base), "name": "tiny-roberta"}],
            tasks=["sst2"],
            data=arguments.data,
            methods=["zero-shot", *({"method": method, "lr": rates} for method, rates in RATES.items())],
            budget=arguments.budget,
            seeds=arguments.seed or (0, 1),
            batch_size=16,
            extensions=1,
            settings={"shots": arguments.shots},
            out=arguments.out / "compare",
        ),
        on_event=lambda event: None,
    )
    print("| method | rate | dev loss | test accuracy | spread | forwards | seconds |\n|---|---|---|---|---|---|---|")
    for row in result.rows:
        rate = "" if row["lr"] is None else f"{row['lr']:.3g}{' edge' if row['edge'] else ''}"
        spread = "" if row["metric_spread"] is None else f"{100 * row['metric_spread']:.1f}"
        scores = f"{row['loss']:.4f} | {100 * row['metric']:.1f} | {spread}"
        print(f"| {row['method']} | {rate} | {scores} | {row['forwards']} | {row['seconds']:.0f} |")


def pretrain(data: Path, folder: Path, steps: int) -> None:
    """Train tokenizer and model on the sentences of ``data`` and write them to ``folder``."""
    texts = sorted({text for file in sorted(data.glob("*/train.jsonl")) for text in _texts(file)})
    tokenizer = _tokenizer(texts)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobertaForMaskedLM(_config())
    ids = [torch.tensor(row) for row in tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    print(f"{len(texts)} texts, {sum(map(len, ids))} tokens, {sum(p.numel() for p in model.parameters())} parameters")
    begin, mean = time.perf_counter(), math.nan
    for step in range(steps):
        rows = torch.randint(len(ids), (BATCH,), generator=generator).tolist()
        batch = torch.nn.utils.rnn.pad_sequence([ids[row] for row in rows], True, tokenizer.pad_token_id)
        inputs, labels = _masked(batch, tokenizer, generator)
        optimizer.zero_grad()
        loss = model(inputs, attention_mask=batch.ne(tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        rates.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {mean:.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    card = f"# A tiny RoBERTa\n\nMade by `benchmarks/masked.py`: {steps} steps on the sentences of a data folder.\n"
    save(model.eval(), tokenizer, folder, dtype=torch.float32, card=card)


def _texts(file: Path) -> Iterator[str]:
    for located in read(file):
        found = (located.row.get(name) for name in FIELDS)
        yield from (value.strip() for value in found if isinstance(value, str) and value.strip())


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", mask]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": mask}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=128, **{f"{name}_token": token for name, token in names.items()}
    )


def _config() -> RobertaConfig:
    return RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=130,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def _masked(
    batch: torch.Tensor, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels; of the chosen tokens 80 % are masked, 10 % replaced."""
    special = torch.isin(batch, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(batch.shape, generator=generator) < MASKED) & ~special
    lot = torch.rand(batch.shape, generator=generator)
    anything = torch.randint(len(tokenizer), batch.shape, generator=generator)
    inputs = torch.where(chosen & (lot < 0.8), tokenizer.mask_token_id, batch)
    inputs = torch.where(chosen & (lot >= 0.9), anything, inputs)
    return inputs, torch.where(chosen, batch, -100)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of task folders, as --data")
    parser.add_argument("--out", type=Path, default=Path("runs/masked"))
    parser.add_argument("--shots", type=int, default=16, help="train and dev rows of each class")
    parser.add_argument("--budget", type=int, default=2000, help="forward passes of a run")
    parser.add_argument("--seed", type=int, action="append", help="of the comparison; may be repeated  [default: 0, 1]")
    parser.add_argument("--pretrain", type=int, default=2500, help="steps of the masked-language-model loss")
    return parser.parse_args()


if __name__ == "__main__":
    with quiet_transformers():
        main()
