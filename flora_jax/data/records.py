"""Records as files hold them: read, checked, and turned into the layout of their kind."""

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

    place is `file:line` or names the index. Raises UserError for what is no UTF-8 or no JSON.
    """
    check_file(path)
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    text = _text(path.read_bytes(), path, 0)
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
        # Bytes are split at newlines alone: JSON strings may hold what else ends a line of text.
        for number, line in enumerate(file, 1):
            text = _text(line, path, start)
            start += len(line)
            if text.strip():
                yield f"{path}:{number}", _json(text, path, number)


def _text(content: bytes, path: Path, start: int) -> str:
    """What stands in a file from byte `start` on."""
    try:
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {start + error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON at column {error.colno}: {error.msg}") from None
    # a number of thousands of digits, thousands of brackets
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{line}: JSON that cannot be read: {str(error)[:80]}") from None


def _field(
    raw: Mapping[str, Any], name: str, where: str, default: str | None = None, number: bool = False
) -> str:
    """A text field, checked. `default` makes it optional and lets it be empty."""
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

    Raw MAWPS (`original_text`, `ans`), HellaSwag's layouts and GSM8K's own become one.
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
    """GSM8K's own layout, whose `answer` has its number after ####, as an LLM-Adapters record."""
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
    """HellaSwag's own layouts as the LLM-Adapters record, whose wording this is."""
    if "activity_label" in raw:
        context = _field(raw, "ctx", where)
        endings = _strings(raw, "endings", where)
        raw = hellaswag({**raw, "context": context, "endings": endings})
    context = _field(raw, "activity_and_ctx", where)
    endings = _strings(raw, "endings", where)
    with told_of(where):
        return compose_ending(context, endings, raw.get("label"))


_TEXTS = ("dialogue", "document", "article")
_ANSWERS = ("summary", "highlights", "summary1", "summary2", "summary3")


def _texts(raw: Mapping[str, Any], where: str) -> Record | list[Record]:
    """A text with the texts that answer it: DialogSum and SAMSum (`dialogue`), XSum (`document`),
    CNN/DailyMail (`article`, `highlights`), DailyDialog++ (`context`, `positive_responses`),
    MultiWOZ (`turns`: each of the system's answers the conversation before it)."""
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
    answers = [field for field in _ANSWERS if field in raw]
    require(
        answers,
        f"{where}: the record has neither 'summary', 'summary1' nor 'highlights' beside {kind!r}",
    )
    text, *references = (_untagged(_field(raw, field, where)) for field in (kind, *answers))
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
    return "\n".join(f"{'AB'[i % 2]}: {turn.strip()}" for i, turn in enumerate(turns))


def _untagged(text: str) -> str:
    """`<t> a . </t> <t> b . </t>`, CNN/DailyMail's marks of sentences, as one sentence a line."""
    return re.sub(r"\s*</t>\s*<t>\s*", "\n", text).replace("<t>", "").replace("</t>", "").strip()


def _conversation(raw: Mapping[str, Any], where: str) -> Record:
    """`{"prompt", "completion"}` or `{"messages": [{"role", "content"}, …]}` as messages.

    They end with the assistant's.
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
            f"{where}: 'messages' begins with {named} turn; the first after 'system' is a user's"
        )


# What chat templates read of a turn beside its role and content.
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
# By which a record says of its turns whether they count in the loss: OpenAI's name, axolotl's two.
_TRAINED = ("weight", "train", "training")
# axolotl's names for parts of a turn that count, of which the loss mask here knows none.
_PARTS = ("train_detail", "training_detail")
# The fields of a conversation that are read.
CONVERSATION = ("messages", "prompt", "completion", "tools", *_TRAINED, *_PARTS)


def _turn(turn: Any, place: str) -> Record:
    """One message, as `Turn` has it."""
    require(
        isinstance(turn, dict),
        f"{place} must be an object with 'role' and 'content', not {type(turn).__name__}",
    )
    role = _field(turn, "role", place)
    require_known(role, ROLES, f"{place}: role {role!r}")
    more = {name: turn[name] for name in _MORE if turn.get(name)}
    if "tool_calls" in more:
        _objects(more["tool_calls"], f"{place}: field 'tool_calls'")
    calls = role == "assistant" and "tool_calls" in more
    if calls and turn.get("content") is None:
        content = ""
        more["content"] = None
    else:
        content = _field(turn, "content", place, default="" if calls or role == "tool" else None)
    return {
        "role": role,
        "content": content,
        "trained": role != "assistant" or _trained(turn, place),
        "more": _json_text(more, place) if more else "",
    }


def _trained(turn: Mapping[str, Any], place: str) -> bool:
    """Whether an assistant's turn, or a record, counts in the loss: unless it says otherwise."""
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
    """The field `tools`, a list of objects or the JSON text of one, as JSON text; may be empty."""
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
    _objects(tools, place)
    return _json_text(tools, place)


def _json_text(value: Any, place: str) -> str:
    """A value as JSON. Raises UserError for what JSON has no form for (a table's dates, bytes)."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"{place}: {error}; use text, numbers, lists and objects") from None
    check_text(text, place)
    return text


def _objects(value: Any, place: str) -> None:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{place} must be a list of objects, not {value!r:.60}")


# By a task's source: what makes a Record, or several, of a raw one and its place. Raises UserError.
CONVERT = {"records": _adapters_record, "texts": _texts, "jsonl": _conversation}
