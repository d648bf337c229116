"""Conversations as text, and token ids where a text begins and where a turn ends."""

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

# What a chat template is given by transformers and by us.
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
# What Llama 3's chat template names as today where it is given nothing: with any other date, the
# same data and the same prompt would change every day.
DATE = "26 Jul 2024"


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 of all that decides which ids a text or a conversation has.

    None for a tokenizer that is written in Python, whose code it would take.
    """
    if not tokenizer.is_fast:
        return None
    import jinja2
    import tokenizers
    import transformers

    tokenizer("")  # a call sets padding and truncation, which the backend holds, too
    versions = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    split = tokenizer.split_special_tokens  # what the backend does not hold: set anew at each call
    about = repr((*versions, type(tokenizer).__name__, special, tokenizer.chat_template, split))
    return hashlib.sha256(f"{about}\n{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()


def encode_open(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text that goes on: with what the tokenizer puts before it alone.

    That is bos, by the tokenizer's own rule, but no second one before that of a rendered chat. What
    some put behind a text (`add_eos_token`) is left out.
    """
    return encode_open_batch(tokenizer, [text], add_special_tokens)[0]


def encode_open_batch(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """`encode_open` of each text."""
    bos = tokenizer.bos_token or "\0"
    special = [add_special_tokens and not text.startswith(bos) for text in texts]
    closing = _count_closing(tokenizer) if any(special) else 0
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
    return mask[::-1].index(0) if 0 in mask else 0


def encode_cut(
    tokenizer: Tokenizer,
    text: str,
    cuts: Sequence[int],
    encoding: Encoding | None = None,
) -> list[list[int]]:
    """The ids of `text`, nothing added, in `len(cuts) + 1` pieces that end at the characters
    `cuts`.

    `cuts` are ascending. The pieces up to a cut are the ids of the text up to it, as generation is
    given them. Where tokens end at a cut, as they do in nearly every chat template, the pieces
    together are the ids of the whole text. Where a token would run across it, the text behind the
    cut is tokenised apart. encoding: of the whole text, where it is known.
    """
    return _cut(tokenizer, text, cuts, encoding or encode_batch(tokenizer, [text])[0], inside=False)


# ids, and the characters that each stands for
Encoding = tuple[list[int], list[tuple[int, int]] | None]


def encode_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """The ids of each text, nothing added, and the characters `(start, stop)` of each id.

    None for the latter where the tokenizer cannot tell: one that is written in Python.
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
    offsets = found["offset_mapping"] if tokenizer.is_fast else itertools.repeat(None)
    return list(zip(found["input_ids"], offsets, strict=False))


def _cut(
    tokenizer: Tokenizer,
    text: str,
    cuts: Sequence[int],
    encoding: Encoding,
    inside: bool,
) -> list[list[int]]:
    """`encode_cut`; inside: of a text that stands behind another."""
    ids, offsets = encoding
    stops = []
    for i, cut in enumerate(cuts):
        k = _ids_before(text, cut, offsets)
        if k is None:
            # The ids of the text up to here alone tell.
            start = text[:cut]
            before = (
                _encode_inside(tokenizer, start) if inside else encode_batch(tokenizer, [start])[0]
            )
            k = len(before[0])
            if ids[:k] != before[0]:
                behind, rest = text[cut:], [later - cut for later in cuts[i + 1 :]]
                return [
                    *_cut(tokenizer, start, cuts[:i], before, inside),
                    *_cut(tokenizer, behind, rest, _encode_inside(tokenizer, behind), inside=True),
                ]
        stops.append(k)
    return [ids[start:stop] for start, stop in itertools.pairwise([0, *stops, len(ids)])]


def _ids_before(text: str, cut: int, offsets: list[tuple[int, int]] | None) -> int | None:
    """How many ids stand for the characters before `cut`; None where the offsets do not tell.

    They may leave out spaces, or hold those beside an added token.
    """
    k = bisect.bisect_left(offsets or [], (cut,))
    if k == 0 or offsets[k - 1][1] != cut or (k < len(offsets) and offsets[k][0] != cut):
        return None
    # GPT-2's split, `\s+(?!\S)`, takes the last of several spaces apart only where text follows.
    spaced = offsets[k - 1][0] == cut - 1 and text[cut - 2 : cut].isspace()
    return None if spaced else k


def _encode_inside(tokenizer: Tokenizer, text: str) -> Encoding:
    """The ids and offsets of a text that stands behind another.

    They are without the space that SentencePiece puts before one that begins.
    """
    (line, _), (alone, _), (behind, _) = encode_batch(tokenizer, ["\n", "a", "\na"])
    if behind[len(line) :] != alone:
        ids, offsets = encode_batch(tokenizer, [f"\n{text}"])[0]
        if ids[: len(line)] == line:
            spans = offsets and [(start - 1, stop - 1) for start, stop in offsets[len(line) :]]
            return ids[len(line) :], spans
    return encode_batch(tokenizer, [text])[0]


def render(tokenizer: Tokenizer, conversation: Sequence[Mapping[str, Any]], **how: Any) -> str:
    """The conversation, `{"role", "content"}` by turn, as the tokenizer's chat template has it.

    Raises UserError where the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            list(conversation), tokenize=False, date_string=DATE, **how
        )
    # a template is a program, which may raise anything at what is not for it
    except Exception as error:
        roles = ", ".join(str(turn.get("role")) for turn in conversation)
        raise UserError(
            f"the tokenizer's chat template refuses a conversation of roles {roles}: {error}"
        ) from None


def set_template_arguments(tokenizer: Tokenizer, text: str) -> None:
    """Has the tokenizer's chat template see `NAME=VALUE,…` wherever it is used, saved or exported,
    such as `enable_thinking=false`, which Qwen3's asks for.

    A value is JSON, or else a text. The template itself then begins by setting them, so that the
    tokenizer says by itself how it was used. Raises UserError for what is no such list, without a
    template, and for a name that the template does not read.
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
    # A template knows JSON's words but for null.
    given = (
        f"{{%- set {name} = {'none' if value is None else json.dumps(value)} -%}}"
        for name, value in arguments.items()
    )
    tokenizer.chat_template = "".join([*given, template])


def without_generation(template: str) -> str:
    """The template without transformers' own statement, which jinja does not know."""
    return _GENERATION.sub("", template)


def _arguments_of(template: str) -> set[str]:
    """The names that a template reads and a caller may set. Raises UserError for one that is no
    Jinja."""
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(without_generation(template))
        read = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:  # a filter that is unknown, too
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
    """The tokens by which a model says that it is done.

    They are eos, and the added ones, special or not, that the chat template ends an answer with,
    such as ChatML's `<|im_end|>` (none without a template, or where a turn ends in words).
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rendered = _render_answer(tokenizer)
    closing = _closing_ids(tokenizer, rendered) if _ANSWER in rendered else []
    return list(dict.fromkeys([*eos, *closing]))


def _render_answer(tokenizer: Tokenizer) -> str:
    """A conversation that ends with `_ANSWER`; empty without a template that takes one."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    # some templates ask for a system's turn
    for system in ([], [{"role": "system", "content": "?"}]):
        if tokenizer.chat_template:
            with contextlib.suppress(UserError):
                return render(tokenizer, [*system, *turns])
    return ""


def _closing_ids(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """The added tokens behind the answer, but for those that open the next turn."""
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
    # by the role behind it
    named = [id for id, end in opening if rendered[end:asked].strip()]

    def run(tokens: Iterable[tuple[int, int, int]], known: set[int]) -> list[int]:
        said = itertools.dropwhile(lambda token: not rendered[token[1] : token[2]].strip(), tokens)
        return list(itertools.takewhile(known.__contains__, (id for id, *_ in said)))

    # What opens the next turn ends none. The first token does: a role in words has that of the turn
    # before in front. The last resort is for words before the end.
    first, *more = run(behind, added) or [None]
    if first is None:
        return run(reversed(behind), added.difference(id for id, _ in opening))
    return [first, *itertools.takewhile(lambda id: id not in named, more)]
