"""Time the preparation of rows: train.py's own, with one process and several and from its cache, beside `datasets` alone.

    python -m zerotune.tools.benchmark.rows --out benchmarks/cpu/rows
    python -m zerotune.tools.benchmark.rows --out benchmarks/cpu/chats --chats
    python -m zerotune.tools.benchmark.rows --out runs/rows --train_file rows.jsonl --source_column question --target_column answer

`datasets` alone is load_dataset("json") and a batched map of the same tokenizer with truncation, as example scripts do it; it
neither checks a row nor knows its line. With --chats each row is a conversation under a ChatML template, and `datasets` alone maps
the tokenizer's apply_chat_template over batches, which does not say what is learned. Without --train_file the rows are the
quickstart's, numbered, --num_rows of them. Each run is a process of its own with empty caches; the clock starts when everything is
imported. The folder gets results.json and table.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from zerotune.run.records import environment_facts, write_json
from zerotune.tools.demo import build

ROOT = Path(__file__).resolve().parents[3]
OURS = """
from zerotune.rows.data import Data
from zerotune.run.arguments import Arguments
args = Arguments(preprocessing_num_workers=workers, **flags)
if args.messages_column:
    from zerotune.rows.chat import load_template
    load_template(tokenizer, args)
def prepare():
    return len(Data(args, tokenizer).rows["train"])
"""
ALONE = """
def encode(batch):
    if "messages_column" in flags:
        return tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=True, truncation=True, max_length=512)
    inputs = tokenizer(batch[flags["source_column"]], truncation=True, max_length=512)
    inputs["labels"] = tokenizer(text_target=batch[flags["target_column"]], truncation=True, max_length=128)["input_ids"]
    return inputs
if "messages_column" in flags:
    tokenizer.chat_template = open(flags["chat_template"]).read()
def prepare():
    rows = datasets.load_dataset("json", data_files=flags["train_file"])["train"]
    return len(rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=workers if workers > 1 else None))
"""
PROGRAM = """
import zerotune.quiet
import json, sys, time, datasets, transformers
flags, tokenizer, workers = json.loads(sys.argv[1]), transformers.AutoTokenizer.from_pretrained(sys.argv[2]), int(sys.argv[3])
{body}
begin = time.perf_counter()
count = prepare()
print(json.dumps([count, time.perf_counter() - begin]))
"""
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
KINDS = {  # name: (program, processes); the cached run finds what the one before it wrote
    "train.py, 1 process": (OURS, 1),
    "train.py, cached": (OURS, 1),
    "train.py, 2 processes": (OURS, 2),
    "datasets alone, 1 process": (ALONE, 1),
    "datasets alone, 2 processes": (ALONE, 2),
}


def seconds(kind, flags, tokenizer, cache):
    """Return the seconds of one run and the number of its rows."""
    body, workers = KINDS[kind]
    command = [sys.executable, "-c", PROGRAM.format(body=body), json.dumps(flags), str(tokenizer), str(workers)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    count, took = json.loads(done.stdout.splitlines()[-1])
    return took, count


def numbered(path, target, num_rows, chats):
    """Write num_rows rows of a JSON Lines file, over and over, each with its number in its source, so that no two are equal.

    chats: two rows as a conversation of four turns in place of one row.
    """
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    with open(target, "w") as file:
        for number in range(num_rows):
            row, other = rows[number % len(rows)], rows[(number + 1) % len(rows)]
            record = {"source": f"# {number}\n{row['source']}", "target": row["target"]}
            if chats:
                turns = [record["source"], record["target"], other["source"], other["target"]]
                roles = ("user", "assistant", "user", "assistant")
                record = {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}
            file.write(json.dumps(record) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train_file", help="JSON Lines; default: the quickstart's rows, numbered")
    parser.add_argument("--source_column", default="source")
    parser.add_argument("--target_column", default="target")
    parser.add_argument("--tokenizer_name", help="default: the quickstart's, BPE of 4,096 words")
    parser.add_argument("--chats", action="store_true", help="conversations of four turns, made of the quickstart's rows")
    parser.add_argument("--num_rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        file, tokenizer = args.train_file, args.tokenizer_name or f"{folder}/model"
        if file is None:
            file = f"{folder}/numbered.jsonl"
            numbered(f"{folder}/train.jsonl", file, args.num_rows, args.chats)
        flags = {"train_file": [file], "source_column": args.source_column, "target_column": args.target_column}
        if args.chats:
            template = Path(folder) / "chatml.jinja"
            template.write_text(CHATML)
            flags = {"train_file": [file], "task": "causal", "messages_column": "messages", "chat_template": str(template)}
        found = {kind: [] for kind in KINDS}
        for repeat in range(args.repeats):
            for kind in KINDS:
                cache = Path(folder) / ("one" if "cached" in kind else kind.replace("train.py, 1 process", "one"))
                took, count = seconds(kind, flags, tokenizer, cache / str(repeat))
                found[kind].append(took)
                print(f"{repeat + 1}/{args.repeats} {kind}: {took:.2f} s, {count:,} rows", flush=True)
    results = {"environment": environment_facts() | {"command_line": None}, "rows": count, "seconds": found}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", results)
    (args.out / "table.md").write_text(table(results))
    print(table(results))


def table(results):
    """Return the results as Markdown: seconds, and the speed beside `datasets` alone with one process, repeat by repeat."""
    facts, base = results["environment"], results["seconds"]["datasets alone, 1 process"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "datasets", "transformers"))
    lines = [f"{results['rows']:,} rows; {facts['device']}; {versions}; commit {facts['git_commit']}; {len(base)} repeats", ""]
    lines += ["| what | seconds: median (least-most) | speed |", "|---|---|---|"]
    for kind, times in results["seconds"].items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(base, times, strict=True))
        lines.append(f"| {kind} | {statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f}) | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
