"""Continues a prompt; the text, and nothing else, goes to stdout.

python -m flora_jax.generate --model smollm2-135m-instruct --chat --prompt "What is 2 + 3?"
"""

from __future__ import annotations

import argparse

from flora_jax.commands import (
    DTYPE,
    MODEL,
    QUANTIZATION,
    asked_model,
    check_positive,
    check_template,
    read_flags,
)
from flora_jax.errors import check_text, require, run_command
from flora_jax.files import keep_programs

FLAGS = {
    **MODEL,
    "prompt": dict(required=True),
    "chat": dict(action="store_true", help="put the prompt into the model's chat template"),
    "max_new_tokens": dict(type=int, default=128),
    "max_length": dict(type=int, default=1024, help="tokens of prompt and answer together"),
    "temperature": dict(type=float, default=0.0, help="0: always the best token"),
    "top_k": dict(type=int, default=0, help="0: all tokens"),
    "top_p": dict(type=float, default=1.0),
    "seed": dict(type=int, default=0),
    "stream": dict(action="store_true", help="print the text as it comes"),
    **DTYPE,
    **QUANTIZATION,
}


def main(argv: list[str]) -> None:
    """The command."""
    args = read_flags("flora_jax.generate", __doc__, FLAGS, argv)
    # After the arguments are read: these imports take seconds.
    from flora_jax.data.encode import encode_prompt
    from flora_jax.data.tasks import Message
    from flora_jax.inference.generator import Generator
    from flora_jax.inference.sampling import Sampling
    from flora_jax.interop.adapter_files import load_adapted

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    _check(args)
    keep_programs()
    model = load_adapted(*asked_model(args))
    style = "plain"
    if args.chat:
        style = "chat"
    prompt = encode_prompt([Message("user", args.prompt)], model.tokenizer, style)
    generator = Generator.of(model, args.max_length, batch_size=1)
    if args.stream:
        for piece in generator.stream(prompt, args.max_new_tokens, sampling, args.seed):
            print(piece, end="", flush=True)
        print()
        return
    [generation] = generator.generate([prompt], args.max_new_tokens, sampling, args.seed)
    print(generation.text)


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "max_new_tokens")
    require(args.prompt, "--prompt is empty; it needs some text")
    check_text(args.prompt, "--prompt")
    check_template(args, args.chat, "--chat")
    require(
        args.temperature != 0 or (args.top_k, args.top_p) == (0, 1.0),
        "--top_k and --top_p need a --temperature above 0, which samples at all",
    )


if __name__ == "__main__":
    run_command(main)
