"""A thousand requests of every kind: each must be answered as if it were alone.

    python -m experiments.load --requests 1000 --out experiments/results/load

Two Generators of a tiny model, one that switches adapters and one with a bank, get random calls: a
batch of prompts, or a stream, half of which are left in their middle. Lengths, adapters, sampling,
seeds and stop tokens are random, too. Alone, a request runs in a Generator with a batch of one and
only its own adapter. All programs are compiled first. Then the memory that the process holds is
noted after each tenth, to see whether it grows.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.flags import Flags, parse
from experiments.process import memory
from experiments.report import beside
from flora_jax.adapters import AdapterConfig, Tree, abstract_adapter
from flora_jax.analysis.results import about_process, header, table
from flora_jax.errors import check_writable, positive_integers, run_command
from flora_jax.files import write_json
from flora_jax.inference.generator import Generator
from flora_jax.inference.sampling import Sampling
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import init_base
from flora_jax.models.tokenizer import load_tokenizer

FLAGS: Flags = {
    "--requests": dict(type=int, default=1000),
    "--method": dict(default="ffba_qg_add"),
    "--seed": dict(type=int, default=0),
    "--out": dict(type=Path, help="write OUT.json and OUT.md"),
}
_LENGTH = 64
_RANKS = {"a": 16, "b": 8, "c": 16, "d": 8}
# Each has compiled programs of its own.
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.3, top_k=20),
)
_NEW_TOKENS = (4, 20)
_LENGTHS = (3, 30, 44)  # of the longest prompt of a call, each in another bucket


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt: its place in its call, and all that it asks for."""

    index: int
    prompt: tuple[int, ...]
    adapter: str | None
    new_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[int, ...]


class Models:
    """A base and adapters, the Generators under load, and those for requests alone."""

    def __init__(self, method: str):
        self.config = dataclasses.replace(LlamaConfig.preset("tiny"), eos_token_id=())
        base = init_base(jax.random.key(0), self.config)
        # Wider weights, so that the best token is clearly the best.
        self.base = jax.tree.map(lambda x: x * 8.0 if x.ndim > 2 else x, base)
        self.configs = {name: AdapterConfig(method, rank) for name, rank in _RANKS.items()}
        self.adapters = {name: self._adapter(i, name) for i, name in enumerate(_RANKS)}
        self.tokenizer = load_tokenizer("tiny")
        self.loaded = [self._generator(list(_RANKS), 4) for _ in range(2)]
        self.alone = {name: self._generator([name] if name else [], 1) for name in (None, *_RANKS)}

    def _adapter(self, seed: int, name: str) -> Tree:
        leaves, tree = jax.tree.flatten(abstract_adapter(self.config, self.configs[name]))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        return tree.unflatten(drawn)

    def _generator(self, names: list[str], batch_size: int) -> Generator:
        return Generator(
            self.config,
            self.base,
            {name: self.adapters[name] for name in names},
            {name: self.configs[name] for name in names},
            tokenizer=self.tokenizer,
            max_length=_LENGTH,
            batch_size=batch_size,
        )

    def lone(self, request: Request) -> Any:
        """The answer to the request alone."""
        before = [[1]] * request.index  # what a prompt draws depends on its place
        return self.alone[request.adapter].generate([*before, request.prompt], *_asked(request))[-1]


def _asked(request: Request) -> tuple[Any, ...]:
    return request.new_tokens, request.sampling, request.seed, request.stop


def draw(rng: random.Random, size: int) -> list[Request]:
    """The requests of one call. They differ only in prompt and adapter."""
    new_tokens = rng.choice(_NEW_TOKENS)
    sampling = rng.choice(SAMPLINGS)
    seed = rng.randrange(2**32)
    stop = tuple(rng.sample(range(256), rng.choice((0, 4))))
    longest = rng.choice(_LENGTHS)
    return [
        Request(
            i,
            tuple(rng.choices(range(256), k=rng.randint(1, longest))),
            rng.choice((None, *_RANKS)),
            new_tokens,
            sampling,
            seed,
            stop,
        )
        for i in range(size)
    ]


def calls(models: Models, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Makes random calls without end. Yields what became of the requests of each."""
    for i in itertools.count():
        rng = random.Random(f"load {seed} {i}")
        generator = rng.choice(models.loaded)
        is_bank = generator is models.loaded[1]
        if rng.random() < 0.6:
            yield [_stream(models, generator, rng)]
            continue
        requests = draw(rng, rng.randint(1, 9))
        if not is_bank:  # one adapter for all
            own = requests[0].adapter
            requests = [dataclasses.replace(one, adapter=own) for one in requests]
            generator.use(own)
        names = [one.adapter for one in requests] if is_bank else None
        prompts = [one.prompt for one in requests]
        answers = generator.generate(prompts, *_asked(requests[0]), adapter_names=names)
        pairs = zip(requests, answers, strict=True)
        yield [_judged("batch", one, models.lone(one) == answer) for one, answer in pairs]


def _stream(models: Models, generator: Generator, rng: random.Random) -> dict[str, Any]:
    """Reads a stream to its end, or leaves it after a few pieces."""
    (request,) = draw(rng, 1)
    generator.use(request.adapter)
    pieces = generator.stream(list(request.prompt), *_asked(request))
    owed = models.lone(request).text
    if rng.random() < 0.5:
        return _judged("stream", request, "".join(pieces) == owed)
    some = "".join(itertools.islice(pieces, rng.randint(0, 3)))
    pieces.close()
    return _judged("stream left", request, owed.startswith(some))


def _judged(kind: str, request: Request, equal: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind, "equal": equal}
    if not equal:
        found["request"] = repr(request)
    return found


def held() -> float:
    """MB that this process holds."""
    gc.collect()
    return memory("VmRSS") / 1e6


def compile_all(models: Models) -> None:
    """Compiles all that a request may need, since memory grows with each program."""
    for sampling, new_tokens, length in itertools.product(SAMPLINGS, _NEW_TOKENS, _LENGTHS):
        for name in models.alone:
            one = Request(0, (1,) * length, name, new_tokens, sampling, 0, ())
            models.lone(one)
            for generator in models.loaded:
                generator.use(name)
                generator.generate([one.prompt], *_asked(one))
                list(generator.stream(one.prompt, *_asked(one)))
        names = list(_RANKS)
        models.loaded[1].generate([one.prompt] * 4, *_asked(one), adapter_names=names)


def markdown(about: dict[str, Any], found: list[dict[str, Any]], memory: list[float]) -> str:
    """The table."""
    rows = []
    for kind in sorted({one["kind"] for one in found}):
        own = [one for one in found if one["kind"] == kind]
        rows.append([kind, f"{len(own):,}", str(sum(not one["equal"] for one in own))])
    growth = memory[-1] / memory[0] - 1
    lines = [
        header("Requests", about),
        *table(["kind", "requests", "other than alone"], rows),
        f"\nHeld after the first tenth {memory[0]:.0f} MB, at the end {memory[-1]:.0f} MB: "
        f"{growth:+.1%}; after each tenth {', '.join(f'{one:.0f}' for one in memory)}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command."""
    args = parse(argv, "python -m experiments.load", __doc__, FLAGS)
    positive_integers("--requests", str(args.requests))
    if args.out:
        check_writable(beside(args.out, ".json"), "--out")
    about = about_process()
    jax.config.update("jax_disable_most_optimizations", True)  # speed is not measured
    models = Models(args.method)
    compile_all(models)
    found: list[dict[str, Any]] = []
    memory: list[float] = []
    with tqdm(total=args.requests, unit="request", disable=None) as bar:
        for judged in calls(models, args.seed):
            found += judged
            bar.update(len(judged))
            for one in judged:
                if not one["equal"]:
                    print(f"{one['kind']}: {one['request']}", flush=True)
            if len(found) >= args.requests * (len(memory) + 1) / 10:
                memory.append(held())
            if len(found) >= args.requests:
                break
    text = markdown(about, found, memory)
    print(text)
    if args.out:
        result = {"provenance": about, "requests": found, "megabytes": memory}
        write_json(beside(args.out, ".json"), result)
        beside(args.out, ".md").write_text(text)


if __name__ == "__main__":
    run_command(main)
