"""Every flag of train.py, by the groups of its --help: name, default, help, what it decides, range, unit.

Flags carry their transformers.TrainingArguments name where the meaning is the same. What a DeepSpeed JSON or an accelerate YAML
decides (stage, offload, number of processes) is no flag.
"""

import re
from dataclasses import dataclass
from typing import Literal

from zerotune.flags import ABOVE_ONE, BELOW_ONE, CONTENT, HARMLESS, MATHEMATICS, NOT_NEGATIVE, POSITIVE, ROWS, SHARE, flag

POSITIVE_OR_MINUS_ONE = (lambda value: value == -1 or value > 0, "must be greater than 0, or -1")


@dataclass
class ModelArguments:
    title = "model"
    model_name_or_path: str | None = flag(None, "Folder with a saved model, or a hub name. Required.", CONTENT, unit="dir")
    tokenizer_name: str | None = flag(
        None, "Folder or hub name of the tokenizer, if it is not beside the model.", CONTENT, unit="dir"
    )
    task: Literal["seq2seq", "causal", "classification"] = flag(
        "seq2seq", "What is learned, and so which AutoModel class.", MATHEMATICS, ROWS
    )
    trust_remote_code: bool = flag(False, "Run Python code that a hub repository brings along.", HARMLESS)


@dataclass
class DataArguments:
    title = "data"
    train_file: list[str] = flag(
        [],
        "Training rows: .json, .jsonl, .csv, .tsv, .parquet or .txt (one row a line); text also as .gz or .zst. Several files and "
        "quoted patterns are taken as one; with weights (A B:2 'C*.txt':0.5) their shares of the draws are as these.",
        CONTENT,
        unit="file",
    )
    validation_file: list[str] = flag(
        [], "Rows evaluated every eval_steps and at the end, together and by file; formats as above.", HARMLESS, unit="file"
    )
    test_file: list[str] = flag(
        [], "Rows evaluated once at the end, with predictions.jsonl; formats as above.", HARMLESS, unit="file"
    )
    dataset_name: str | None = flag(None, "Hub data set, in place of files; its splits are train, validation and test.", CONTENT)
    dataset_config_name: str | None = flag(None, "Configuration of the hub data set.", CONTENT)
    source_column: str = flag("source", "Column of the input text (seq2seq, causal pairs).", ROWS)
    target_column: str = flag("target", "Column of the text to generate (seq2seq, causal pairs).", ROWS)
    text_column: str | None = flag(
        None, "Column of the text: classification (default: text), or causal rows that are one text, all of it learned.", ROWS
    )
    messages_column: str | None = flag(
        None, "Column of a conversation (causal): a list of role and content, or of ShareGPT's from and value.", ROWS
    )
    chat_template: str | None = flag(
        None, "Jinja file by which conversations become text. Default: the tokenizer's own.", CONTENT, unit="file"
    )
    train_on: Literal["assistant", "last", "all"] = flag(
        "assistant", "Learn all turns of the assistant, with their end-of-turn tokens; or the last one; or every token.", ROWS
    )
    truncation: Literal["oldest_turns", "end", "refuse"] = flag(
        "oldest_turns", "What goes of a conversation longer than max_source_length; refuse: it is a bad row.", ROWS
    )
    targets: Literal["first", "all"] = flag(
        "first", "Of a list in target_column: learn the first, or each as a row of its own; metrics use all.", ROWS
    )
    label_column: str = flag("label", "Column of the class (classification).", ROWS)
    labels: list[str] = flag(
        [], "The classes, in the order of their numbers (classification; default: the training file's, sorted).", CONTENT
    )
    source_prefix: str = flag("", "Text put before each source, e.g. 'summarize: '.", ROWS)
    source_suffix: str | None = flag(None, "Text put after each source. Default: nothing; for causal pairs a line break.", ROWS)
    source_lang: str | None = flag(None, "Language code of the sources, for tokenizers that want one (mBART: en_XX).", ROWS)
    target_lang: str | None = flag(None, "Language code of the targets, likewise.", ROWS)
    max_source_length: int = flag(
        512,
        "Longest source, one-text row or conversation, in tokens; longer ones are truncated and counted.",
        ROWS,
        range=POSITIVE,
        unit="tokens",
    )
    max_target_length: int = flag(
        128, "Longest target, in tokens; longer ones are truncated and counted.", ROWS, range=POSITIVE, unit="tokens"
    )
    max_train_rows: int | None = flag(
        None, "Take the first N good rows alone of each training file.", CONTENT, range=POSITIVE, unit="rows"
    )
    max_eval_rows: int | None = flag(
        None,
        "Take the first N good rows alone of each file of validation_file and test_file.",
        HARMLESS,
        range=POSITIVE,
        unit="rows",
    )
    skip_bad_rows: bool = flag(False, "Leave malformed rows out and count them in run.json, instead of stopping.", CONTENT)
    preprocessing_num_workers: int = flag(1, "Processes that tokenise, on each node.", HARMLESS, range=POSITIVE, unit="processes")
    group_by_length: bool = flag(
        True, "Sort the rows of an optimizer step by length before they are cut into micro-batches.", MATHEMATICS
    )
    length_window: int = flag(
        1, "Share the rows of N steps out over them by length: less padding, but another order of the rows.", MATHEMATICS,
        range=POSITIVE, unit="steps",
    )  # fmt: skip
    dataloader_num_workers: int = flag(
        0,
        "Processes a rank that collate batches ahead of the step; 0: in the loop.",
        HARMLESS,
        range=NOT_NEGATIVE,
        unit="processes",
    )


@dataclass
class FreezingArguments:
    title = "freezing"
    freeze: list[str] = flag(
        [],
        "Rules applied in order: all, encoder, decoder, embeddings, backbone, head, encoder.layers[:6], layers[-2:], re:PATTERN.",
        MATHEMATICS,
        unit="rule",
    )
    unfreeze: list[str] = flag([], "Rules applied in order after --freeze.", MATHEMATICS, unit="rule")
    frozen_dtype: Literal["auto", "float32"] = flag(
        "auto",
        "Outside DeepSpeed: frozen weights of linear layers that are stored in the training precision stay in it; the same losses.",
        HARMLESS,
    )
    frozen_eval: bool = flag(False, "No dropout in what is frozen as a whole.", MATHEMATICS)
    cache_frozen: str | None = flag(
        None,
        "Folder for the outputs of a frozen encoder or frozen bottom blocks, computed once and read in later epochs and runs; "
        "needs --frozen_eval.",
        HARMLESS,
        unit="dir",
    )
    freeze_schedule: str | None = flag(
        None,
        "What learns by the step, in place of rules: '0: layers[-1]; 500: layers[-2:]; 50%: all', gradual(500), "
        "lisa(2, every=50) or badam(every=100).",
        MATHEMATICS,
        unit="schedule",
    )
    allow_unused: bool = flag(False, "Go on if a trainable parameter has had no gradient after the first step.", HARMLESS)


@dataclass
class AdapterArguments:
    title = "adapters"
    peft: Literal["lora", "dora", "rslora", "adalora", "ia3", "prefix", "prompt", "trainable_tokens"] | None = flag(
        None, "Freeze the model and train a peft adapter of this kind; --unfreeze names what else learns.", MATHEMATICS
    )
    lora_r: int = flag(
        16, "Rank (lora, dora, rslora); adalora: the mean rank at the end, from 1.5 times it.", MATHEMATICS, range=POSITIVE
    )
    lora_alpha: int = flag(
        32, "Scale: the update is multiplied by lora_alpha / lora_r (rslora: / sqrt(lora_r)).", MATHEMATICS, range=POSITIVE
    )
    lora_dropout: float = flag(0.0, "Dropout before the adapter.", MATHEMATICS, range=BELOW_ONE)
    target_modules: list[str] = flag(
        [], "Modules that get one: names, or all-linear. Default: peft's choice for the family.", MATHEMATICS
    )
    modules_to_save: list[str] = flag([], "Modules that learn as a whole and are saved with the adapter.", MATHEMATICS)
    num_virtual_tokens: int = flag(20, "Length of the prefix or prompt.", MATHEMATICS, range=POSITIVE, unit="tokens")
    trainable_tokens: list[str] = flag([], "Tokens whose embeddings learn; ones that the tokenizer lacks are added.", MATHEMATICS)
    quantize: Literal["nf4", "fp4", "int8"] | None = flag(
        None, "Keep the frozen base in 4 or 8 bits (bitsandbytes); needs --peft or --unfreeze.", MATHEMATICS
    )
    double_quant: bool = flag(False, "Quantise the scales of nf4 and fp4 as well: 0.4 bits a weight less.", MATHEMATICS)
    merge_adapter: bool = flag(False, "Also write merged/: the whole model with the adapter in its weights.", HARMLESS)


@dataclass
class LearningArguments:
    title = "learning"
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "Arithmetic of forward and backward; no: float32.", MATHEMATICS)
    tf32: bool = flag(False, "Float32 matrix products in TF32, whose factors have 10 bits; needs a GPU that has it.", MATHEMATICS)
    attn_implementation: (
        Literal["eager", "sdpa", "sdpa_by_row", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = flag(
        None,
        "Kernels of attention; sdpa_by_row is for packed rows, the last three need CUDA. Default: transformers' choice for the "
        "model, and sdpa_by_row for packed rows on a CPU (docs/rows.md).",
        HARMLESS,
    )
    gradient_checkpointing: bool | str = flag(
        False,
        "Recompute activations in the backward pass instead of keeping them: of all blocks, of one in N (every:N), or of as few as "
        "the plan has room for (auto).",
        HARMLESS,
        range=(
            lambda value: isinstance(value, bool) or value == "auto" or re.fullmatch(r"every:[1-9]\d*", value),
            "must be true, false, every:N or auto",
        ),
        unit="true|every:N|auto",
    )
    activation_offload: bool = flag(
        False, "Activations wait in pinned host memory for their backward pass; spares memory on GPUs alone.", HARMLESS
    )
    torch_compile: bool = flag(False, "Compile the repeated blocks with torch.compile; the first steps take a minute.", HARMLESS)
    liger: bool = flag(False, "Triton kernels of liger-kernel for norms, rotary positions and gated layers; needs CUDA.", HARMLESS)
    loss_chunks: int = flag(
        0, "Head and cross-entropy run over N pieces: no logits of all tokens at once; 0: whole.", HARMLESS, range=NOT_NEGATIVE
    )
    packing: bool = flag(
        False, "Lay the rows of a micro-batch end to end, each seeing itself alone: no padding, the same losses.", HARMLESS
    )
    per_device_train_batch_size: int = flag(8, "Rows of one forward/backward on one process.", CONTENT, range=POSITIVE, unit="rows")
    per_device_eval_batch_size: int = flag(8, "Rows of one evaluation batch on one process.", HARMLESS, range=POSITIVE, unit="rows")
    max_tokens_per_micro_batch: int | None = flag(
        None,
        "Cut a step into micro-batches of N tokens, padding included, as many rows a step; evaluations likewise.",
        HARMLESS,
        range=POSITIVE,
        unit="tokens",
    )
    gradient_accumulation_steps: int = flag(1, "Forward/backward passes per optimizer step.", CONTENT, range=POSITIVE, unit="steps")
    reduce: Literal["auto", "once", "each"] = flag(
        "auto",
        "ZeRO-2 and 3: exchange gradients once a step, for which each rank sums whole ones, or at each micro-batch; auto: once "
        "where the plan has room.",
        HARMLESS,
    )
    auto_batch: bool = flag(
        False, "Cut the step anew, with the largest micro-batch that fits: as many rows a step, the same losses.", HARMLESS
    )
    probe_longest_batch: bool = flag(
        False, "Try the run's largest micro-batch before step 0: what cannot fit fails at once.", HARMLESS
    )
    num_train_epochs: float = flag(
        3.0, "Passes over the training rows, unless max_steps is given.", CONTENT, range=POSITIVE, unit="epochs"
    )
    max_steps: int = flag(-1, "Optimizer steps; -1: from num_train_epochs.", CONTENT, range=POSITIVE_OR_MINUS_ONE, unit="steps")
    learning_rate: float = flag(5e-5, "Peak learning rate.", MATHEMATICS, range=NOT_NEGATIVE)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag(
        "linear", "Shape of the learning rate after warm-up.", MATHEMATICS
    )
    warmup_steps: int = flag(0, "Optimizer steps of linear warm-up.", CONTENT, range=NOT_NEGATIVE, unit="steps")
    warmup_ratio: float = flag(0.0, "Warm-up as a share of all steps (0 to 1), in place of warmup_steps.", CONTENT, range=SHARE)
    weight_decay: float = flag(
        0.0, "Decoupled weight decay; biases and normalisation weights have none.", MATHEMATICS, range=NOT_NEGATIVE
    )
    optim: Literal[
        "adamw_torch_fused",
        "adamw_torch",
        "adafactor",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "muon",
    ] = flag(
        "adamw_torch_fused",
        "Optimizer; 8 bits: a byte a state; lion: one state in place of two, at a tenth of AdamW's rate; paged: states leave a "
        "full GPU for the host.",
        MATHEMATICS,
    )
    muon_learning_rate: float | None = flag(
        None, "Peak rate of the matrices that --optim muon steps; learning_rate is for all else.", MATHEMATICS, range=POSITIVE
    )
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this L2 norm; 0: never.", MATHEMATICS, range=NOT_NEGATIVE)
    seed: int = flag(42, "Seed of the data order, dropout and new weights.", MATHEMATICS, range=NOT_NEGATIVE)


@dataclass
class BestArguments:
    title = "the best model, and when to stop"
    load_best_model_at_end: bool = flag(
        False, "Keep a checkpoint of the best evaluation, and make final/ of it in place of the last step.", HARMLESS
    )
    metric_for_best_model: str | None = flag(
        None, "What evaluations are compared by: loss, perplexity, rougeL, accuracy, ... Default: loss.", HARMLESS, unit="name"
    )
    greater_is_better: bool | None = flag(None, "Default: false for losses and perplexities, true for a metric.", HARMLESS)
    early_stopping_patience: int = flag(
        0,
        "Stop after N evaluations in a row that were no better; 0: never.",
        HARMLESS,
        range=NOT_NEGATIVE,
        unit="evaluations",
    )
    early_stopping_threshold: float = flag(
        0.0, "By how much an evaluation has to be better for the waiting to end.", HARMLESS, range=NOT_NEGATIVE
    )
    max_loss_spike: float | None = flag(
        None, "Skip a step whose loss is above X times the median of the 64 taken before it.", MATHEMATICS, range=ABOVE_ONE
    )


@dataclass
class RunArguments:
    title = "run"
    output_dir: str | None = flag(
        None, "Folder of run.json, metrics.jsonl, checkpoint-<step>/ and final/. Required.", HARMLESS, unit="dir"
    )
    deterministic: bool = flag(
        False,
        "The same bits each time, somewhat slower: for bitwise resume on a GPU, and with DDP on three or more processes anywhere.",
        HARMLESS,
    )
    plan_only: bool = flag(False, "Say what every strategy would take of this machine's memory, and end.", HARMLESS)
    memory_snapshot: str | None = flag(
        None, "File for torch's snapshot of a GPU's memory, should it run out (pytorch.org/memory_viz).", HARMLESS, unit="file"
    )
    profile_steps: int = flag(
        0,
        "Time the phases of the last N steps but one, trace and count memory in the very last; 0: none.",
        HARMLESS,
        range=NOT_NEGATIVE,
        unit="steps",
    )
    logging_steps: int = flag(10, "Optimizer steps between training records.", HARMLESS, range=POSITIVE, unit="steps")
    eval_strategy: Literal["no", "steps", "epoch"] = flag(
        "steps", "Evaluate each eval_steps, or where an epoch ends, and at the end; no: never.", HARMLESS
    )
    eval_steps: int = flag(
        0, "Optimizer steps between evaluations; 0: at the end only.", HARMLESS, range=NOT_NEGATIVE, unit="steps"
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = flag(
        "steps", "Save each save_steps, or where an epoch ends, and at the end; or after each best evaluation alone.", HARMLESS
    )
    save_steps: int | Literal["auto"] = flag(
        500,
        "Optimizer steps between checkpoints, and one at the end; 0: none; auto: by what a save costs and how often machines fail.",
        HARMLESS,
        range=(lambda value: value == "auto" or value >= 0, "must not be negative, or auto"),
        unit="steps",
    )
    mean_hours_between_failures: float | None = flag(
        None, "Of all machines of the run together; for --save_steps auto.", HARMLESS, range=POSITIVE, unit="hours"
    )
    save_every_seconds: float = flag(
        0.0,
        "Save as well when so long has passed since the last checkpoint; 0: by steps alone.",
        HARMLESS,
        range=NOT_NEGATIVE,
        unit="seconds",
    )
    save_total_limit: int = flag(
        2, "Newest checkpoints kept, beside the best one and those of keep_every.", HARMLESS, range=POSITIVE, unit="checkpoints"
    )
    keep_every: int = flag(
        0, "Keep for ever each checkpoint whose step N divides; 0: none.", HARMLESS, range=NOT_NEGATIVE, unit="steps"
    )
    resume_from_checkpoint: str = flag(
        "auto",
        "auto: the newest checkpoint in output_dir, if there is one; none: start at step 0; or a checkpoint's folder.",
        HARMLESS,
    )
    accept_change: list[str] = flag(
        [],
        "Flags that may differ from the checkpoint's though another training follows: learning_rate, train_file, ...",
        HARMLESS,
        unit="flag",
    )
    max_bad_steps: int = flag(
        5,
        "Steps in a row with a non-finite loss or gradient, or a loss spike, each skipped, after which the run stops.",
        HARMLESS,
        range=POSITIVE,
        unit="steps",
    )
    hang_timeout_seconds: float = flag(
        600.0,
        "Seconds without a step or save on a rank after which the job is ended with all stacks.",
        HARMLESS,
        range=POSITIVE,
        unit="seconds",
    )
    overwrite_output_dir: bool = flag(
        False, "With --resume_from_checkpoint none: start over in a folder that holds a run.", HARMLESS
    )
    predict_with_generate: bool = flag(
        True, "Generate in evaluations of validation_file, for ROUGE and BLEU; false: loss alone.", HARMLESS
    )
    generation_max_length: int | None = flag(
        None, "Longest generated text, in tokens. Default: max_target_length.", HARMLESS, range=POSITIVE, unit="tokens"
    )
    generation_num_beams: int = flag(1, "Beams of generation; 1: greedy.", HARMLESS, range=POSITIVE, unit="beams")
    metric: list[str] = flag(
        [], "Metrics for evaluate.load: a local module or a hub name. Default: the task's own, in metrics/.", HARMLESS
    )
    end_report: bool = flag(
        True,
        "At the end compare memory with its plan and draw the charts as PNG; false: a short run ends seconds sooner.",
        HARMLESS,
    )
    report_to: str = flag("none", "Tracker known to accelerate: tensorboard, wandb, ...; none: metrics.jsonl alone.", HARMLESS)


GROUPS = (ModelArguments, DataArguments, FreezingArguments, AdapterArguments, LearningArguments, BestArguments, RunArguments)
