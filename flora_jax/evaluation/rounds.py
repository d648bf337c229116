"""Greedy text of many prompts in rounds, so that a few long answers do not delay the short ones."""

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
    """`generator.generate(prompts, max_new_tokens)`, computed in rounds.

    A batch of the compiled loop runs until its last row ends, with a cache as long as that row may
    become. Here a prompt that has ended, at a stop token or because `ended(i, its new text)` is
    true, is left out of the next round. The others go on: the new tokens so far are read again as
    part of the prompt. The result is the same up to rounding: in bfloat16, two tokens that are
    about as likely may change places. prompts: token ids. Raises as `generate` does.
    """
    out = [Generation("", [], False)] * len(prompts)
    going = list(range(len(prompts)))
    done = 0
    while going and done < max_new_tokens:
        n = min(max(done, FIRST_ROUND), max_new_tokens - done)
        said = generator.generate([[*prompts[i], *out[i].tokens] for i in going], n)
        for i, new in zip(going, said, strict=True):
            if done:
                new = generator.generation(out[i].tokens + new.tokens, new.finished)
            out[i] = new
        going = [i for i in going if not (out[i].finished or ended(i, out[i].text))]
        done += n
    return out
