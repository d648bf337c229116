"""Log-likelihoods of continuations, for multiple-choice questions scored as the lm-eval harness
scores them.

All continuations of one context are in one row behind it, and a mask keeps them from seeing each
other. So the context is computed once, whatever the number of choices:

    tokens     c0 c1 c2 | a0 a1 | b0 b1 b2    context c, continuations a (3 tokens) and b (4)
    positions   0  1  2 |  3  4 |  3  4  5    the last token of each predicts nothing: left out
    group       0  0  0 |  1  1 |  2  2  2    a token sees its own group and group 0, causally

Only the hidden states that predict a token of a continuation are multiplied by the unembedding, a
chunk at a time. B rows, T tokens, D model width, V vocabulary, C chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from flora_jax.adapters import Tree
from flora_jax.errors import NOT_FINITE, require
from flora_jax.models.adapted import Adapted
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama
from flora_jax.tokens import Tokenizer, encode_open

# By question and choice: token ids of context and continuation.
Pairs = Sequence[Sequence[tuple[list[int], list[int]]]]

_ROW_MULTIPLE = 32  # rows are padded to a multiple of this, so that few lengths are compiled
_CHUNK = 256  # hidden states scored at a time: 256 * V float32 logits exist at once
_PADDING = -1  # the group of padding


@dataclasses.dataclass(frozen=True)
class _Row:
    """A context with its continuations; owners: the question and choice of each continuation."""

    context: list[int]
    continuations: list[list[int]]
    owners: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


def choice_loglik(
    adapted: Adapted, requests: Sequence[Sequence[tuple[str, str]]], batch_size: int = 16
) -> list[list[float]]:
    """Summed log-likelihood of each continuation after its context.

    `requests[i][j]` is `(context, continuation)` of choice j of question i, and the result has the
    same shape. A pair is tokenised as the harness does it: context and continuation together, cut
    where the context alone would end, with spaces at the end of the context moved to the
    continuation, and special tokens only where the tokenizer adds them. Arithmetic is in the base's
    dtype, log-softmax in float32. Raises UserError for a continuation without tokens or a pair
    beyond max_position_embeddings.
    """
    encoded = encode_pairs(adapted.config, adapted.tokenizer, requests)
    return [[loglik for loglik, _ in pairs] for pairs in token_loglik(adapted, encoded, batch_size)]


def token_loglik(
    adapted: Adapted,
    requests: Pairs,
    batch_size: int = 16,
    describe: Callable[[int], str] = "question {}".format,
) -> list[list[tuple[float, bool]]]:
    """`choice_loglik` of pairs of token ids, neither side empty: `(log-likelihood, is_greedy)`.

    is_greedy: whether every token of the continuation is the most likely one at its place. Pairs of
    one question that share a context are computed in one row. The last token of a pair is never
    read, so a pair may have max_position_embeddings + 1 tokens; the caller checks that it has no
    more. Raises FloatingPointError, which names the question by `describe(index)`, for logits that
    are not finite.
    """
    require(batch_size >= 1, f"batch_size={batch_size} must be a positive integer")
    model = adapted.model
    variables = adapted.variables
    rows = _rows(requests)
    # The longest first: memory runs out at once or never.
    rows.sort(key=lambda row: row.length, reverse=True)
    out = [[(0.0, False)] * len(pairs) for pairs in requests]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    quiet = len(batches) < 2 or not sys.stderr.isatty()
    for batch in tqdm(batches, desc="log-likelihood", disable=quiet):
        for (question, choice), score in _score(model, variables, batch, batch_size):
            if not math.isfinite(score[0]):
                raise FloatingPointError(
                    f"{describe(question)}, choice {choice}: the logits are not finite, nor is its "
                    f"score; {NOT_FINITE}"
                )
            out[question][choice] = score
    return out


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of the context, and of the continuation as it is tokenised behind it.

    An empty context becomes the tokenizer's bos (or eos) token. Raises UserError where it has
    neither.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        alone = encode_open(tokenizer, stripped)
        return alone, encode_open(tokenizer, stripped + continuation)[len(alone) :]
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    require(
        start is not None,
        "an empty context needs a tokenizer with a bos or eos token to start from",
    )
    return [start], tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]


def encode_pairs(
    config: LlamaConfig,
    tokenizer: Tokenizer,
    requests: Sequence[Sequence[tuple[str, str]]],
) -> Pairs:
    """The token ids of each pair of `choice_loglik`, for `token_loglik`.

    Raises UserError for a pair that cannot be scored.
    """
    encoded = []
    for question, texts in enumerate(requests):
        pairs = []
        for context, continuation in texts:
            before, after = encode_pair(tokenizer, context, continuation)
            length = len(before) + len(after)
            require(
                after,
                f"question {question}: continuation {continuation!r} has no tokens of its own",
            )
            require(
                length <= config.max_position_embeddings,
                f"question {question}: context and continuation have {length} tokens, more "
                f"than the model's max_position_embeddings={config.max_position_embeddings}",
            )
            pairs.append((before, after))
        encoded.append(pairs)
    return encoded


def _rows(requests: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[_Row]:
    """One row for each distinct context of each question."""
    rows = []
    for question, pairs in enumerate(requests):
        by_context: dict[tuple[int, ...], _Row] = {}
        for choice, (before, after) in enumerate(pairs):
            row = by_context.setdefault(tuple(before), _Row(before, [], []))
            row.continuations.append(after)
            row.owners.append((question, choice))
        rows += by_context.values()
    return rows


def _score(
    model: Llama, variables: Tree, batch: list[_Row], batch_size: int
) -> list[tuple[tuple[int, int], tuple[float, bool]]]:
    """`(owner, (log-likelihood, is_greedy))` of every continuation; a smaller batch is filled up to
    `batch_size` rows."""
    T = -(-max(row.length for row in batch) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    tokens = np.zeros((batch_size, T), np.int32)
    positions = np.zeros_like(tokens)
    groups = np.full_like(tokens, _PADDING)
    # (row, place, next token) of each hidden state that predicts a token of a continuation.
    scored = []
    spans = []  # (owner, start, stop) in `scored`
    for b, row in enumerate(batch):
        n = end = len(row.context)
        tokens[b, :n] = row.context
        positions[b, :n] = np.arange(n)
        groups[b, :n] = 0
        continuations = zip(row.continuations, row.owners, strict=True)
        for group, (continuation, owner) in enumerate(continuations, 1):
            read = len(continuation) - 1
            own = slice(end, end + read)
            tokens[b, own] = continuation[:-1]
            positions[b, own] = np.arange(n, n + read)
            groups[b, own] = group
            spans.append((owner, len(scored), len(scored) + len(continuation)))
            places = [n - 1, *range(end, end + read)]
            scored += [(b, place, token) for place, token in zip(places, continuation, strict=True)]
            end += read
    hidden = _hidden(model, variables, tokens, positions, groups)
    where = np.zeros((-(-len(scored) // _CHUNK) * _CHUNK, 3), np.int32)
    where[: len(scored)] = scored
    chunks = [
        _next_tokens(model, variables, hidden, chunk)
        for chunk in np.split(where, len(where) // _CHUNK)
    ]
    values, best = map(np.concatenate, zip(*jax.device_get(chunks), strict=True))
    values = values.astype(np.float64)
    return [(owner, (float(values[i:j].sum()), bool(best[i:j].all()))) for owner, i, j in spans]


@functools.partial(jax.jit, static_argnames="model")
def _hidden(
    model: Llama, variables: Tree, tokens: jax.Array, positions: jax.Array, groups: jax.Array
) -> jax.Array:
    """Hidden states `[B, T, D]`; a token sees the tokens before it in its own group and group 0."""
    mask = (groups[:, None, :] == groups[:, :, None]) | (groups[:, None, :] == 0)
    return model.apply(variables, tokens, positions=positions, mask=mask, method="hidden")[0]


@functools.partial(jax.jit, static_argnames="model")
def _next_tokens(
    model: Llama, variables: Tree, hidden: jax.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p `[C]`, float32, of the next tokens, and whether each is the most likely one, `[C]`.

    where `[C, 3]`: row and place of a hidden state, and the next token. log p is NaN where a logit
    is not finite.
    """
    rows, places, targets = where.T
    unembedding = model.apply(variables, method="unembedding").astype(hidden.dtype)
    logits = jnp.einsum(
        "CD,VD->CV", hidden[rows, places], unembedding, preferred_element_type=jnp.float32
    )
    loglik = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    loglik = jnp.where(jnp.isfinite(logits).all(axis=-1), loglik, jnp.nan)
    return loglik, jnp.argmax(logits, axis=-1) == targets
