"""Continues a prompt; the text, and nothing else, goes to stdout.

python -m flora_jax.generate --model smollm2-135m-instruct --chat --prompt "What is 2 + 3?" --max_new_tokens 32
"""

from __future__ import annotations

from flora_jax.errors import CommandParser, UserError, check_text, path_flag, run_command
from flora_jax.files import keep_programs
from flora_jax.models.config import DTYPES


def _parser() -> CommandParser:
    parser = CommandParser(prog="flora_jax.generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="HF directory, hub id, .gguf file or preset name"
    )
    parser.add_argument("--adapter", type=path_flag, help="adapter directory")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--max_length", type=int, default=1024, help="tokens of prompt and answer together"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the best token")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    return parser


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv[1:])
    # After the arguments are read: these imports take seconds.
    from flora_jax.data.encode import encode_prompt
    from flora_jax.data.tasks import Message
    from flora_jax.inference.generator import Generator
    from flora_jax.inference.sampling import Sampling
    from flora_jax.interop.adapter_files import load_adapted

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} must be a positive integer")
    if not args.prompt:
        raise UserError("--prompt is empty; it needs some text")
    check_text(args.prompt, "--prompt")
    if args.temperature == 0 and (args.top_k, args.top_p) != (0, 1.0):
        raise UserError("--top_k and --top_p need a --temperature above 0, which samples at all")
    keep_programs()
    model = load_adapted(args.model, args.adapter, args.dtype)
    adapters = {"adapter": model.adapter} if model.adapter is not None else None
    style = "chat" if args.chat else "plain"
    prompt = encode_prompt([Message("user", args.prompt)], model.tokenizer, style)
    generator = Generator(
        model.config,
        model.base,
        adapters,
        model.adapter_config,
        model.tokenizer,
        args.max_length,
        batch_size=1,
    )
    if args.stream:
        for piece in generator.stream(prompt, args.max_new_tokens, sampling, args.seed):
            print(piece, end="", flush=True)
        print()
        return
    [generation] = generator.generate([prompt], args.max_new_tokens, sampling, args.seed)
    print(generation.text)


if __name__ == "__main__":
    run_command(main)
