"""Greedy text of many prompts, in rounds, so that the few long answers do not hold up the many
short ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flora_jax.inference.generator import Generation, Generator

FIRST_ROUND = 64  # tokens; each later round doubles what there is


def generate_in_rounds(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ended: Callable[[int, str], bool] = lambda i, text: False,
) -> list[Generation]:
    """What `generator.generate(prompts, max_new_tokens)` gives, up to rounding: in bfloat16 two
    tokens that are about as likely may change places.

    A batch of the compiled loop runs until its last row ends, with a cache as long as that row may
    become. Here a prompt that has ended, at a stop token or because `ended(i, its new text)` says
    so, is not in the next round; the others go on from what they have said, which is read again as
    part of their prompt. Prompts are token ids; raises UserError where `generate` does.
    """
    out = [Generation("", [], False)] * len(prompts)
    going = list(range(len(prompts)))
    done = 0
    while going and done < max_new_tokens:
        n = min(max(done, FIRST_ROUND), max_new_tokens - done)
        said = generator.generate([[*prompts[i], *out[i].tokens] for i in going], n)
        for i, new in zip(going, said, strict=True):
            out[i] = generator.generation(out[i].tokens + new.tokens, new.finished) if done else new
        going = [i for i in going if not (out[i].finished or ended(i, out[i].text))]
        done += n
    return out
