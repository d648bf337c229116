"""Reads the records of a file, checks each, and turns it into the layout of its task's source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_jax.data.catalogue import compose_ending, hellaswag
from flora_jax.data.tasks import ROLES
from flora_jax.errors import UserError, check_text, require, require_known, told_of
from flora_jax.files import check_file

Record = dict[str, Any]


def raw_records(path: Path) -> Iterator[tuple[str, Any]]:
    """`(place, value)` of each record of a `.json` list or a `.jsonl` file.

    place: `file:line`, or the file and the record's index. Raises UserError for a file that is not
    UTF-8 or not JSON.
    """
    check_file(path)
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    text = _decoded(path.read_bytes(), path, 0)
    if text.strip():
        values = _json(text, path, 1)
        require(
            isinstance(values, list),
            f"{path}: the file must hold a JSON list of records, not {type(values).__name__}",
        )
        for i, value in enumerate(values):
            yield f"{path}: record {i} (from 0)", value


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """`raw_records` of a `.jsonl` file, a line at a time."""
    start = 0
    with path.open("rb") as file:
        # Bytes are split at newlines only: JSON strings may hold other ends of a line of text.
        for number, line in enumerate(file, 1):
            text = _decoded(line, path, start)
            start += len(line)
            if text.strip():
                yield f"{path}:{number}", _json(text, path, number)


def _decoded(content: bytes, path: Path, start: int) -> str:
    """The text of a file's bytes from byte `start` on."""
    try:
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {start + error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def _json(text: str, path: Path, line: int) -> Any:
    """The value of a JSON text that begins at `line`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON at column {error.colno}: {error.msg}") from None
    # A number of thousands of digits is a ValueError, thousands of brackets a RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{line}: JSON that cannot be read: {str(error)[:80]}") from None


def _field(
    raw: Mapping[str, Any], name: str, where: str, default: str | None = None, number: bool = False
) -> str:
    """A text field, checked; with `default` it may be missing or empty, with `number` a number."""
    if name not in raw:
        if default is not None:
            return default
        raise UserError(
            f"{where}: field {name!r} is missing; there are {', '.join(map(repr, raw)) or 'none'}"
        )
    value = raw[name]
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {name!r} is {type(value).__name__} {value!r:.40}; it must be a string"
        )
    check_text(value, f"{where}: field {name!r}")
    require(
        default is not None or value.strip(), f"{where}: field {name!r} is empty; it needs text"
    )
    return value


def _adapters_record(raw: Mapping[str, Any], where: str) -> Record:
    """An LLM-Adapters record.

    MAWPS's own layout (`original_text`, `ans`), HellaSwag's and GSM8K's become one.
    """
    if "original_text" in raw:
        return {
            "instruction": _field(raw, "original_text", where),
            "input": "",
            "output": "",
            "answer": _field(raw, "ans", where, number=True),
        }
    if "endings" in raw:
        return _hellaswag(raw, where)
    if "question" in raw and "instruction" not in raw:
        return _gsm8k(raw, where)
    return {
        "instruction": _field(raw, "instruction", where),
        "input": _field(raw, "input", where, default=""),
        "output": _field(raw, "output", where, default=""),
        "answer": _field(raw, "answer", where, number=True),
    }


def _gsm8k(raw: Mapping[str, Any], where: str) -> Record:
    """GSM8K's own layout, whose `answer` ends in #### and the number, as an LLM-Adapters record."""
    question = _field(raw, "question", where)
    rationale, mark, answer = _field(raw, "answer", where).rpartition("####")
    require(mark, f"{where}: field 'answer' has no '####' before its final number")
    rationale = re.sub(r"<<.*?>>", "", rationale).strip()
    number = answer.strip().replace(",", "")
    return {
        "instruction": question,
        "input": "",
        "output": f"{rationale}\nThe answer is {number}.".strip(),
        "answer": answer.strip(),
    }


def _hellaswag(raw: Mapping[str, Any], where: str) -> Record:
    """HellaSwag's own layouts as an LLM-Adapters record."""
    if "activity_label" in raw:
        context = _field(raw, "ctx", where)
        endings = _strings(raw, "endings", where)
        raw = hellaswag({**raw, "context": context, "endings": endings})
    context = _field(raw, "activity_and_ctx", where)
    endings = _strings(raw, "endings", where)
    with told_of(where):
        return compose_ending(context, endings, raw.get("label"))


_TEXTS = ("dialogue", "document", "article")
_SUMMARIES = ("summary", "highlights", "summary1", "summary2", "summary3")


def _texts_record(raw: Mapping[str, Any], where: str) -> Record | list[Record]:
    """A text and the texts that answer it.

    The layouts are those of DialogSum and SAMSum (`dialogue`), XSum (`document`), CNN/DailyMail
    (`article`, `highlights`), DailyDialog++ (`context`, `positive_responses`) and MultiWOZ
    (`turns`; each turn of the system answers the conversation before it).
    """
    if "context" in raw:
        references = _strings(raw, "positive_responses", where)
        return {"text": _spoken(_strings(raw, "context", where)), "references": references}
    if "turns" in raw:
        turns = [" ".join(turn.split()) for turn in _strings(raw, "turns", where)]
        return [
            {"text": _spoken(turns[:i]), "references": [turns[i]]} for i in range(1, len(turns), 2)
        ]
    kind = next((field for field in _TEXTS if field in raw), None)
    if kind is None:
        known = ", ".join([*_TEXTS, "context", "turns"])
        raise UserError(
            f"{where}: the record has none of the fields {known}; "
            f"there are {', '.join(map(repr, raw))}"
        )
    summaries = [field for field in _SUMMARIES if field in raw]
    require(
        summaries,
        f"{where}: the record has neither 'summary', 'summary1' nor 'highlights' beside {kind!r}",
    )
    text, *references = (_untagged(_field(raw, field, where)) for field in (kind, *summaries))
    return {"text": text, "references": references}


def _strings(raw: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A field that is a list of texts, checked."""
    value = raw.get(name)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(v, str) and v.strip() for v in value)
    ):
        raise UserError(f"{where}: field {name!r} must be a list of texts, not {value!r:.60}")
    for text in value:
        check_text(text, f"{where}: field {name!r}")
    return value


def _spoken(turns: Sequence[str]) -> str:
    """The turns of two speakers, A and B, one a line."""
    return "\n".join(f"{'AB'[i % 2]}: {turn.strip()}" for i, turn in enumerate(turns))


def _untagged(text: str) -> str:
    """CNN/DailyMail's `<t> a . </t> <t> b . </t>` as one sentence a line."""
    return re.sub(r"\s*</t>\s*<t>\s*", "\n", text).replace("<t>", "").replace("</t>", "").strip()


def _conversation(raw: Mapping[str, Any], where: str) -> Record:
    """Messages that end with the assistant's, and tools.

    raw: `{"messages": [{"role", "content"}, …], "tools"}` or `{"prompt", "completion"}`.
    """
    require(
        _trained(raw, where),
        f"{where}: the record is not trained on (it has weight 0, or train false); leave it out",
    )
    if "messages" in raw:
        return {"messages": _messages(raw, where), "tools": _tools(raw, where)}
    if "prompt" not in raw and "completion" not in raw:
        raise UserError(
            f"{where}: a record needs 'messages', or 'prompt' and 'completion'; "
            f"there are {', '.join(map(repr, raw)) or 'no fields'}"
        )
    messages = [
        {"role": role, "content": _field(raw, name, where), "trained": True, "more": ""}
        for role, name in (("user", "prompt"), ("assistant", "completion"))
    ]
    return {"messages": messages, "tools": ""}


def _messages(raw: Mapping[str, Any], where: str) -> list[Record]:
    """The turns of a conversation. Raises UserError where none is to be trained on."""
    turns = raw["messages"]
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f"{where}: field 'messages' must be a list of at least one message, not {turns!r:.40}"
        )
    messages = [_turn(turn, f"{where}: messages[{i}]") for i, turn in enumerate(turns)]
    _check_roles([message["role"] for message in messages], where)
    require(
        any(message["trained"] for message in messages if message["role"] == "assistant"),
        f"{where}: no turn of the assistant is trained on (each has weight 0, or train false); "
        "leave the record out, or give one of them weight 1",
    )
    return messages


def _check_roles(roles: Sequence[str], where: str) -> None:
    """Raises UserError unless a user begins and the assistant ends."""
    require(
        roles[-1] == "assistant",
        f"{where}: 'messages' ends with role {roles[-1]!r}; the last turn must be the assistant's",
    )
    require(
        "user" in roles,
        f"{where}: 'messages' has no turn with role 'user'; the assistant must answer one",
    )
    first = next(role for role in roles if role != "system")
    if first != "user":
        named = {"tool": "a tool's", "assistant": "the assistant's"}[first]
        raise UserError(
            f"{where}: 'messages' begins with {named} turn; after 'system' a user must speak first"
        )


# What chat templates read of a turn besides role and content.
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
# Whether a turn counts in the loss: OpenAI's name for it, and axolotl's two.
_TRAINED = ("weight", "train", "training")
# Which parts of a turn count: axolotl's names. The loss mask here takes whole turns only.
_PARTS = ("train_detail", "training_detail")
# The fields of a conversation that are read.
CONVERSATION = ("messages", "prompt", "completion", "tools", *_TRAINED, *_PARTS)


def _turn(turn: Any, place: str) -> Record:
    """One message, with the fields of `tasks.Turn`."""
    require(
        isinstance(turn, dict),
        f"{place} must be an object with 'role' and 'content', not {type(turn).__name__}",
    )
    role = _field(turn, "role", place)
    require_known(role, ROLES, f"{place}: role {role!r}")
    more = {name: turn[name] for name in _MORE if turn.get(name)}
    if "tool_calls" in more:
        _check_objects(more["tool_calls"], f"{place}: field 'tool_calls'")
    calls = role == "assistant" and "tool_calls" in more
    if calls and turn.get("content") is None:
        content = ""
        more["content"] = None
    elif calls or role == "tool":
        content = _field(turn, "content", place, default="")
    else:
        content = _field(turn, "content", place)
    return {
        "role": role,
        "content": content,
        "trained": role != "assistant" or _trained(turn, place),
        "more": _json_text(more, place) if more else "",
    }


def _trained(turn: Mapping[str, Any], place: str) -> bool:
    """Whether an assistant's turn, or a record, counts in the loss: it does if it says nothing."""
    for name in _PARTS:
        require(
            not turn.get(name),
            f"{place}: field {name!r} is not supported: a turn counts as a whole or not at "
            "all; leave it out, or give the turn a 'weight' of 0 or 1",
        )
    said = {name: turn[name] for name in _TRAINED if turn.get(name) is not None}
    for name, value in said.items():
        require(
            isinstance(value, int | float) and value in (0, 1),
            f"{place}: field {name!r} is {value!r:.40}; it must be 0 or 1, or false or true",
        )
    if len({bool(value) for value in said.values()}) > 1:
        named = ", ".join(f"{name!r} is {value!r}" for name, value in said.items())
        raise UserError(f"{place}: {named}; they must say the same")
    return all(said.values())


def _tools(raw: Mapping[str, Any], where: str) -> str:
    """The field `tools`, a list of objects or its JSON text, as JSON text; empty without tools."""
    tools = raw.get("tools")
    place = f"{where}: field 'tools'"
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError(
                f"{place} is text that is no JSON ({tools!r:.40}); it must be a list of objects"
            ) from None
    if not tools:
        return ""
    _check_objects(tools, place)
    return _json_text(tools, place)


def _json_text(value: Any, place: str) -> str:
    """A value as JSON. Raises UserError for what JSON cannot hold (a table's dates, bytes)."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"{place}: {error}; use text, numbers, lists and objects") from None
    check_text(text, place)
    return text


def _check_objects(value: Any, place: str) -> None:
    """Raises UserError unless `value` is a list of objects."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{place} must be a list of objects, not {value!r:.60}")


# A task's source -> what makes a Record, or a list of them, of a raw record and its place. Raises
# UserError.
CONVERT = {"records": _adapters_record, "texts": _texts_record, "jsonl": _conversation}
