"""Train with Hugging Face's Seq2SeqTrainer or Trainer under train.py's flags, and leave the same records, for a comparison.

    python -m zerotune.tools.benchmark.peer_trainer --model_name_or_path DIR --train_file rows.jsonl --output_dir ... --max_steps 20

One process. The rows are tokenised by zerotune.rows.data, so that both sides see the same tokens; all else is transformers' own.
"""

import zerotune.quiet  # noqa: F401  before the libraries

# isort: split
import json
import sys
import time
from collections import deque
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from zerotune.errors import UserError
from zerotune.model.freezing import apply_rules
from zerotune.model.loading import AUTO_CLASSES, load_config_and_tokenizer, max_positions
from zerotune.rows.batches import rows_of_step
from zerotune.rows.collation import TERMS, count_tokens, shape_terms
from zerotune.rows.data import Data
from zerotune.run import records
from zerotune.run.arguments import parse_arguments

SAME_NAMES = (
    "per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay optim "
    "max_grad_norm max_steps seed gradient_checkpointing dataloader_num_workers logging_steps"
)


class CountingCollator:
    """transformers' collator, which takes note of what is in each batch: steps are told by the order of their batches."""

    def __init__(self, collator):
        self.collator, self.batches = collator, deque()

    def __call__(self, rows):
        batch = self.collator(rows)
        self.batches.append((*count_tokens(batch), shape_terms(batch)))
        return batch


class Recorder(TrainerCallback):
    """Writes a record of train.py's form for each step."""

    def __init__(self, path, collator, accumulation):
        self.path, self.collator, self.accumulation, self.begin = path, collator, accumulation, None
        path.write_text("")

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        counts = [self.collator.batches.popleft() for _ in range(self.accumulation)]
        real, padded = (sum(count[place] for count in counts) for place in (0, 1))
        record = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "real_tokens": real,
            "tokens_per_second": round(real / (now - self.begin), 1),
            "padding_fraction": round(1 - real / padded, 4),
            "step_seconds": round(now - self.begin, 6),
            **records.peak_memory(),
            "shape_terms": [sum(count[2][place] for count in counts) for place in range(len(TERMS))],
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(records.finite(record)) + "\n")
        self.begin = time.perf_counter()


class Rows(torch.utils.data.Dataset):
    """The tokenised rows as transformers' collator takes them: labels in the place of their own tokens."""

    def __init__(self, rows, task, order=None):
        """order: the row of each item, by default the file's."""
        self.rows, self.task = rows, task
        self.order = range(len(rows)) if order is None else [int(row) for row in order]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        row = self.rows[self.order[index]]
        labels = row["labels"] if self.task == "seq2seq" else [-100, *row["labels"][:-1]]  # the model shifts them itself
        return {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": labels}


def main():
    args = parse_arguments()
    if args.task == "classification":
        raise UserError("--task classification: the comparison knows seq2seq and causal")
    set_seed(args.seed)
    config, tokenizer = load_config_and_tokenizer(args)
    data = Data(args, tokenizer, [], max_positions(config), config.get_text_config().vocab_size)
    model = AUTO_CLASSES[args.task].from_pretrained(
        args.model_name_or_path, config=AutoConfig.from_pretrained(args.model_name_or_path), dtype=torch.float32
    )
    freeze_report = apply_rules(model, args.freeze, args.unfreeze)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    seq2seq, order = args.task == "seq2seq", None
    if not args.group_by_length:  # equal settings: the very rows of train.py, in its order
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        order = rows_of_step(0, data.stream(args.seed), batch_size * args.max_steps)
    training = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(
        output_dir=str(folder),
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="random" if order is None else "sequential",
        disable_tqdm=True,
        bf16=args.mixed_precision == "bf16",
        fp16=args.mixed_precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        **{name: getattr(args, name) for name in SAME_NAMES.split()},
    )
    multiple = 8 if torch.cuda.is_available() else None
    collator = CountingCollator(DataCollatorForSeq2Seq(tokenizer, model if seq2seq else None, pad_to_multiple_of=multiple))
    trainer = (Seq2SeqTrainer if seq2seq else Trainer)(
        model=model,
        args=training,
        train_dataset=Rows(data.rows["train"], args.task, order),
        data_collator=collator,
        callbacks=[Recorder(folder / "metrics.jsonl", collator, args.gradient_accumulation_steps)],
    )
    device = training.device.type
    facts = {
        "engine": {"class": type(trainer).__name__, "num_processes": training.world_size, "device": device},
        "arguments": vars(args),
        "parameters": {"total": freeze_report.num_total, "trainable": freeze_report.num_trainable},
    }
    records.write_json(folder / "run.json", facts | records.environment_facts())
    trainer.train()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print("\n".join(f"train.py: error: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(2)
