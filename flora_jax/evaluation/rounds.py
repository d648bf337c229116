"""Greedy text of many prompts, in rounds, so that the few long answers do not hold up the many short ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from flora_jax.inference.generator import Generation, Generator

_FIRST_ROUND = 64  # tokens; each later round doubles what there is


def generate_in_rounds(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ended: Callable[[int, list[int]], bool] = lambda i, tokens: False,
) -> list[Generation]:
    """What `generator.generate(prompts, max_new_tokens)` gives, in the order given, but for what `ended` cuts off.

    A batch of the compiled loop runs until its last row ends, with a cache as long as that row may become. Here a
    prompt that has ended, at a stop token or because `ended(i, its new tokens)` says so, is not in the next round; the
    others go on from what they have said, which is read again as part of their prompt.
    """
    out: list[Generation] = [Generation("", [], False)] * len(prompts)
    going, done = list(range(len(prompts))), 0
    while going and done < max_new_tokens:
        n = min(max(done, _FIRST_ROUND), max_new_tokens - done)
        said = generator.generate([[*prompts[i], *out[i].tokens] for i in going], n)
        for i, new in zip(going, said, strict=True):
            if done:
                tokens = out[i].tokens + new.tokens
                new = Generation(generator.tokenizer.decode(tokens, skip_special_tokens=True), tokens, new.finished)
            out[i] = dataclasses.replace(new, finished=new.finished or ended(i, new.tokens))
        going, done = [i for i in going if not out[i].finished], done + n
    return out
