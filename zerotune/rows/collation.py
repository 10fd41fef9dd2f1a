"""From rows to padded batches: the collator, and the micro-batches of each optimizer step."""

import numpy as np
import torch
import torch.nn.functional as F

from zerotune.rows import IGNORE
from zerotune.rows.batches import deal, deal_by_tokens, rows_of_step
from zerotune.rows.packing import lines_of


class Collator:
    """Pads rows to one batch of tensors on the CPU: input_ids, attention_mask, labels, and decoder_input_ids for seq2seq.

    pad_to_multiple_of: 8 on GPUs, whose matrix units want it. decoder_inputs: a function from labels to decoder inputs of the same
    shape, for seq2seq alone. packing_width: the model's hidden size, by which `packed` chooses its lines; None: rows are padded.
    lines: how many of them there are always; None: as many as cost least.
    """

    def __init__(self, task, pad_token_id, labels=None, pad_to_multiple_of=1, decoder_inputs=None, packing_width=None, lines=None):
        self.task, self.pad, self.multiple = task, pad_token_id, pad_to_multiple_of
        self.packing_width, self.lines = packing_width, lines
        self.class_numbers = {name: number for number, name in enumerate(labels or [])}
        self.decoder_inputs = decoder_inputs

    def pad_rows(self, rows, value, left=False):
        longest = max(len(row) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        padding = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)])

    def __call__(self, columns):
        """columns: {name: list over rows}, as Dataset slicing returns; gives a dict of int64 tensors."""
        ids = columns["input_ids"]
        batch = {"input_ids": self.pad_rows(ids, self.pad), "attention_mask": self.pad_rows([[1] * len(row) for row in ids], 0)}
        if self.task == "classification":
            return batch | {"labels": torch.tensor([self.class_numbers[label] for label in columns["label"]])}
        # A cache of keys and values is for generation; in a training step it would only hold memory.
        batch |= {"labels": self.pad_rows(columns["labels"], IGNORE), "use_cache": False}
        if self.decoder_inputs is not None:
            batch["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        return batch

    def packed(self, columns, count=None):
        """Return the rows laid end to end: input_ids, token_rows, labels, and decoder_input_ids with target_rows for seq2seq.

        As model/packing.py takes them; each is (lines, length). count: of lines, in place of the best.
        """
        ids, labels = columns["input_ids"], columns["labels"]
        sources = np.array([len(row) for row in ids])
        targets = np.array([len(row) for row in labels]) if self.decoder_inputs else np.zeros_like(sources)
        lines = lines_of(sources, targets, self.packing_width, self.multiple, count)

        def laid(rows, value):
            return self.pad_rows([[token for row in line for token in rows[row]] for line in lines], value)

        def numbered(rows):
            return laid([[number] * len(row) for number, row in enumerate(rows, 1)], 0)

        batch = {"input_ids": laid(ids, self.pad), "token_rows": numbered(ids), "labels": laid(labels, IGNORE), "use_cache": False}
        if self.decoder_inputs is not None:
            shifted = self.decoder_inputs(self.pad_rows(labels, IGNORE)).tolist()
            batch["decoder_input_ids"] = laid([row[: len(own)] for row, own in zip(shifted, labels, strict=True)], self.pad)
            batch["target_rows"] = numbered(labels)
        return batch

    @property
    def packs(self):
        """Tell whether rows are laid end to end."""
        return self.packing_width is not None

    def training(self, columns):
        """Return a batch as the run has it, padded or packed."""
        return self.packed(columns, self.lines) if self.packs else self(columns)

    def padded_to(self, lengths):
        """Return lengths as they are in a batch of their own; packed rows are padded line by line alone."""
        return lengths if self.packs else -(-lengths // self.multiple) * self.multiple

    def prompts(self, columns):
        """Return the inputs of generation: the source, or (causal) the prompt padded on the left."""
        ids, left = columns["input_ids"], self.task == "causal"
        if left:
            ids = [row[:length] for row, length in zip(ids, columns["prompt_length"], strict=True)]
        mask = self.pad_rows([[1] * len(row) for row in ids], 0, left)
        return {"input_ids": self.pad_rows(ids, self.pad, left), "attention_mask": mask}


class TrainingSteps(torch.utils.data.Dataset):
    """Item s is the list of this rank's collated micro-batches of optimizer step s; nothing else decides the data order."""

    def __init__(self, data, collator, args, num_processes, rank, stretch=(1, 0), offset=0):
        """num_processes: into how many shares rows are dealt; rank: which is this one. offset: as in rows_of_step.

        stretch: (into how many stretches each row is cut, over ranks of one share; which is this rank's).
        """
        self.data, self.rows, self.costs, self.collator = data, data.rows["train"], data.costs["train"], collator
        self.stream, self.lengths, self.has_sources = data.stream(args.seed), data.lengths["train"], bool(data.names("train"))
        self.accumulation, self.grouped, self.limit = (
            args.gradient_accumulation_steps,
            args.group_by_length,
            args.max_tokens_per_micro_batch,
        )
        self.parts, self.part = stretch
        self.seed = rank * self.parts + self.part  # of dropout: ranks that see the same tokens have the same
        self.num_processes, self.rank, self.offset, self.window = num_processes, rank, offset, args.length_window
        self.names_rows = bool(args.cache_frozen)
        self.rows_per_step = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps

    def rows_of(self, step):
        return rows_of_step(step, self.stream, self.rows_per_step, 1, self.offset, self.window, self.lengths)

    def lines_of_step(self, step):
        """Return the lines, in the training file, of the rows that optimizer step `step` takes on all ranks."""
        return self.data.lines("train", self.rows_of(step))

    def lines_of_micro_batch(self, step, index):
        """Return the lines of this rank's rows in one micro-batch of a step, both counted from 0."""
        return self.data.lines("train", self.dealt(step)[index])

    def dealt(self, step):
        """Return this rank's row numbers in each micro-batch of a step."""
        return [ranks[self.rank] for ranks in self.dealt_to_all(step)]

    def dealt_to_all(self, step):
        """Return every rank's row numbers in each micro-batch of a step: [micro_batch][rank]."""
        rows = self.rows_of(step)
        lengths = self.lengths[rows] if self.grouped else np.zeros(len(rows))
        if self.limit is None:
            return deal(rows, lengths, self.accumulation, self.num_processes)
        rows = rows[np.argsort(-lengths, kind="stable")]
        costs = self.collator.padded_to(self.costs[rows])
        return deal_by_tokens(rows, costs, self.limit, self.num_processes, self.collator.packs)

    def __getitem__(self, step):
        batches = []
        for ranks in self.dealt_to_all(step):
            batches.append(self.collated(ranks[self.rank]))
            if self.names_rows:  # of all ranks, which have to agree on what they read: model/prefix.py
                batches[-1]["frozen_rows"] = ranks[self.rank], np.concatenate(ranks)
        self.data.release()
        return batches

    def collated(self, rows):
        """Return one micro-batch; where there are several sources, with the number of the source of each label: `sources`."""
        batch = self.collator.training(self.rows[rows])
        if self.has_sources:
            batch["sources"] = torch.from_numpy(self.data.source_of("train", rows))[rows_of_labels(batch)]
        return batch if self.parts == 1 else stretch_of(batch, self.parts, self.part, self.collator.pad)


def stretch_of(batch, parts, part, pad):
    """Return one of so many stretches of a collated causal batch, with the places of its tokens; pad: the tokenizer's."""
    more = -batch["input_ids"].shape[1] % parts
    fillers = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE, "sources": 0}
    whole = {name: F.pad(batch[name], (0, more), value=value) for name, value in fillers.items() if name in batch}
    whole["position_ids"] = torch.arange(whole["input_ids"].shape[1]).expand(whole["input_ids"].shape)
    return batch | {name: tensor.chunk(parts, dim=1)[part].contiguous() for name, tensor in whole.items()}


def rows_of_labels(batch):
    """Return the number, within a collated batch, of the row that each label is of; 0 for padding of packed rows."""
    if "token_rows" in batch:
        return (batch.get("target_rows", batch["token_rows"]) - 1).clamp(min=0)
    labels = batch["labels"]
    return torch.arange(len(labels)).view(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)


def count_tokens(batch):
    """Return (real tokens, tokens with padding) of a collated batch, as Python ints: encoder and decoder inputs together."""
    mask = batch["token_rows"] > 0 if "token_rows" in batch else batch["attention_mask"]
    real, padded = int(mask.sum()), mask.numel()
    if "decoder_input_ids" in batch:
        targets = batch["target_rows"] > 0 if "target_rows" in batch else batch["labels"] != IGNORE
        return real + int(targets.sum()), padded + batch["labels"].numel()
    return real, padded


TERMS = ("B", "B*S", "B*T", "B*S*S", "B*T*T", "B*S*T")


def terms_of(rows, source_length, target_length):
    """Return the values of TERMS for a batch's shape, on which its FLOPs depend linearly; target_length 0: no decoder inputs."""
    b, s, t = rows, source_length, target_length
    return [b, b * s, b * t, b * s * s, b * t * t, b * s * t]


def shape_terms(batch, apart=False):
    """Return the values of TERMS for a collated batch; apart: the rows of a packed line attend by themselves."""
    rows, source_length = batch["input_ids"].shape
    target_length = batch["decoder_input_ids"].shape[1] if "decoder_input_ids" in batch else 0
    if not (apart and "token_rows" in batch):
        return terms_of(rows, source_length, target_length)
    sources = torch.bincount(batch["token_rows"].flatten())[1:]
    targets = torch.bincount(batch["target_rows"].flatten())[1:] if target_length else 0 * sources
    squares = [int((one * other).sum()) for one, other in ((sources, sources), (targets, targets), (sources, targets))]
    return [*terms_of(rows, source_length, target_length)[:3], *squares]
