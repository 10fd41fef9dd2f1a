"""From conversations to text by a chat template, and which part of the text the assistant has to say.

What is learned of a turn lies between the template's prompt for it, which is the conversation before it rendered with the
generation prompt, and its end-of-turn token. Where a template renders an earlier turn otherwise once others follow (thoughts that
are dropped, a system text that moves), that turn is learned in a row of its own, as it was when it was the newest.
"""

import json
import re
from dataclasses import dataclass

import jinja2.meta
from jinja2 import nodes
from transformers.utils.chat_template_utils import render_jinja_template

from zerotune.errors import UserError, nearest
from zerotune.rows.places import bytes_of_tokens

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
            message["role"] = SHAREGPT.get(str(message["role"]), message["role"])
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number}: unknown role {role!r}; allowed: {', '.join(ROLES)}, or {', '.join(SHAREGPT)}")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise ValueError(f"message {number} ({role}): no content")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {number} ({role}): content is {type(content).__name__}, not text")
        if content is None:
            message.pop("content", None)  # templates know an entry that is missing, not one that is None
        if "tool_calls" in message:
            message["tool_calls"] = [with_arguments(call) for call in message["tool_calls"]]
        messages.append(message)
    return messages


def with_arguments(call):
    """Return a tool call whose arguments are an object: as JSON text, OpenAI's form, a template would put them in quotes."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    except ValueError:
        raise ValueError(f"a tool call's arguments are no JSON: {function['arguments'][:80]!r}") from None


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
        if "default" not in tokenizer.chat_template:
            names = ", ".join(tokenizer.chat_template)
            raise UserError(f"--messages_column: the tokenizer's chat templates are {names}; give one: --chat_template FILE.jinja")
        tokenizer.chat_template = tokenizer.chat_template["default"]
    try:
        variables_of(tokenizer.chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{args.chat_template or 'the chat template'}:{error.lineno}: no Jinja template: {error.message}") from None
    if problem := Chats(tokenizer, args).problem:
        raise UserError(f"{args.chat_template or 'the chat template'}: {problem}")


def parsed(template):
    """Return a template's syntax tree; its generation tags, which only transformers knows, are left out."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))


def variables_of(template):
    """Return the names that a template takes from outside."""
    return jinja2.meta.find_undeclared_variables(parsed(template))


def has_fixed_prompt(template):
    """Tell whether what a template adds as generation prompt does not depend on the messages: it names nothing that could."""
    tree, outside = parsed(template), variables_of(template) - {"messages"}
    asked = [node for node in tree.find_all(nodes.If) if "add_generation_prompt" in names_in(node.test)]
    return bool(asked) and all(names_in(node) <= outside for node in asked)


def names_in(node):
    return {name.name for name in [*node.find_all(nodes.Name), *([node] if isinstance(node, nodes.Name) else [])]}


@dataclass
class Piece:
    """A text to learn from: the first `count` messages as the template renders them.

    answers: (message, first character, one past the last) of each answer that is learned in it. alone: it is the row of one turn,
    which reads otherwise once others follow.
    """

    count: int
    text: str
    answers: list
    alone: bool = False


class Chats:
    """A tokenizer's chat template, and what has been found out about it."""

    def __init__(self, tokenizer, args):
        self.tokenizer, self.train_on = tokenizer, args.train_on
        self.template = tokenizer.chat_template
        self.tagged, self.fixed_prompt = bool(GENERATION_TAG.search(self.template)), has_fixed_prompt(self.template)
        self.columns = variables_of(self.template) - {*GIVEN_FIELDS, *tokenizer.special_tokens_map}
        special = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
        self.special = re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")
        self.shapes = {}  # roles of a conversation: its Moulds, or None
        self.token_bytes = bytes_of_tokens(tokenizer.backend_tokenizer)
        self.end, self.problem = self.end_token()

    def given(self, record, messages, column):
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
        for name, there in (("tools", "tools" in found), ("tool_calls", any("tool_calls" in message for message in messages))):
            if there and name not in self.template:
                raise ValueError(f"{name} are given, but the chat template does not know them; give another: --chat_template")
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
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError("a message holds half a character (a lone surrogate)") from None
        return list(zip(texts, tags if self.tagged else [None] * len(texts), strict=True))

    def text(self, messages, given=None, prompt=False):
        return self.render([messages], given, prompt)[0][0]

    # ---- one conversation at a time -----------------------------------------------------------------------------------

    def end_token(self):
        """Return (the special tokens, as text, by which the template ends its newest answer; what is wrong with it, or "")."""
        try:
            text = self.text([{"role": "user", "content": "Zq1qZ"}, {"role": "assistant", "content": "Zq2qZ"}])
            longer = self.text([{"role": ("user", "assistant")[n % 2], "content": f"Zq{n + 1}qZ"} for n in range(4)])
        except ValueError:
            return "", ""
        after = text.rpartition("Zq2qZ")[2]
        if (found := self.special.search(after)) is None:
            if not after or self.special.search(longer.rpartition("Zq2qZ")[2].partition("Zq3qZ")[0]):
                problem = "it ends an answer only where another turn follows, so that a model would not learn to stop; mend it"
                return "", problem
            return "", ""
        end = found.end()
        while following := self.special.match(after, end):  # two in a row, with nothing between
            end = following.end()
        return after[found.start() : end], ""

    def end_of_turn(self, text, start, content):
        """Return the place after the end-of-turn token of the answer that begins at `start` and is the last of a text."""
        at = text.rfind(content, start) if content else -1
        behind = start if at < 0 else at + len(content)  # a token that the answer itself holds ends nothing
        if self.end and self.end in text[start:behind]:
            raise ValueError(f"an answer holds {self.end!r}, at which generation would stop")
        if self.end and (place := text.rfind(self.end, behind)) >= 0:
            return place + len(self.end)
        others = list(self.special.finditer(text, behind)) if self.end else []  # such as Llama's for a call that is answered
        return others[-1].end() if others else len(text)

    def pieces(self, messages, given):
        """Return the Pieces of a conversation; raise ValueError if what is to be learned cannot be told."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("no turn of the assistant to learn from")
        if self.train_on == "last":
            turns, messages = turns[-1:], messages[: turns[-1] + 1]
        ((whole, tags),) = self.render([messages], given)
        inside, alone = [], []
        for turn in turns:
            begin, end, text, marks = self.turn(messages, turn, given, whole, tags)
            in_whole = whole.startswith(text[:end])
            self.agree(*((whole, tags) if in_whole else (text, marks)), begin, end)
            if in_whole:
                inside.append((turn, begin, end))
            else:
                alone.append(Piece(turn + 1, text, [(turn, begin, end)], alone=True))
        if self.train_on == "all":
            return [Piece(len(messages), whole, inside or [(turns[-1], 0, len(whole))])]
        return alone + ([Piece(len(messages), whole, inside)] if inside else [])

    def fitting(self, piece, messages, given, fits):
        """Return (a Piece, its messages) without the oldest exchanges, as few of them as it takes for its text to fit.

        fits: text -> bool. An exchange begins with a message of the user; system and developer messages stay. The last exchange
        stays however long it is.
        """
        messages = messages[: piece.count]
        begins = [n for n in range(1, piece.answers[-1][0]) if messages[n]["role"] == "user"]

        def kept(begin):
            return [message for n, message in enumerate(messages) if n >= begin or message["role"] in ("system", "developer")]

        first, last = 0, len(begins) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if fits(self.text(kept(begins[middle]), given)) else (middle + 1, last)
        if not begins or len(kept(begins[first])) == len(messages):
            return piece, messages
        shorter = self.pieces(kept(begins[first]), given)[-1]
        if piece.alone:
            shorter.answers = shorter.answers[-1:]
        return shorter, kept(begins[first])

    def turn(self, messages, turn, given, whole, tags):
        """Return (first character, one past the last, text, its tags) of an answer in the conversation that ends with it."""
        if turn == 0:
            raise ValueError("the first message is the assistant's, and the chat template has nothing to prompt for it with")
        prompt = self.text(messages[:turn], given, prompt=True)
        text, marks = (whole, tags) if turn == len(messages) - 1 else self.render([messages[: turn + 1]], given)[0]
        if not text.startswith(prompt):
            same = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
            raise ValueError(
                f"message {turn + 1}: the chat template prompts for it with {prompt[same : same + 40]!r}, but renders "
                f"{text[same : same + 40]!r} in its place; what would be learned is not what would be generated"
            )
        content = messages[turn].get("content", "").strip()
        return len(prompt), self.end_of_turn(text, len(prompt), content), text, marks

    def agree(self, text, tags, begin, end):
        """Raise ValueError unless the template's generation tags mark the same answer, but for its end-of-turn token."""
        if tags is None:
            return
        marked = [(first, last) for first, last in tags if first < end and last >= begin]
        first, last = (marked[0][0], marked[-1][1]) if marked else (0, 0)
        around = text[min(begin, first) : max(begin, first)].strip(), text[last:end].strip().removesuffix(self.end)
        if not marked or any(around):
            raise ValueError(
                f"the chat template's generation tags mark {text[first:last][:80]!r}, but its prompts leave "
                f"{text[begin:end][:80]!r} to be generated; mend the template"
            )

    # ---- many alike ---------------------------------------------------------------------------------------------------

    def shape(self, messages):
        """Return the Moulds of conversations with these roles and nothing but text, None if the template is not so regular."""
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
            asked = [] if self.fixed_prompt else [messages[: mould.answers[-1][0]] for _, mould, messages in waiting]
            prompts = [prompt for prompt, _ in self.render(asked, prompt=True)] or [""] * len(waiting)
        except ValueError:
            waiting, texts, prompts = [], [], []
        irregular = set()
        for (number, mould, messages), (text, _), prompt in zip(waiting, texts, prompts, strict=True):
            piece = mould.filled([message["content"] for message in messages])
            held = self.end and any(self.end in messages[turn]["content"] for turn, _, _ in piece.answers)
            asks = self.fixed_prompt or prompt == text[: piece.answers[-1][1]]
            if piece.text == text and asks and not held:
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
    answers: list
    alone: bool

    @classmethod
    def of(cls, piece, contents):
        """Find the contents, which are placeholders between tabs, in a Piece; raise ValueError if one is not there once."""
        literals, trims, begins, place = [], [], [], 0
        for content in contents[: piece.count]:
            word = content.strip()
            at = piece.text.find(word, place)
            if at < 0 or piece.text.count(word) != 1:
                raise ValueError("not there once, and in order")
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

        answers = [(turn, located(begin), located(end)) for turn, begin, end in piece.answers]
        return cls(piece.count, literals, trims, answers, piece.alone)

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
        answers = [(turn, *(begins[number] + offset for number, offset in places)) for turn, *places in self.answers]
        return Piece(self.count, "".join(parts), answers, self.alone)
