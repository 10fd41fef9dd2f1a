"""From conversations to text by a chat template, and which part of the text the assistant has to say.

What is learned of a turn lies between the template's prompt for it, which is the conversation before it rendered with the
generation prompt, and its end-of-turn token. Where a template renders an earlier turn otherwise once others follow (thoughts that
are dropped, a system text that moves), that turn is learned in a row of its own, as it was when it was the newest.
"""

import json
import re
from dataclasses import dataclass

import jinja2.meta
from transformers.utils.chat_template_utils import render_jinja_template

from zerotune.errors import UserError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", "tool_response": "tool"}
GIVEN_FIELDS = ("messages", "tools", "documents", "add_generation_prompt")  # of a template, which are not columns of their own
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def messages_of(record, column):
    """Return the conversation of a row as [{"role", "content", ...}], without entries that are None; raise ValueError."""
    if column not in record:
        raise ValueError(
            f"no column {column!r}{nearest(column, record)}; columns: {', '.join(record) or 'none'}; see --messages_column"
        )
    if not isinstance(record[column], list) or not record[column]:
        found = "empty" if record[column] == [] else type(record[column]).__name__
        raise ValueError(f"column {column!r} is {found}, not a list of messages")
    messages = []
    for number, entry in enumerate(record[column], 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {number} is {type(entry).__name__}, not an object with role and content")
        message = {name: value for name, value in entry.items() if value is not None}
        if "role" not in message and "from" in message:  # ShareGPT's names
            message["role"], message["content"] = message.pop("from"), message.pop("value", None)
            message["role"] = SHAREGPT.get(message["role"], message["role"])
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number}: unknown role {role!r}; allowed: {', '.join(ROLES)}, or {', '.join(SHAREGPT)}")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"message {number} ({role}): no content")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {number} ({role}): content is {type(content).__name__}, not text")
        try:
            (content or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"message {number} ({role}): half a character (a lone surrogate) at {error.start}") from None
        if content is None:
            message.pop("content", None)  # templates know an entry that is missing, not one that is None
        messages.append(message)
    return messages


def load_template(tokenizer, args):
    """Give the tokenizer the template of --chat_template; UserError if there is none, or if it is none."""
    if args.chat_template is not None:
        with open(args.chat_template, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    if not tokenizer.is_fast:
        raise UserError("--messages_column: this tokenizer does not tell which token is where in a text; give a fast one")
    if tokenizer.chat_template is None:
        raise UserError("--messages_column: the tokenizer has no chat template; give one: --chat_template FILE.jinja")
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.get_chat_template()
    try:
        variables_of(tokenizer.chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{args.chat_template or 'the chat template'}:{error.lineno}: no Jinja template: {error.message}") from None


def variables_of(template):
    """Return the names that a template takes from outside."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{%\1 if true \3%}{%\1 endif \3%}", template)
    return jinja2.meta.find_undeclared_variables(environment.parse(plain))


@dataclass
class Piece:
    """A text to learn from: the first `count` messages as the template renders them, and what of it is learned.

    spans: (first character, one past the last) of each learned part. start: where the last turn's answer begins. turn: its message.
    """

    count: int
    text: str
    spans: list
    start: int
    turn: int


class Chats:
    """A tokenizer's chat template, and what has been found out about it."""

    def __init__(self, tokenizer, args):
        self.tokenizer, self.train_on = tokenizer, args.train_on
        self.template = tokenizer.chat_template
        self.tagged = bool(GENERATION_TAG.search(self.template))
        self.columns = variables_of(self.template) - {*GIVEN_FIELDS, *tokenizer.special_tokens_map}
        self.special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.shapes = {}  # roles of a conversation: its Shape, or None
        self.end = self.end_token()

    def given(self, record, column):
        """Return what else of a row goes to the template: its tools, and the columns that the template names."""
        found = {name: record[name] for name in self.columns if record.get(name) is not None and name != column}
        for name in ("tools", "documents"):
            value = record.get(name) if name != column else None
            if isinstance(value, str) and value.strip():
                try:
                    value = json.loads(value)
                except ValueError as error:
                    raise ValueError(f"column {name!r}: broken JSON: {error}") from None
            if value:
                found[name] = value
        return found

    def render(self, conversations, given=None, prompt=False):
        """Return [(text, the spans of its generation tags)] of conversations; raise ValueError with the template's own words."""
        try:
            texts, tags = render_jinja_template(
                conversations,
                chat_template=self.template,
                return_assistant_tokens_mask=self.tagged,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **(given or {})},
            )
        except Exception as error:  # a template may do anything
            raise ValueError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None
        return list(zip(texts, tags if self.tagged else [None] * len(texts), strict=True))

    def text(self, messages, given=None, prompt=False):
        return self.render([messages], given, prompt)[0][0]

    # ---- one conversation at a time -----------------------------------------------------------------------------------

    def end_token(self):
        """Return the number of the special token by which the template ends an answer, None if there is none."""
        try:
            text = self.text([{"role": "user", "content": "Zq1qZ"}, {"role": "assistant", "content": "Zq2qZ"}])
        except ValueError:
            return None
        after = self.tokenizer(text.rpartition("Zq2qZ")[2], add_special_tokens=False)["input_ids"]
        return next((number for number in after if number in self.special), None)

    def end_of_turn(self, text, start):
        """Return the place after the end-of-turn token of the answer that begins at `start` and is the last of a text."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = [
            (number, end)
            for number, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            if begin >= start
        ]
        for wanted in ({self.end}, self.special):
            if places := [end for number, end in tokens if number in wanted]:
                return places[-1]
        return len(text)

    def pieces(self, messages, given):
        """Return the Pieces of a conversation; raise ValueError if what is to be learned cannot be told."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("no turn of the assistant to learn from")
        last = turns[-1]
        if self.train_on == "last":
            turns, messages = [last], messages[: last + 1]
        ((whole, tags),) = self.render([messages], given)
        found, alone, start = [], [], 0
        for turn in turns:
            begin, end, text, marks = self.turn(messages, turn, given, whole, tags)
            if whole.startswith(text[:end]):
                self.agree(whole, tags, begin, end)
                found.append((begin, end))
                start = begin
            else:
                self.agree(text, marks, begin, end)
                alone.append(Piece(turn + 1, text, [(begin, end)], begin, turn))
        if self.train_on == "all":
            return [Piece(len(messages), whole, [(0, len(whole))], start, last)]
        inside = [turn for turn in turns if turn + 1 not in {piece.count for piece in alone}]
        return alone + ([Piece(len(messages), whole, found, start, inside[-1])] if found else [])

    def without_oldest(self, piece, messages, given):
        """Return (a Piece without its oldest exchange, its messages), or None where the last is all but the system text.

        An exchange begins with a message of the user. Of a turn that has a row of its own nothing else is learned then either.
        """
        head = next((n for n, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
        begins = [n for n in range(head + 1, piece.turn) if messages[n]["role"] == "user"]
        if not begins:
            return None
        kept = messages[:head] + messages[begins[0] : piece.count]
        shorter = self.pieces(kept, given)[-1]
        if len(piece.spans) == 1:
            shorter.spans = shorter.spans[-1:]
        return shorter, kept

    def turn(self, messages, turn, given, whole, tags):
        """Return (first character, one past the last, text, its tags) of an answer in the conversation that ends with it."""
        prompt = self.text(messages[:turn], given, prompt=True)
        text, marks = (whole, tags) if turn == len(messages) - 1 else self.render([messages[: turn + 1]], given)[0]
        if not text.startswith(prompt):
            same = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
            raise ValueError(
                f"message {turn + 1}: the chat template prompts for it with {prompt[same : same + 40]!r}, but renders "
                f"{text[same : same + 40]!r} in its place; what would be learned is not what would be generated"
            )
        return len(prompt), self.end_of_turn(text, len(prompt)), text, marks

    def agree(self, text, tags, begin, end):
        """Raise ValueError unless the template's generation tags mark the same answer, but for its end-of-turn token."""
        if tags is None:
            return
        marked = [(first, last) for first, last in tags if first < end and last > begin]
        rest = text[marked[-1][1] : end] if marked else ""
        one_token = len(self.tokenizer(rest.strip(), add_special_tokens=False)["input_ids"]) <= 1
        if not marked or text[min(begin, marked[0][0]) : max(begin, marked[0][0])].strip() or not one_token:
            shown = text[marked[0][0] : marked[-1][1]] if marked else ""
            raise ValueError(
                f"the chat template's generation tags mark {shown[:80]!r}, but its prompts leave {text[begin:end][:80]!r} to be "
                "generated; mend the template"
            )

    # ---- many alike ---------------------------------------------------------------------------------------------------

    def shape(self, messages):
        """Return the Shape of conversations with these roles and nothing but text, None if the template is not so regular."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self.shapes:
            contents = [f"\tZq{number}qZ\t" for number in range(len(roles))]
            try:
                pieces = self.pieces(
                    [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)], given=None
                )
                self.shapes[roles] = [Mould.of(piece, contents) for piece in pieces]
            except ValueError:
                self.shapes[roles] = None
        return self.shapes[roles]

    def all_pieces(self, conversations):
        """Return [the Pieces of a conversation, or a ValueError] of [(messages, given)].

        A conversation of placeholders shows where answers lie. Another with the same roles is rendered once: if its text is that of
        the placeholders with its contents in their place, its answers lie there too. All others are taken one at a time.
        """
        found, waiting = [None] * len(conversations), []
        for number, (messages, given) in enumerate(conversations):
            last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=None)
            short = messages[: last + 1] if self.train_on == "last" and last is not None else messages
            plain = not given and all(message.keys() == {"role", "content"} for message in short)
            if plain and (shape := self.shape(short)):
                waiting += [(number, mould, short) for mould in shape]
        try:
            texts = self.render([messages[: mould.count] for _, mould, messages in waiting])
        except ValueError:
            waiting, texts = [], []
        irregular = set()
        for (number, mould, messages), (text, _) in zip(waiting, texts, strict=True):
            piece = mould.filled([message["content"] for message in messages])
            if piece.text == text:
                found[number] = [*(found[number] or []), piece]
            else:
                irregular.add(number)
        for number, (messages, given) in enumerate(conversations):
            if found[number] is None or number in irregular:
                try:
                    found[number] = self.pieces(messages, given)
                except ValueError as error:
                    found[number] = error
        return found


@dataclass
class Mould:
    """A Piece with holes: literals[0], content 0, literals[1], content 1, ...; places are (literal, character in it)."""

    count: int
    literals: list
    trims: list
    spans: list
    start: tuple
    turn: int

    @classmethod
    def of(cls, piece, contents):
        """Find the contents, which are placeholders between tabs, in a Piece; raise ValueError if one is not there once."""
        literals, trims, begins, place = [], [], [], 0
        for content in contents[: piece.count]:
            word = content.strip()
            if piece.text.count(word) != 1 or (at := piece.text.find(word, place)) < 0:
                raise ValueError("not there once")
            left, right = piece.text[at - 1 : at] == "\t", piece.text[at + len(word) :][:1] == "\t"
            literals.append(piece.text[place : at - left])
            begins.append(place)
            trims.append((left, right))
            place = at + len(word) + right
        literals.append(piece.text[place:])
        begins.append(place)

        def located(character):
            number = max(n for n, begin in enumerate(begins) if begin <= character)
            if character - begins[number] > len(literals[number]):
                raise ValueError("inside a content")
            return number, character - begins[number]

        spans = [(located(begin), located(end)) for begin, end in piece.spans]
        return cls(piece.count, literals, trims, spans, located(piece.start), piece.turn)

    def filled(self, contents):
        """Return the Piece with other contents."""
        parts, begins, length = [], [], 0
        for number, literal in enumerate(self.literals):
            begins.append(length)
            parts.append(literal)
            if number < self.count:
                left, right = self.trims[number]
                content = contents[number] if left else contents[number].lstrip()
                parts.append(content if right else content.rstrip())
                length += len(parts[-1])
            length += len(literal)
        spans = [tuple(begins[number] + offset for number, offset in span) for span in self.spans]
        return Piece(self.count, "".join(parts), spans, begins[self.start[0]] + self.start[1], self.turn)
