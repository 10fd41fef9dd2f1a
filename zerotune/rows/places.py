"""Which tokens of an encoded text are a span of its characters: by the bytes of a byte-level tokenizer's tokens, or by offsets."""

from unicodedata import is_normalized

import numpy as np
from tokenizers import decoders, models, normalizers, pre_tokenizers


def bytes_of_tokens(inner):
    """Return how many UTF-8 bytes each token id stands for, int array, of a byte-level tokenizer; None of any other.

    Such a tokenizer writes each byte as one character (Radford et al. 2019, section 2.2), an added token as it is.
    """
    byte_level = isinstance(inner.decoder, decoders.ByteLevel) and isinstance(inner.model, models.BPE)
    if not byte_level or not isinstance(inner.normalizer, (type(None), normalizers.NFC)):
        return None
    vocabulary = inner.get_vocab(with_added_tokens=False)
    if not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None  # bytes that it does not know become a token for anything
    added = inner.get_added_tokens_decoder()
    sizes = np.zeros(1 + max(*vocabulary.values(), *added), dtype=np.int64)
    sizes[list(vocabulary.values())] = [len(token) for token in vocabulary]
    sizes[list(added)] = [len(token.content.encode()) for token in added.values()]
    return sizes


def between_bytes(ids, text, spans, token_bytes):
    """Return [tokens_between of each (begin, end) of `spans`] by the bytes of the tokens; None where this way cannot tell."""
    ends = np.cumsum(token_bytes[ids])
    if text.isascii():
        size, places = len(text), spans
    else:
        size = len(text.encode())
        places = [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in spans]
    if not len(ends) or ends[-1] != size or not is_normalized("NFC", text):  # such as a token that takes the space behind it along
        return None
    found = []
    for begin, end in places:
        first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end)
        if begin == end or (begin and ends[first - 1] != begin) or ends[last] != end:
            return None
        found.append((int(first), int(last) + 1))
    return found


def tokens_between(encoding, text, begin, end, inner):
    """Return (number of the first token of an answer, one past its last one) by its characters [begin, end) in the encoded text.

    Raise ValueError where a token reaches over one of its ends: what is generated begins and ends with a token.
    """
    place = begin
    while place < end and (first := encoding.char_to_token(place)) is None:  # a character that no token has, such as a space
        place += 1
    if place == end:
        return len(encoding), len(encoding)
    reaches_back = encoding.token_to_chars(first)[0] < begin
    if begin and not reaches_back and encoding.char_to_token(begin - 1) is None:  # what has no token may be in the one behind it
        reaches_back = inner.encode(text[:begin], add_special_tokens=False).ids != encoding.ids[:first]
    if reaches_back:
        raise ValueError(
            "the tokenizer makes one token of the end of the prompt and the begin of the answer, at "
            f"{text[begin - 8 : begin + 8]!r}; have the template's prompt end elsewhere"
        )
    place = end
    while (last := encoding.char_to_token(place - 1)) is None:
        place -= 1
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1  # a character of several tokens
    if encoding.token_to_chars(last)[1] > end and not is_special(inner, encoding.ids[last]):
        raise ValueError(
            f"the tokenizer makes one token of the end of an answer and of what follows it, at {text[end - 8 : end + 8]!r}; "
            "have the template end an answer with a special token"
        )
    return first, last + 1


def is_special(inner, token):
    """Tell whether a token is a special one, which may take the space behind it along."""
    added = inner.get_added_tokens_decoder().get(token)
    return added is not None and added.special
