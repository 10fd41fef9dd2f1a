"""From records to token ids: what of a row is learned, and what is wrong with it. A row's columns:

input_ids    list[int]  the encoder's (or classifier's) input; causal: prompt and target in one
labels       list[int]  the tokens to predict; causal: as long as input_ids and already shifted, -100 where nothing is predicted
label        str        the class (classification)
references   list[str]  the target texts as they were given
prompt_length int       tokens of input_ids that are given at generation (causal pairs)
length       int        tokens of the encoder's and the decoder's input together; longest_side: of the longer one; largest_id
num_targets, source_cut, target_cut, line   int; error  str, empty for a good row
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from zerotune.errors import nearest
from zerotune.rows import IGNORE
from zerotune.rows.chat import messages_of
from zerotune.rows.places import between_bytes, tokens_between

FORMAT = 4  # of the cached rows: raise it when encode() changes what it writes
CUT_AWAY = "nothing to learn is left after the cut"  # no bad row: it is left out and counted


def text_of(record, column, flag, allow_empty=False):
    """Return a text column of one row; raise ValueError with what is wrong."""
    if column not in record:
        raise ValueError(f"no column {column!r}{nearest(column, record)}; columns: {', '.join(record) or 'none'}; see --{flag}")
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip() and not allow_empty:
        raise ValueError(f"column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column!r} holds half a character (a lone surrogate) at {error.start}") from None
    return value


@dataclass
class Row:
    """A row on its way: the texts of its record, then its tokens."""

    line: int
    error: str = ""
    source: str = ""
    target: str = ""
    label: str = ""
    references: list = field(default_factory=list)
    messages: list = field(default_factory=list)
    given: dict = field(default_factory=dict)  # what goes to the chat template beside the messages
    ids: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    prompt_length: int = 0
    source_cut: int = 0
    target_cut: int = 0


def rows_of(line, record, args, chats, all_targets):
    """Return the Rows, of texts yet, of one record for args.task; raise ValueError.

    all_targets: a list of targets makes a row of each; else the first is learned from, and all are references.
    """
    if args.task == "classification":
        text = text_of(record, args.text_column or "text", "text_column")
        label = record.get(args.label_column)
        if isinstance(label, float) or not isinstance(label, (str, int)) or label == "":
            found = "missing or empty" if label in (None, "") else f"{type(label).__name__}, not text or a whole number"
            raise ValueError(f"column {args.label_column!r} is {found}; see --label_column")
        return [Row(line, source=text, label=str(label))]
    if chats:
        messages = messages_of(record, args.messages_column)
        return [Row(line, messages=messages, given=chats.given(record, messages, args.messages_column))]
    if args.task == "causal" and args.text_column:
        text = text_of(record, args.text_column, "text_column")
        return [Row(line, target=text, references=[text])]
    source = text_of(record, args.source_column, "source_column", allow_empty=True)
    targets = record.get(args.target_column)
    if isinstance(targets, list) and targets:
        targets = [text_of({args.target_column: target}, args.target_column, "target_column") for target in targets]
    else:
        targets = [text_of(record, args.target_column, "target_column")]
    return [Row(line, source=source, target=target, references=targets) for target in targets[: None if all_targets else 1]]


def tokenise(tokenizer, texts, max_length, side="text", **options):
    """Return (token ids of each text, tokens cut off each): special tokens are kept where the tokenizer adds them.

    side: "text", or "text_target", for which mBART-like tokenizers write the target language's marks.
    """
    options |= {"padding": False, "return_attention_mask": False, "verbose": False}
    ids = tokenizer(**{side: texts}, truncation=False, **options)["input_ids"]
    cut = [max(0, len(row) - max_length) for row in ids]
    for index in np.flatnonzero(cut):
        ids[index] = tokenizer(**{side: texts[index]}, truncation=True, max_length=max_length, **options)["input_ids"]
    return ids, cut


def encode(chunk, tokenizer, args, chats=None, all_targets=False):
    """Return the tokenised rows, a pyarrow.RecordBatch of the columns above, of a list of (line, record, error).

    chats: the chat.Chats of --messages_column; all_targets: as rows_of.
    """
    rows = []
    for line, record, error in chunk:
        try:
            rows += [Row(line, error=error)] if error else rows_of(line, record, args, chats, all_targets)
        except ValueError as problem:
            rows.append(Row(line, error=str(problem)))
    if chats:
        rows = chat_rows(rows, tokenizer, args, chats)
    else:
        add_tokens(rows, tokenizer, args)
    return columns(rows, args.task)


def add_tokens(rows, tokenizer, args):
    """Give rows of sources and targets their tokens."""
    sources, targets = [f"{args.source_prefix}{row.source}" for row in rows], [row.target for row in rows]
    if args.task == "causal":
        suffix = "\n" if args.source_suffix is None else args.source_suffix
        suffix_ids = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
        eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        prompts, source_cut = tokenise(tokenizer, sources, max(1, args.max_source_length - len(suffix_ids)))
        alone = bool(args.text_column)  # one text a row: the tokenizer's own special tokens, all of it learned
        limit = args.max_source_length if alone else args.max_target_length
        answers, target_cut = tokenise(tokenizer, targets, limit - len(eos), add_special_tokens=alone)
        for row, prompt, answer, cut in zip(rows, prompts, answers, target_cut, strict=True):
            prompt = [] if alone else prompt + suffix_ids
            ended = answer if cut or answer[-1:] == eos else answer + eos
            row.ids, row.prompt_length = prompt + ended, len(prompt)
            row.labels = shifted([IGNORE] * len(prompt) + ended)
        source_cut = [0] * len(rows) if alone else source_cut
    else:
        inputs, source_cut = tokenise(
            tokenizer, [source + (args.source_suffix or "") for source in sources], args.max_source_length
        )
        if args.task == "seq2seq":
            labels, target_cut = tokenise(tokenizer, targets, args.max_target_length, side="text_target")
        else:
            labels, target_cut = [[0]] * len(inputs), [0] * len(inputs)  # the class number is filled in by the collator
        for row, ids, label in zip(rows, inputs, labels, strict=True):
            row.ids, row.labels = ids, label
    for row, *cut in zip(rows, source_cut, target_cut, strict=True):
        row.source_cut, row.target_cut = cut


def shifted(labels):
    """Return the labels of a causal row one place to the left: what a position predicts is the token after it."""
    return labels[1:] + [IGNORE]


def chat_rows(rows, tokenizer, args, chats):
    """Return rows of conversations with their tokens; a conversation may give several."""
    good, result = [row for row in rows if not row.error], [row for row in rows if row.error]
    inner = tokenizer.backend_tokenizer  # without the lists that the outer one makes of all that it knows
    inner.no_truncation()
    inner.no_padding()
    pairs = []
    for row, found in zip(good, chats.all_pieces([(row.messages, row.given) for row in good]), strict=True):
        if isinstance(found, ValueError):
            result.append(Row(row.line, str(found)))
        else:
            pairs += [(row, piece) for piece in found]
    encodings = encoder(inner, chats)([piece.text for _, piece in pairs], add_special_tokens=False)
    for (row, piece), encoding in zip(pairs, encodings, strict=True):
        try:
            result.append(chat_row(row, piece, encoding, inner, args, chats))
        except ValueError as problem:
            result.append(Row(row.line, str(problem)))
    return sorted(result, key=lambda row: row.line)


def encoder(inner, chats):
    """Return the batch method of a tokenizer: offsets cost a quarter of its time, and are not needed if bytes tell as much."""
    return inner.encode_batch if chats.token_bytes is None else inner.encode_batch_fast


def chat_row(row, piece, encoding, inner, args, chats):
    """Return the Row of a Piece, which is encoded already, cut as --truncation says; raise ValueError."""
    limit, before, messages = args.max_source_length, len(encoding), row.messages
    if before > limit and args.truncation == "refuse":
        raise ValueError(f"{before} tokens, but --max_source_length is {limit}; raise it, or give another --truncation")
    if before > limit and args.truncation == "oldest_turns":

        def encoded(text):
            return encoder(inner, chats)([text], add_special_tokens=False)[0]

        piece, messages = chats.fitting(piece, messages, row.given, lambda text: len(encoded(text)) <= limit)
        encoding = encoded(piece.text)
    ids = encoding.ids  # a list that is made each time
    spans = [(begin, end) for _, begin, end in piece.answers]
    found = None if chats.token_bytes is None else between_bytes(ids, piece.text, spans, chats.token_bytes)
    if found is None:
        if chats.token_bytes is not None:
            encoding = inner.encode(piece.text, add_special_tokens=False)
        found = [tokens_between(encoding, piece.text, begin, end, inner) for begin, end in spans]
    places = [(turn, *tokens) for (turn, _, _), tokens in zip(piece.answers, found, strict=True)]
    there = [place for place in places if place[1] < limit]  # after the cut
    labels = ids[:limit] if args.train_on == "all" else [IGNORE] * min(limit, len(ids))
    for _, begin, end in there:
        labels[begin : min(end, limit)] = ids[begin : min(end, limit)]
    turn, start, _ = (there or places)[-1]
    return Row(
        row.line,
        references=[messages[turn].get("content", "")],
        ids=ids[:limit],
        labels=shifted(labels),
        prompt_length=min(start, limit),
        source_cut=before - len(ids),
        target_cut=max(0, len(ids) - limit),
    )


def columns(rows, task):
    """Return rows as a pyarrow.RecordBatch of the columns above; one that has no target, though nothing was cut, is a bad one."""
    ids, labels = (pa.array(part, pa.list_(pa.int32())) for part in ([row.ids for row in rows], [row.labels for row in rows]))
    # Over the flat tokens of all rows at once: a row's share of them lies between two offsets.
    lengths = [np.diff(part.offsets.to_numpy()) for part in (ids, labels)]
    num_targets = per_row(np.add, labels.flatten().to_numpy() != IGNORE, lengths[1])
    for index in np.flatnonzero(num_targets == 0):
        cut = rows[index].source_cut or rows[index].target_cut
        rows[index].error = rows[index].error or (CUT_AWAY if cut else "no target token is left to learn from")
    largest = [per_row(np.maximum, part.flatten().to_numpy(), sizes) for part, sizes in zip((ids, labels), lengths, strict=True)]
    numbers = {
        "prompt_length": [row.prompt_length for row in rows],
        "length": lengths[0] + (lengths[1] if task == "seq2seq" else 0),
        "longest_side": np.maximum(*lengths),
        "largest_id": np.maximum(*largest),
        "num_targets": num_targets,
        "source_cut": [row.source_cut for row in rows],
        "target_cut": [row.target_cut for row in rows],
        "line": [row.line for row in rows],
    }
    arrays = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in ("label", "error")}
    arrays["references"] = pa.array([row.references for row in rows], pa.list_(pa.string()))
    arrays |= {"input_ids": ids, "labels": labels}
    return pa.RecordBatch.from_pydict(arrays | {name: pa.array(values, pa.int64()) for name, values in numbers.items()})


def per_row(operation, values, sizes):
    """Return operation.reduce over each row's part of `values`, 0 for an empty row; sizes: of the parts, in order."""
    result = np.zeros(len(sizes), dtype=np.int64)
    filled = np.flatnonzero(sizes)
    if len(filled):
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[filled]
        result[filled] = operation.reduceat(values.astype(np.int64), starts)
    return np.maximum(result, 0)
