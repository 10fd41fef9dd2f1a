"""Evaluate a split over all ranks: token-weighted loss, generated or predicted outputs, and metrics; each row counts once.

Every rank makes the same number of forward and generate calls, whatever the rows: under ZeRO-3 each one is a collective.
"""

import contextlib
import importlib.util
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device

from zerotune.engine.processes import unwrap
from zerotune.engine.sequence_parallel import whole_rows
from zerotune.engine.tensor_parallel import copies, place
from zerotune.errors import UserError
from zerotune.model.loss import by_source, token_losses
from zerotune.rows import IGNORE
from zerotune.rows.batches import evaluation_batches
from zerotune.rows.collation import rows_of_labels
from zerotune.rows.data import numbers as numbers_of

METRICS = Path(__file__).resolve().parents[2] / "metrics"
PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu"}  # which metrics/*.py import
DEFAULT_METRICS = {"seq2seq": ("rouge", "bleu"), "causal": (), "classification": ("classification",)}


def metric_names(task, names):
    """Return the names of --metric, or of the task's own metrics."""
    return names or [str(METRICS / f"{name}.py") for name in DEFAULT_METRICS[task]]


def metrics_before_training(task, names, evaluated):
    """Return load_metrics of --metric, {} without; evaluated: whether the run has rows to evaluate.

    The task's own metrics are only looked for, so that nothing is found missing in the middle of a run: they are loaded at the
    first evaluation, as their import takes seconds.
    """
    if not names and evaluated:
        packages = ["evaluate", *(PACKAGES[name] for name in DEFAULT_METRICS[task] if name in PACKAGES)]
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing and DEFAULT_METRICS[task]:
            raise UserError(
                f"the metrics of --task {task} need {', '.join(missing)}: pip install -r requirements.txt, or give another --metric"
            )
    return load_metrics(names)


def load_metrics(names):
    """Return {name: module} loaded by the library `evaluate`; raise UserError if one cannot be had."""
    modules = {}
    for name in names:
        import evaluate  # takes seconds, and most runs need none

        try:
            modules[name] = evaluate.load(name, keep_in_memory=True)
        except Exception as error:  # evaluate raises whatever its loaders raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--metric {name}: cannot be loaded ({reason}); give the path of a module or a hub name") from None
    return modules


@contextlib.contextmanager
def evaluating(model):
    """Switch dropout off and gradients away for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), whole_rows():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Evaluator:
    """Evaluates splits of `data` with what stays the same over a run."""

    def __init__(self, accelerator, model, data, collator, tokenizer, args, forward_loss, metrics, monitor, stopper, best):
        """forward_loss: train.py's. metrics: {name: module} of --metric; {}: the task's default, loaded where they are needed."""
        self.accelerator, self.model, self.data, self.collator = accelerator, model, data, collator
        self.tokenizer, self.args, self.forward_loss = tokenizer, args, forward_loss
        self.metrics, self.monitor, self.stopper, self.best = metrics, monitor, stopper, best
        self.metric_names = metric_names(args.task, args.metric)
        self.last_step = None  # of the newest evaluation of the validation split

    @property
    def longest_generated(self):
        """The longest text that may be generated, in tokens."""
        return self.args.generation_max_length or self.args.max_target_length

    @property
    def generates(self):
        """Tell whether the task's outputs are generated texts; rows that are one text leave nothing to generate."""
        return self.args.task == "seq2seq" or (self.args.task == "causal" and not self.args.text_column)

    def batches(self, split, generating=False):
        """Yield (rows' columns, which rows are real, row numbers) of this rank."""
        rows, costs, packed = self.data.rows[split], self.data.costs[split], self.collator.packs
        accelerator, args = self.accelerator, self.args
        limit = args.max_tokens_per_micro_batch
        if limit and generating:  # each beam has the source and what is generated
            prompts = numbers_of(rows, "prompt_length") if args.task == "causal" else costs[:, 0]
            generated = np.full_like(prompts, self.longest_generated)
            costs, packed = np.stack([prompts, generated], axis=1) * args.generation_num_beams, False
        costs = costs if packed else self.collator.padded_to(costs)
        shares, share, _ = place(accelerator, evaluating=True)
        for numbers, real in evaluation_batches(costs, shares, share, args.per_device_eval_batch_size, limit, packed):
            self.monitor.beat()
            self.stopper.interrupt()
            self.data.release()
            yield rows[numbers], torch.from_numpy(real), numbers

    def evaluate(self, split, step):
        """Write a record of a split and return the predictions; its time is not the steps'. Raises Interrupted after a signal."""
        with self.monitor.paused():
            record, predicted = self.measure(split, step)
        if split == "validation":
            self.last_step = step
            self.compare(step, record)
        self.monitor.write(record)
        return predicted

    def compare(self, step, record):
        """Compare an evaluation with the best so far, on all ranks by the main process's number; a collective."""
        best = self.best
        numbers = [name for name, value in record.items() if isinstance(value, float) and name != "eval_seconds"]
        if best.metric is None:
            best.update(step, None)
            return
        value, numbers = broadcast_object_list([record.get(best.metric), numbers])  # metrics of texts are there alone
        if value is None:
            raise UserError(f"--metric_for_best_model {best.metric}: no number of an evaluation; allowed: {', '.join(numbers)}")
        best.update(step, value)
        record["best_step"] = best.step

    def measure(self, split, step):
        """Return (record, predictions): loss, perplexity, and the metrics of what the model predicts.

        predictions: on the main process {row number: text or class name}, else {}. Classes cost nothing; texts are generated for
        the test split, and for others if a metric wants them and --predict_with_generate allows it.
        """
        model, begin = self.model, time.perf_counter()
        prefix = "eval" if split == "validation" else split
        generate = self.generates and (split == "test" or (self.args.predict_with_generate and bool(self.metric_names)))
        with evaluating(model):
            sums, counts, classes = self.loss(model, split)
            predicted = self.gather(self.generate(model, split) if generate else classes)
        record = {"step": step}
        for name, part in self.parts_of(split).items():
            loss_sum, targets = sums[part.column], int(counts[part.column])
            record |= {f"{prefix}_{name}loss": loss_sum / targets, f"{prefix}_{name}target_tokens": targets}
            bare = "" if prefix == "eval" and not name else f"{prefix}_{name}"
            if self.args.task != "classification":
                record[f"{bare}perplexity"] = math.exp(min(loss_sum / targets, 700))
            if predicted:
                scores = self.score(split, predicted, part.rows)
                record |= {f"{bare}{metric}": value for metric, value in scores.items()}
        record[f"{prefix}_seconds"] = round(time.perf_counter() - begin, 3)
        if self.args.task == "classification":
            predicted = {row: self.data.labels[number] for row, number in predicted.items()}
        return record, predicted

    def parts_of(self, split):
        """Return {begin of a record's names: its column in `loss`, and its rows as a slice} of a split, and of each source."""
        starts = self.data.source_starts[split].tolist()
        parts = {"": SimpleNamespace(column=0, rows=slice(0, starts[-1]))}
        for number, name in enumerate(self.data.names(split), 1):
            parts[f"{name}_"] = SimpleNamespace(column=number, rows=slice(*starts[number - 1 : number + 1]))
        return parts

    def loss(self, model, split):
        """Return (summed losses, numbers of targets) over all ranks, and {row: class number} of this rank's rows.

        The first of the sums is the whole split's, and where it has several sources the others are theirs.
        """
        device, classes = self.accelerator.device, {}
        count = len(self.data.names(split))
        sums = torch.zeros(2, 1 + count, dtype=torch.float64, device=device)
        for columns, real, numbers in self.batches(split):
            batch = self.collator.training(columns)
            rows = rows_of_labels(batch)
            batch["labels"][~real[rows]] = IGNORE
            sources = torch.from_numpy(self.data.source_of(split, numbers))[rows]
            batch = send_to_device(batch, device)
            labels = batch.pop("labels")
            if self.args.task == "classification":
                logits = model(**batch).logits
                losses, best = token_losses(logits, labels), logits.argmax(-1).tolist()
                loss_sum = losses.sum()
                classes |= {int(row): best[index] for index, row in enumerate(numbers) if real[index]}
            else:
                loss_sum, losses = self.forward_loss(model, batch, labels, chunked=self.args.loss_chunks > 0)
            sums[:, 0] += torch.stack([loss_sum.double(), (labels != IGNORE).sum().double()])
            if count:
                sums[:, 1:] += by_source(losses, labels, sources, count)
        sums, targets = (self.accelerator.reduce(sums, reduction="sum") / copies(self.accelerator)).tolist()
        return sums, targets, classes

    def generate(self, model, split):
        """Return {row: generated text} of this rank's rows."""
        args, texts = self.args, {}
        inner = unwrap(model)
        plugin = self.accelerator.state.deepspeed_plugin
        options = {
            "max_new_tokens": self.longest_generated,
            "num_beams": args.generation_num_beams,
            "do_sample": False,
            # A rank whose texts have all ended must go on taking part in gathering the weights until the last one has.
            "synced_gpus": plugin is not None and plugin.zero_stage == 3 and self.accelerator.num_processes > 1,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        for columns, real, numbers in self.batches(split, generating=True):
            prompts = send_to_device(self.collator.prompts(columns), self.accelerator.device)
            with self.accelerator.autocast():
                ids = inner.generate(**prompts, **options)
            if args.task == "causal":
                ids = ids[:, prompts["input_ids"].shape[1] :]
            decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts |= {int(row): decoded[index] for index, row in enumerate(numbers) if real[index]}
        return texts

    def gather(self, mine):
        """Return the union of the ranks' {row: value} on the main process, {} elsewhere."""
        everyone = gather_object(list(mine.items()))
        return dict(sorted(everyone)) if self.accelerator.is_main_process else {}

    def score(self, split, predicted, part):
        """Return the metrics' numbers of a slice of rows for {row: prediction}; raises if a row is missing or counted twice."""
        rows = self.data.rows[split]
        if list(predicted) != list(range(len(rows))):
            raise RuntimeError(f"{len(predicted)} predictions for the {len(rows)} rows of {split}")
        if self.args.task == "classification":
            references = [self.collator.class_numbers[label] for label in rows["label"][part]]
        else:
            references = rows["references"][part]
            if all(len(texts) == 1 for texts in references):  # not every metric knows what several are
                references = [texts[0] for texts in references]
        self.metrics = self.metrics or load_metrics(self.metric_names)
        numbers = {}
        for module in self.metrics.values():
            numbers |= module.compute(predictions=list(predicted.values())[part], references=references)
        return {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}

    def write_predictions(self, split, predicted):
        """Write predictions.jsonl if there are any rows (only the main process has them)."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.prediction_rows(split, predicted)]
        if lines:
            (Path(self.args.output_dir) / "predictions.jsonl").write_text("".join(lines))

    def prediction_rows(self, split, predicted):
        """Yield the lines of predictions.jsonl as dicts: the row's line in its file, source, reference, prediction."""
        rows = self.data.rows[split]
        for row, prediction in predicted.items():
            columns = rows[row]
            prompt = columns["input_ids"][: columns["prompt_length"]] if self.args.task == "causal" else columns["input_ids"]
            source = self.tokenizer.decode(prompt, skip_special_tokens=True)
            references = [columns["label"]] if self.args.task == "classification" else columns["references"]
            reference = references[0] if len(references) == 1 else references
            file = {"file": self.data.file_of(split, row)} if len(self.data.parts[split]) > 1 else {}
            yield file | {"line": columns["line"], "source": source, "reference": reference, "prediction": prediction}
