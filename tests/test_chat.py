"""Conversations: what of them is learned, token by token, under templates shaped like those of the families; cutting; mistakes."""

import copy
import json
import random
from pathlib import Path

import pytest
from conftest import text
from tokenizers import AddedToken, Tokenizer, models, normalizers

from zerotune.errors import UserError
from zerotune.rows.chat import Chats, load_template
from zerotune.rows.data import marked
from zerotune.rows.encoding import CUT_AWAY, encode
from zerotune.rows.places import between_bytes, bytes_of_tokens, tokens_between
from zerotune.run.arguments import Arguments, check_arguments

TEMPLATES = Path(__file__).parent / "chat_templates"
SPECIAL = (
    "<pad> <s> </s> <|im_start|> <|im_end|> <|im_sep|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|system|> <|user|> "
    "<|assistant|> <|end|> <|er|> <start_of_turn> <end_of_turn> <|start|> <|channel|> <|message|> <|return|> <|User|> <|Assistant|>"
).split()


@pytest.fixture(scope="module")
def tokenizer():
    """Return a byte-level tokenizer, whose tokens decode to the text that they were, with a merge across a line's end."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    inner.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def encoded(tokenizer, template, conversations, **flags):
    """Return (rows, marked texts) of conversations, each a list of messages or a record; template: a name, or Jinja."""
    args = Arguments(task="causal", messages_column="messages", max_source_length=4096)
    if "{" in template:
        tokenizer.chat_template = template
    else:
        args.chat_template = str(TEMPLATES / f"{template}.jinja")
    vars(args).update(flags)
    load_template(tokenizer, args)
    records = [chat if isinstance(chat, dict) else {"messages": chat} for chat in conversations]
    chunk = [(line, record, "") for line, record in enumerate(records, 1)]
    rows = encode(chunk, tokenizer, args, Chats(tokenizer, args)).to_pylist()
    return rows, ["" if row["error"] else marked(row, tokenizer) for row in rows]


def chat(*contents, system=None):
    """Return messages of user and assistant in turn."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


TWO = chat("hi", "ho", "why", "so\n\nso", system="be brief")
SPANS = {  # template: what of TWO is learned, by hand; several where a turn has a row of its own
    "chatml": [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|>⟧\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n⟦so\n\nso<|im_end|>⟧\n"
    ],
    "llama3": [
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦ho<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nwhy<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦so\n\nso<|eot_id|>⟧"
    ],
    "qwen3": [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nho<|im_end|>⟧\n",
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nso\n\nso<|im_end|>⟧\n",
    ],
    "phi3": [
        "<|system|>\nbe brief<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n⟦ho<|end|>⟧\n<|user|>\nwhy<|end|>\n<|assistant|>\n"
        "⟦so\n\nso<|end|>⟧\n</s>"
    ],
    "phi4": [
        "<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|>hi<|im_end|><|im_start|>assistant<|im_sep|>"
        "⟦ho<|im_end|>⟧<|im_start|>user<|im_sep|>why<|im_end|><|im_start|>assistant<|im_sep|>⟦so\n\nso<|im_end|>⟧"
    ],
    "mistral": [  # the system text stands before the newest question
        "<s>[INST] be brief\n\nhi[/INST]⟦ ho</s>⟧",
        "<s>[INST] hi[/INST] ho</s>[INST] be brief\n\nwhy[/INST]⟦ so\n\nso</s>⟧",
    ],
    "gpt_oss": [  # an answer that others follow ends otherwise
        "<|start|>system<|message|>be brief<|end|><|start|>user<|message|>hi<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>ho<|return|>⟧",
        "<|start|>system<|message|>be brief<|end|><|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>ho"
        "<|end|><|start|>user<|message|>why<|end|><|start|>assistant⟦<|channel|>final<|message|>so\n\nso<|return|>⟧",
    ],
    "plain": ["system: be brief\nuser: hi\nassistant: ⟦ho\n⟧user: why\nassistant: ⟦so\n\nso\n⟧"],
}
SPANS["chatml_tagged"] = SPANS["chatml"]


@pytest.mark.parametrize("template", SPANS)
def test_what_is_learned(tokenizer, template):
    rows, texts = encoded(tokenizer, template, [TWO])
    assert texts == SPANS[template], [row["error"] for row in rows]
    for row in rows:
        answer = tokenizer.decode(row["input_ids"][row["prompt_length"] :])
        assert answer.startswith(texts[rows.index(row)].rpartition("⟦")[2].partition("⟧")[0]), (
            "generation begins at the last answer"
        )
        assert row["num_targets"] == sum(label != -100 for label in row["labels"])
    assert [row["references"] for row in rows][-1] == ["so\n\nso"]
    # One at a time, without what is known of conversations with the same roles, and behind another that has shown them.
    chats = Chats(tokenizer, Arguments(messages_column="messages"))
    alone = chats.pieces(TWO, {})
    first, second = chats.all_pieces([(chat("a", "b", "c", "d", system="e"), {}), (TWO, {})])
    assert second == alone and len(first) == len(alone)
    assert chats.shapes, "conversations of the same roles are taken together"


def test_trimmed_contents_and_no_system_role(tokenizer):
    spaced = chat("  hi ", " ho\n")
    assert encoded(tokenizer, "gemma", [spaced])[1] == [
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n⟦ho<end_of_turn>⟧\n"
    ]
    assert encoded(tokenizer, "chatml", [spaced])[1] == [
        "<|im_start|>user\n  hi <|im_end|>\n<|im_start|>assistant\n⟦ ho\n<|im_end|>⟧\n"
    ]
    rows, _ = encoded(tokenizer, "gemma", [TWO, chat("hi", "ho")])
    assert rows[0]["error"] == "the chat template refuses it: System role not supported" and not rows[1]["error"]


def test_turns_tools_thoughts_and_names(tokenizer):
    texts = encoded(tokenizer, "chatml", [TWO, chat("hi", "", "a", "b")], train_on="last")[1]
    assert texts[0].count("⟦") == 1 and texts[0].endswith("⟦so\n\nso<|im_end|>⟧\n")
    texts = encoded(tokenizer, "chatml", [chat("hi", "", "a", "b"), chat("hi", "ho", "more")])[1]
    assert "assistant\n⟦<|im_end|>⟧\n" in texts[0], "an empty answer: nothing but its end"
    assert texts[1].count("⟦") == 1 and texts[1].endswith("user\nmore<|im_end|>\n")
    (text,) = encoded(tokenizer, "chatml", [TWO], train_on="all")[1]
    assert text.startswith("<|im_start|>⟦system") and text.endswith("⟧"), "the first token is predicted from nothing"

    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    used = [
        {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "two"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "add"}}]
    texts = encoded(tokenizer, "llama3", [{"messages": used, "tools": tools}, {"messages": used, "tools": json.dumps(tools)}])[1]
    assert texts[0] == texts[1] and 'Functions: [{"type"' in texts[0].replace('{"function"', '{"type"')
    assert '⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧<|start_header_id|>ipython' in texts[0]
    assert texts[0].endswith("⟦two<|eot_id|>⟧")

    thought = chat("hi", "<think>\nhm\n</think>\n\nho", "why", "<think>\nwell\n</think>\n\nso")
    first, second = encoded(tokenizer, "qwen3", [thought])[1]
    assert first.endswith("assistant\n⟦<think>\nhm\n</think>\n\nho<|im_end|>⟧\n"), "as it is generated, not as it is remembered"
    assert "hm" not in second and second.endswith("⟦<think>\nwell\n</think>\n\nso<|im_end|>⟧\n")
    (text,) = encoded(tokenizer, "qwen3", [{"messages": chat("hi", "ho"), "enable_thinking": False}])[1]
    assert text.endswith("<think>\n\n</think>\n\n⟦ho<|im_end|>⟧\n"), "a column that the template names goes to it"
    (text,) = encoded(tokenizer, "gpt_oss", [[*chat("hi"), {"role": "assistant", "content": "ho", "thinking": "hm"}]])[1]
    assert text.endswith(
        "assistant⟦<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>ho<|return|>⟧"
    )

    sharegpt = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert encoded(tokenizer, "chatml", [sharegpt])[1] == encoded(tokenizer, "chatml", [chat("hi", "ho", system="be brief")])[1]


def test_a_regular_template_with_an_irregular_row(tokenizer):
    """What is known of the roles does not hold for contents that the template treats in a way of its own."""
    plain, odd = chat("hi", "ho"), chat("hi", "<think>\nhm\n</think>\n\nho")
    for rows in ([plain, odd, plain], [odd, plain, odd]):
        texts = encoded(tokenizer, "qwen3", rows)[1]
        assert texts == [encoded(tokenizer, "qwen3", [row])[1][0] for row in rows]


def test_truncation(tokenizer):
    long = chat("a" * 30, "b" * 30, "c" * 5, "d" * 6, system="s")
    short = encoded(tokenizer, "chatml", [chat("c" * 5, "d" * 6, system="s")])[0][0]
    whole = len(encoded(tokenizer, "chatml", [long])[0][0]["input_ids"])
    (row,), (text,) = encoded(tokenizer, "chatml", [long], max_source_length=len(short["input_ids"]))
    assert row["input_ids"] == short["input_ids"] and row["labels"] == short["labels"], "the system text stays, the oldest turns go"
    assert row["source_cut"] == whole - len(row["input_ids"]) and row["target_cut"] == 0
    (row,), _ = encoded(tokenizer, "chatml", [long], max_source_length=len(short["input_ids"]) - 4)
    assert row["input_ids"] == short["input_ids"][:-4] and row["target_cut"] == 4, "the last exchange is cut at its end"
    (row,), _ = encoded(tokenizer, "chatml", [long], max_source_length=50, truncation="end")
    assert len(row["input_ids"]) == 50 and row["target_cut"] == whole - 50
    spans = encoded(tokenizer, "chatml", [long], max_source_length=95, truncation="end")
    assert spans[0][0]["references"] == ["b" * 30] and spans[1][0].rpartition("⟦")[2].startswith("bb"), (
        "the last answer is cut away"
    )
    middle = [*long[:3], {"role": "system", "content": "t"}, *long[3:]]
    (text,) = encoded(tokenizer, "chatml", [middle], max_source_length=len(short["input_ids"]) + 30)[1]
    assert text.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>system\nt<|im_end|>\n<|im_start|>user\nccccc")
    (row,), _ = encoded(tokenizer, "chatml", [long], max_source_length=20)
    assert row["error"] == CUT_AWAY
    (row,), _ = encoded(tokenizer, "chatml", [long], max_source_length=50, truncation="refuse")
    assert row["error"] == f"{whole} tokens, but --max_source_length is 50; raise it, or give another --truncation"
    # A turn with a row of its own stays the only thing that is learned of it.
    rows, texts = encoded(tokenizer, "qwen3", [chat("a" * 40, "b", "c", "d", "e", "f")], max_source_length=100)
    assert [text.count("⟦") for text in texts] == [1, 1, 1] and [text.rpartition("\n\n")[2] for text in texts] == [
        "b<|im_end|>⟧\n", "d<|im_end|>⟧\n", "f<|im_end|>⟧\n"
    ]  # fmt: skip


BAD = {
    "no column": ({"chat": []}, "no column 'messages'; columns: chat; see --messages_column"),
    "text": ({"messages": "hi"}, "column 'messages' is str, not a list of messages"),
    "nothing": ({"messages": []}, "column 'messages' is empty, not a list of messages"),
    "message": ({"messages": ["hi"]}, "message 1 is str, not an object with role and content"),
    "role": ([{"role": "bot", "content": "x"}], "message 1: unknown role 'bot'; allowed: system, developer, user, assistant, tool"),
    "content": ([{"role": "user"}], "message 1 (user): no content"),
    "parts": ([{"role": "user", "content": [{"type": "image"}]}], "message 1 (user): content is list, not text"),
    "no answer": (chat("hi"), "no turn of the assistant to learn from"),
    "surrogate": (chat("\ud800", "x"), "a message holds half a character (a lone surrogate)"),
    "tools": ({"messages": TWO, "tools": "{"}, "column 'tools': broken JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows(tokenizer, kind):
    row, problem = BAD[kind]
    rows, _ = encoded(tokenizer, "chatml", [TWO, row])
    assert rows[1]["error"].startswith(problem) and not rows[0]["error"]


TURNS = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}%s{% endif %}"


def turns(each, prompt):
    """Return a template that writes `each` message m, and a prompt."""
    return TURNS.replace("%s", each, 1).replace("%s", prompt)


def test_where_answers_begin_and_end(tokenizer):
    """Tokens that reach over the ends of an answer, ends of two tokens or none, and answers that hold what ends them."""
    plain = turns("{{ m.role }}:{{ '\n' }}{{ m.content }}{{ '\n' }}", "assistant:{{ '\n' }}")
    (row,), _ = encoded(tokenizer, plain, [chat("hi", "\nho")])
    assert "one token of the end of the prompt and the begin of the answer, at" in row["error"], "\\n\\n is one token"
    (row,), _ = encoded(tokenizer, turns("{{ '\n' }}{{ m.role }}: {{ m.content }}{{ '\n' }}", "{{ '\n' }}assistant: "), [TWO])
    assert "one token of the end of an answer and of what follows it" in row["error"]
    (text,) = encoded(tokenizer, "plain", [chat("hi", "ho 😀")])[1]
    assert text.endswith("⟦ho 😀\n⟧")

    two = turns("<|{{ m.role }}|>{{ m.content }}<|er|><|end|>", "<|assistant|>")
    assert encoded(tokenizer, two, [chat("hi", "ho")])[1] == ["<|user|>hi<|er|><|end|><|assistant|>⟦ho<|er|><|end|>⟧"]
    for endless in (
        turns("<|{{ m.role }}|>{{ m.content }}", "<|assistant|>"),
        turns("<|{{ m.role }}|>{{ m.content }}{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}", "<|assistant|>"),
    ):
        with pytest.raises(UserError, match="ends an answer only where another turn follows"):
            encoded(tokenizer, endless, [chat("hi", "ho")])

    odd = [chat("hi", "use <s> to"), {"messages": chat("hi", "use <s> to"), "other": 1}]
    assert encoded(tokenizer, "plain", odd)[1] == ["user: hi\nassistant: ⟦use <s> to\n⟧"] * 2
    assert encoded(tokenizer, "chatml", odd[:1])[1][0].endswith("⟦use <s> to<|im_end|>⟧\n")
    for row in (chat("hi", "a<|im_end|>b"), chat("hi", "a<|im_end|>b", "c", "d")):
        assert encoded(tokenizer, "chatml", [row])[0][0]["error"] == "an answer holds '<|im_end|>', at which generation would stop"
    assert encoded(tokenizer, "chatml", [chat("a<|im_end|>b", "ho")])[1][0].endswith("⟦ho<|im_end|>⟧\n")


def test_places_by_bytes_are_those_by_offsets(tokenizer):
    """A byte-level tokenizer's tokens lie where their bytes add up to; what this cannot tell is left to the offsets."""
    inner, generator = tokenizer.backend_tokenizer, random.Random(0)
    sizes, counts = bytes_of_tokens(inner), {"by bytes": 0, "left": 0}
    parts = ["a", " ", "\n", "\n\n", "é", "e\u0301", "\u4e16", "😀", "<|im_end|>", "<|end|>", "<think>", "<s>"]
    for _ in range(400):
        text = "".join(generator.choices(parts, k=generator.randint(1, 12)))
        spans = [sorted(generator.sample(range(len(text) + 1), 2))]
        encoding = inner.encode(text, add_special_tokens=False)
        found = between_bytes(encoding.ids, text, spans, sizes)
        counts["left" if found is None else "by bytes"] += 1
        if found is not None:
            assert found == [tokens_between(encoding, text, begin, end, inner) for begin, end in spans], (text, spans)
    assert min(counts.values()) > 50, counts
    taking = copy.deepcopy(inner)
    taking.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    text = "a<|end|>  b"
    ids = taking.encode(text, add_special_tokens=False).ids
    assert len(ids) == 3 and between_bytes(ids, text, [(0, 1)], bytes_of_tokens(taking)) is None
    taking.normalizer = normalizers.Lowercase()
    assert bytes_of_tokens(taking) is None
    assert bytes_of_tokens(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None


def test_prompts_that_depend_on_what_was_said(tokenizer):
    """The conversation of placeholders does not speak for these; each row's own prompt is asked for."""
    thinks = turns(
        "<|{{ m.role }}|>{{ m.content }}<|end|>", "<|assistant|>{% if 'quick' in messages[-1].content %}<think></think>{% endif %}"
    )
    rows, texts = encoded(tokenizer, thinks, [chat("hi", "ho"), chat("quick, hi", "ho"), chat("quick", "<think></think>ho")])
    assert texts[0] == "<|user|>hi<|end|><|assistant|>⟦ho<|end|>⟧" and texts[2].endswith("<think></think>⟦ho<|end|>⟧")
    assert "prompts for it with '<think></think>', but renders 'ho<|end|>'" in rows[1]["error"]


def test_tool_calls_as_others_write_them(tokenizer):
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [call]}]
    assert encoded(tokenizer, "llama3", [asked])[1][0].endswith('⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧')
    rows, _ = encoded(tokenizer, "chatml", [asked, {"messages": TWO, "tools": [{"name": "add"}]}, chat("hi", "ho")[1:]])
    assert rows[0]["error"].startswith("tool_calls are given, but the chat template does not know them; give another")
    assert rows[1]["error"].startswith("tools are given, but the chat template does not know them")
    assert rows[2]["error"].startswith("the first message is the assistant's")


def test_templates_that_cannot_be_learned_from(tokenizer, tmp_path):
    (row,), _ = encoded(tokenizer, "r1", [chat("hi", "ho")])
    assert "prompts for it with '<think>\\n', but renders 'ho</s>' in its place" in row["error"]
    (row,), _ = encoded(tokenizer, "chatml_wrong_tags", [chat("hi", "ho")])
    assert "generation tags mark '', but its prompts leave 'ho<|im_end|>'" in row["error"]
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for x in %}")
    args = Arguments(messages_column="messages", chat_template=str(broken))
    with pytest.raises(UserError, match="broken.jinja:1: no Jinja template"):
        load_template(tokenizer, args)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; give one: --chat_template"):
        load_template(tokenizer, Arguments(messages_column="messages"))


def test_flags():
    def problems(**flags):
        return check_arguments(Arguments(**flags), required=())

    assert problems(messages_column="m") == ["--messages_column: conversations are for --task causal (given: seq2seq)"]
    assert problems(task="causal", train_on="last") == ["--train_on: is for conversations; give --messages_column as well"]
    assert problems(task="causal", messages_column="m", text_column="t")[0].endswith("are both given; give one")
    assert problems(task="causal", messages_column="m", chat_template="none.jinja")[0].startswith(
        "--chat_template none.jinja: no such"
    )


@pytest.mark.launch
def test_a_run_on_conversations(train, tiny, tmp_path):
    """The loss is that of the marked tokens alone, the last answer is generated, and final/ carries the template."""
    rows = [chat(*(text(n + turn, 2 + (3 * n + turn) % 7) for turn in range(2 + 2 * (n % 3)))) for n in range(8)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    done = train(
        "zero2", task="causal", messages_column="messages", chat_template=TEMPLATES / "words.jinja",
        model_name_or_path=tiny("llama"), train_file=file, validation_file=file, test_file=file,
        max_steps=2, per_device_train_batch_size=2, logging_steps=1,
        generation_max_length=4,
    )  # fmt: skip
    first = f"<s> {rows[0][0]['content']} </s> <unk>⟦{rows[0][1]['content']} </s>⟧"
    assert first in " ".join(done.output.split()).replace("⟦ ", "⟦"), done.output
    answers = sum(len(message["content"].split()) + 1 for row in rows for message in row if message["role"] == "assistant")
    assert done.records("eval_target_tokens")[-1]["eval_target_tokens"] == answers
    predictions = [json.loads(line) for line in (done.folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in predictions] == [row[-1]["content"] for row in rows]
    assert all(len(line["prediction"].split()) <= 4 for line in predictions)
    assert (done.folder / "final" / "chat_template.jinja").read_text() == (TEMPLATES / "words.jinja").read_text()
    again = train(
        "zero2", check=False, task="causal", messages_column="messages", model_name_or_path=done.folder / "final", train_file=file,
        max_steps=1, name="again", truncation="refuse", max_source_length=20,
    )  # fmt: skip
    assert again.code == 2 and "tokens, but --max_source_length is 20; raise it" in again.output and "chats.jsonl:" in again.output
