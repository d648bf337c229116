"""Conversations as text, and the token ids that begin a text and end a turn."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flora_jax.errors import UserError, require

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any

# The names that transformers and we pass to a chat template.
_GIVEN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "additional_special_tokens",
    "raise_exception",
    "strftime_now",
}
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# The date that Llama 3's chat template uses if it is given none. With today's date, the same data
# and the same prompt would change every day.
DATE = "26 Jul 2024"


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 of all that decides which ids a text or a conversation has.

    None for a tokenizer that is written in Python: its code would have to be hashed, too.
    """
    if not tokenizer.is_fast:
        return None
    import jinja2
    import tokenizers
    import transformers

    tokenizer("")  # a call sets padding and truncation, which are part of the backend
    versions = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    split = tokenizer.split_special_tokens  # no part of the backend: set anew at each call
    about = repr((*versions, type(tokenizer).__name__, special, tokenizer.chat_template, split))
    return hashlib.sha256(f"{about}\n{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()


def encode_open(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text to continue, with the tokens that the tokenizer puts before it.

    That is bos, by the tokenizer's own rule, but no second one where a rendered chat begins with
    it. Tokens that some tokenizers put behind a text (`add_eos_token`) are left out.
    """
    return encode_open_batch(tokenizer, [text], add_special_tokens)[0]


def encode_open_batch(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """`encode_open` of each text."""
    bos = tokenizer.bos_token or "\0"
    special = [add_special_tokens and not text.startswith(bos) for text in texts]
    closing = 0
    if any(special):
        closing = _count_closing(tokenizer)
    ids: dict[int, list[int]] = {}
    for one, behind in ((True, closing), (False, 0)):
        places = [i for i, its in enumerate(special) if its is one]
        if places:
            given = [texts[i] for i in places]
            found = tokenizer(given, add_special_tokens=one, verbose=False)["input_ids"]
            ids |= {i: row[: len(row) - behind] for i, row in zip(places, found, strict=True)}
    return [ids[i] for i in range(len(texts))]


def _count_closing(tokenizer: Tokenizer) -> int:
    """How many tokens the tokenizer puts behind a text."""
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    if 0 not in mask:
        return 0
    return mask[::-1].index(0)


def encode_cut(
    tokenizer: Tokenizer,
    text: str,
    cuts: Sequence[int],
    encoding: Encoding | None = None,
) -> list[list[int]]:
    """The ids of `text`, nothing added, in `len(cuts) + 1` pieces that end at the characters
    `cuts`.

    cuts: ascending; encoding: of the whole text, where it is known. The pieces up to a cut are the
    ids of the text up to it, as in generation. Where tokens end at a cut, as they do in nearly
    every chat template, the pieces together are the ids of the whole text. Where a token would
    cross it, the text behind the cut is tokenised apart.
    """
    return _cut(tokenizer, text, cuts, encoding or encode_batch(tokenizer, [text])[0], inside=False)


# The ids of a text, and the characters `(start, stop)` of each; None where they are not known.
Encoding = tuple[list[int], list[tuple[int, int]] | None]


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """The ids of each text, nothing added, and the characters `(start, stop)` of each id.

    A tokenizer that is written in Python does not tell the characters: None.
    """
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    offsets = itertools.repeat(None)
    if tokenizer.is_fast:
        offsets = found["offset_mapping"]
    return list(zip(found["input_ids"], offsets, strict=False))


def _cut(
    tokenizer: Tokenizer,
    text: str,
    cuts: Sequence[int],
    encoding: Encoding,
    inside: bool,
) -> list[list[int]]:
    """`encode_cut`; inside: whether the text stands behind another."""
    ids, offsets = encoding
    stops = []
    for i, cut in enumerate(cuts):
        k = _ids_before(text, cut, offsets)
        if k is None:
            # Only the ids of the text up to here can tell.
            start = text[:cut]
            if inside:
                before = _encode_inside(tokenizer, start)
            else:
                before = encode_batch(tokenizer, [start])[0]
            k = len(before[0])
            if ids[:k] != before[0]:
                behind = text[cut:]
                rest = [later - cut for later in cuts[i + 1 :]]
                return [
                    *_cut(tokenizer, start, cuts[:i], before, inside),
                    *_cut(tokenizer, behind, rest, _encode_inside(tokenizer, behind), inside=True),
                ]
        stops.append(k)
    return [ids[start:stop] for start, stop in itertools.pairwise([0, *stops, len(ids)])]


def _ids_before(text: str, cut: int, offsets: list[tuple[int, int]] | None) -> int | None:
    """How many ids stand for the characters before `cut`; None where the offsets do not tell.

    Offsets may leave out spaces, or include those beside an added token.
    """
    k = bisect.bisect_left(offsets or [], (cut,))
    if k == 0 or offsets[k - 1][1] != cut or (k < len(offsets) and offsets[k][0] != cut):
        return None
    # GPT-2's split, `\s+(?!\S)`, cuts off the last of several spaces only where text follows.
    if offsets[k - 1][0] == cut - 1 and text[cut - 2 : cut].isspace():
        return None
    return k


def _encode_inside(tokenizer: Tokenizer, text: str) -> Encoding:
    """The ids and offsets of a text that stands behind another.

    SentencePiece puts a space before the beginning of a text; here there is none.
    """
    (line, _), (alone, _), (behind, _) = encode_batch(tokenizer, ["\n", "a", "\na"])
    if behind[len(line) :] != alone:
        ids, offsets = encode_batch(tokenizer, [f"\n{text}"])[0]
        if ids[: len(line)] == line:
            spans = offsets and [(start - 1, stop - 1) for start, stop in offsets[len(line) :]]
            return ids[len(line) :], spans
    return encode_batch(tokenizer, [text])[0]


def render(tokenizer: Tokenizer, conversation: Sequence[Mapping[str, Any]], **how: Any) -> str:
    """The conversation, a `{"role", "content"}` for each turn, in the tokenizer's chat template.

    how: further arguments of `apply_chat_template`. Raises UserError if the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            list(conversation), tokenize=False, date_string=DATE, **how
        )
    # A template is a program and may raise anything.
    except Exception as error:
        roles = ", ".join(str(turn.get("role")) for turn in conversation)
        raise UserError(
            f"the tokenizer's chat template refuses a conversation of roles {roles}: {error}"
        ) from None


def set_template_arguments(tokenizer: Tokenizer, text: str) -> None:
    """Sets arguments of the tokenizer's chat template, wherever it is used, saved or exported.

    text: `NAME=VALUE,…`, such as `enable_thinking=false` for Qwen3; a value is JSON, or else a
    text. The template then begins by setting them, so that a saved tokenizer keeps them. Raises
    UserError for a text that is no such list, without a template, and for a name that the template
    does not read.
    """
    arguments = _read_template_arguments(text)
    if not arguments:
        return
    template = tokenizer.chat_template
    require(
        isinstance(template, str),
        f"template_arguments={text!r}: the tokenizer has no chat template that reads them",
    )
    read = _arguments_of(template) - set(tokenizer.special_tokens_map)
    for name in arguments:
        require(
            name in read,
            f"template_arguments={text!r}: the tokenizer's chat template takes no {name!r}; it "
            f"takes {', '.join(sorted(read)) or 'nothing'}",
        )
    given = (f"{{%- set {name} = {_literal(value)} -%}}" for name, value in arguments.items())
    tokenizer.chat_template = "".join([*given, template])


def _literal(value: Any) -> str:
    """A value of JSON as a template writes it: Jinja knows all of JSON's words but null."""
    if value is None:
        return "none"
    return json.dumps(value)


def without_generation(template: str) -> str:
    """The template without transformers' own `generation` statement, which Jinja does not know."""
    return _GENERATION.sub("", template)


def _arguments_of(template: str) -> set[str]:
    """The names that a template reads and a caller may set. Raises UserError for a template that is
    no Jinja."""
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(without_generation(template))
        read = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:  # unknown filters included
        raise UserError(f"the tokenizer's chat template cannot be read: {error}") from None
    return read - set(environment.globals) - _GIVEN


def _read_template_arguments(text: str) -> dict[str, Any]:
    arguments = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        require(
            name.isidentifier() and equals,
            f"template_arguments={text!r}: {pair!r} is not NAME=VALUE",
        )
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


_ANSWER = "0123456789"


def ends(tokenizer: Tokenizer) -> list[int]:
    """The tokens with which a model ends its answer.

    They are eos, and the added tokens, special or not, with which the chat template ends an answer,
    such as ChatML's `<|im_end|>` (none without a template, or where a turn ends in words).
    """
    found = []
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    rendered = _render_answer(tokenizer)
    if _ANSWER in rendered:
        found += _closing_ids(tokenizer, rendered)
    return list(dict.fromkeys(found))


def _render_answer(tokenizer: Tokenizer) -> str:
    """A conversation that ends with `_ANSWER`; empty without a template that takes one."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    # Some templates want a system's turn.
    for system in ([], [{"role": "system", "content": "?"}]):
        if tokenizer.chat_template:
            with contextlib.suppress(UserError):
                return render(tokenizer, [*system, *turns])
    return ""


def _closing_ids(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """The added tokens behind the answer, without those that open the next turn."""
    asked = rendered.rindex(_ANSWER)
    answered = asked + len(_ANSWER)
    # Tokenised as a whole: some added tokens are found only behind a text, others only at its
    # start.
    ids, offsets = encode_batch(tokenizer, [rendered])[0]
    if offsets is None:
        ids, _ = encode_batch(tokenizer, [rendered[answered:].lstrip()])[0]
        offsets = [(len(rendered) - 1, len(rendered))] * len(ids)
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    added.discard(tokenizer.bos_token_id)
    tokens = [(id, *span) for id, span in zip(ids, offsets, strict=True)]
    behind = [token for token in tokens if token[1] >= answered]
    opening = [(id, end) for id, _, end in tokens if end < answered and id in added][-1:]
    # A token that opens a turn has the role behind it.
    named = [id for id, end in opening if rendered[end:asked].strip()]

    def run(tokens: Iterable[tuple[int, int, int]], known: set[int]) -> list[int]:
        said = itertools.dropwhile(lambda token: not rendered[token[1] : token[2]].strip(), tokens)
        return list(itertools.takewhile(known.__contains__, (id for id, *_ in said)))

    # A token that opens the next turn ends none. The first token ends this turn: if a role is given
    # in words, the end of the turn stands before it. The last resort is for words before the end.
    first, *more = run(behind, added) or [None]
    if first is None:
        return run(reversed(behind), added.difference(id for id, _ in opening))
    return [first, *itertools.takewhile(lambda id: id not in named, more)]
