"""Generator against transformers' own generate, against itself with other batches, and sampling in
closed form."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_adapter, spread

from flora_jax.adapters import AdapterConfig, fuse, init_adapter
from flora_jax.data.encode import encode_prompt
from flora_jax.data.tasks import Message
from flora_jax.errors import UserError
from flora_jax.inference import decoding as decoding_module
from flora_jax.inference import generator as generator_module
from flora_jax.inference.decoding import bucket
from flora_jax.inference.generator import Generator
from flora_jax.inference.sampling import Sampling, keep_top, sample
from flora_jax.models.config import LlamaConfig
from flora_jax.models.hf import to_hf_tensors
from flora_jax.models.llama import Llama, init_base
from flora_jax.models.loading import load_pretrained
from flora_jax.models.tokenizer import load_tokenizer
from flora_jax.tokens import ends

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def tiny():
    config = dataclasses.replace(LlamaConfig.preset("tiny"), eos_token_id=(), num_hidden_layers=1)
    return config, spread(init_base(jax.random.key(0), config))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, tokens):
    return model.apply(variables, tokens)


def naive(config, base, prompt, n, adapter=None, adapter_config=None):
    """Greedy continuation by whole forward passes, padded to one length so that it compiles
    once."""
    model = Llama(config, adapter_config)
    variables = {"params": base, **({"adapter": adapter} if adapter else {})}
    tokens = list(prompt)
    for _ in range(n):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(forward(model, variables, row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_transformers(prompts):
    """Two layers and an unembedding of its own; the other tests have tied ones."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    config = dataclasses.replace(
        LlamaConfig.preset("tiny"), eos_token_id=(), tie_word_embeddings=False
    )
    base = spread(init_base(jax.random.key(1), config))
    settings = config.to_hf()
    settings.pop("model_type")
    hf = LlamaForCausalLM(HFConfig(**settings)).eval()
    state = {name: torch.tensor(np.asarray(value)) for name, value in to_hf_tensors(config, base)}
    hf.load_state_dict(state, strict=True)
    ours = Generator(config, base, batch_size=8, max_length=128).generate(prompts, 24)
    for prompt, generation in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        reference = theirs.sequences[0, len(prompt) :].tolist()
        differs = [
            i for i, (a, b) in enumerate(zip(generation.tokens, reference, strict=True)) if a != b
        ]
        if differs:
            best = theirs.logits[differs[0]][0].topk(2).values
            assert best[0] - best[1] < 1e-3
        assert not generation.finished
    assert len({tuple(g.tokens) for g in ours}) == len(ours)  # the model tells the prompts apart


@pytest.mark.slow
def test_smollm2_equals_transformers():
    """Real weights: 64 tokens of five unequal prompts in one batch. Each is the best in
    transformers' logits after the same text, each prompt alone, which is what its greedy generate
    is; one whole forward pass shows all 64."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    config, base = load_pretrained("smollm2-135m-instruct")
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    hf = LlamaForCausalLM(HFConfig(**json.loads(json.dumps(config.to_hf())))).eval()
    state = {name: torch.tensor(value) for name, value in to_hf_tensors(config, base)}
    assert hf.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    hf.tie_weights()
    questions = [
        "Hi",
        "What is the capital of France?",
        "Count from 1 to 20.",
        "Tell me about the sea. " * 5,
        "Why?",
    ]
    prompts = [encode_prompt([Message("user", q)], tokenizer, "chat") for q in questions]
    assert len({len(prompt) for prompt in prompts}) >= 4
    ours = Generator(config, base, tokenizer=tokenizer, max_length=256, batch_size=5).generate(
        prompts, 64
    )
    lengths, ties = [], 0
    for prompt, generation in zip(prompts, ours, strict=True):
        # ours leaves the stop token out
        found = [*generation.tokens, *config.eos_token_id[: generation.finished]]
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        for row, token in zip(logits, found, strict=True):
            if row.argmax() != token:
                best = row.topk(2)
                assert token == best.indices[1] and best.values[0] - best.values[1] < 1e-3, (
                    generation.text
                )
                ties += 1
        lengths.append(len(found))
    assert max(lengths) == 64 and ties <= 1


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "ffba",
        "zflora",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("fpa", "ffba_qg_add")),
    ],
)
def test_rows_equal_whole_forward_passes_with_an_adapter(prompts, method):
    """What is served fused gives the tokens of the split model, over two layers, since zflora's
    channels cross them."""
    config = dataclasses.replace(LlamaConfig.preset("tiny"), eos_token_id=())
    base = spread(init_base(jax.random.key(0), config))
    adapter_config = AdapterConfig(method, rank=8)
    adapter = random_adapter(config, adapter_config, 3)
    generator = Generator(config, base, {"a": adapter}, adapter_config, max_length=64, batch_size=8)
    found = [g.tokens for g in generator.generate(prompts[:3], 6)]
    assert found == [naive(config, base, p, 6, adapter, adapter_config) for p in prompts[:3]]
    generator.use(None)
    bare = [g.tokens for g in generator.generate(prompts[:3], 6)]
    assert bare == [naive(config, base, p, 6) for p in prompts[:3]]
    assert bare != found


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_k=40, top_p=0.8)])
def test_result_does_not_depend_on_batch_size(tiny, prompts, sampling):
    config, base = tiny
    prompts = [prompt[:16] for prompt in prompts]
    together, alone = (
        Generator(config, base, max_length=128, batch_size=b).generate(
            prompts, 12, sampling, seed=5
        )
        for b in (8, 1)
    )
    assert together == alone
    if sampling.temperature:
        other = Generator(config, base, max_length=128, batch_size=8).generate(
            prompts, 12, sampling, seed=6
        )
        assert other != together
        twins = Generator(config, base, max_length=128, batch_size=8).generate(
            [prompts[0]] * 2, 12, sampling
        )
        assert twins[0] != twins[1]


def test_stop_tokens_end_a_row_and_are_left_out(tiny, prompts):
    config, base = tiny
    generator = Generator(config, base, max_length=128, batch_size=8)
    free = generator.generate(prompts, 12)
    stop = free[0].tokens[4]
    for before, after in zip(free, generator.generate(prompts, 12, stop=[stop]), strict=True):
        n = before.tokens.index(stop) if stop in before.tokens else 12
        assert after.tokens == before.tokens[:n]
        assert after.finished == (n < 12)
    eos = dataclasses.replace(config, eos_token_id=(stop,))
    assert Generator(eos, base, max_length=128, batch_size=8).generate(
        prompts, 12
    ) == generator.generate(prompts, 12, stop=[stop])


def test_the_templates_end_of_turn_ends_a_row(tiny):
    """What chat training teaches is the template's own end, whatever the tokenizer's eos."""
    config, base = tiny
    tokenizer = load_tokenizer("tiny")
    [row] = Generator(config, base, max_length=64).generate([[1, 2]], 6)
    ended = tokenizer.backend_tokenizer.id_to_token(row.tokens[3])
    tokenizer.backend_tokenizer.add_special_tokens([ended])  # among the template's special tokens
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + '" + ended + "\\n' }}{% endfor %}"
    )
    assert row.tokens[3] not in row.tokens[:3] and ends(tokenizer) == [257, row.tokens[3]]
    [cut] = Generator(config, base, tokenizer=tokenizer, max_length=64).generate([[1, 2]], 6)
    assert cut.tokens == row.tokens[:3] and cut.finished


def test_compilations(tiny, prompts):
    """One prefill a bucket and one decode a cache length, whatever max_new_tokens, stops, seed or
    adapter."""
    config, base = tiny
    # a model of its own, so that nothing is compiled yet
    config = dataclasses.replace(config, rms_norm_eps=2e-5)
    adapter_config = AdapterConfig("ffba", rank=8)
    adapters = {name: random_adapter(config, adapter_config, i) for i, name in enumerate("ab")}
    generator = Generator(config, base, adapters, adapter_config, max_length=128, batch_size=4)

    def sizes():
        return (decoding_module.prefill._cache_size(), decoding_module.decode._cache_size())

    start = sizes()
    first = generator.generate(prompts[:1], 5)
    assert sizes() == (start[0] + 1, start[1] + 1)
    generator.generate(prompts[:1] * 3, 7, seed=3, stop=[1, 2])
    generator.use("b")
    assert generator.generate(prompts[:1], 5) != first
    generator.use("a")
    assert generator.generate(prompts[:1], 5) == first
    assert sizes() == (start[0] + 1, start[1] + 1)
    generator.generate(prompts[1:2], 5)  # 21 tokens: the next bucket
    assert sizes() == (start[0] + 2, start[1] + 2)


def test_decode_holds_no_weights_and_no_second_cache():
    """The compiled loop: weights come as arguments, and the cache is updated in the memory it came
    in. Attention reorders the keys and values of the layer at hand, one of four."""
    config = dataclasses.replace(LlamaConfig.preset("tiny"), num_hidden_layers=4)
    base = init_base(jax.random.key(0), config)
    params = fuse(base, None, config, None)
    cache = decoding_module.KVCache.empty(config, 4, 1024)
    keys = jax.random.split(jax.random.key(0), 4)
    stop, rows = jnp.zeros(8, jnp.int32), jnp.zeros(4, bool)
    logits = jnp.zeros((4, config.vocab_size))
    state = jax.eval_shape(
        lambda: decoding_module.begin(logits, cache, rows, stop, keys, Sampling())
    )
    compiled = decoding_module.decode.lower(
        Llama(config), params, state, jnp.int32(9), stop, keys
    ).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.k, cache.v)))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    assert memory.argument_size_in_bytes >= weights
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    assert memory.generated_code_size_in_bytes < weights


def test_text_prompts_and_ids_agree(tiny):
    config, base = tiny
    tokenizer = load_tokenizer("random")
    generator = Generator(config, base, tokenizer=tokenizer, max_length=64, batch_size=8)
    text, ids = "ab: éa", list("ab: éa".encode())
    assert generator.generate([text], 12) == generator.generate([ids], 12)
    [generation] = generator.generate([text], 12)
    assert generation.text == tokenizer.decode(generation.tokens, skip_special_tokens=True)
    # 257 is the byte tokenizer's end of text, which this model's configuration does not name.
    assert 257 not in generation.tokens


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, top_k=30)])
def test_stream_gives_the_text_of_generate(tiny, sampling):
    config, base = tiny
    generator = Generator(
        config, base, tokenizer=load_tokenizer("random"), max_length=64, batch_size=1
    )
    [whole] = generator.generate(["ab: éa"], 20, sampling, seed=3)
    pieces = list(generator.stream("ab: éa", 20, sampling, seed=3))
    assert "".join(pieces) == whole.text and all(pieces)
    stop = [whole.tokens[5]]
    [short] = generator.generate(["ab: éa"], 20, sampling, seed=3, stop=stop)
    assert "".join(generator.stream("ab: éa", 20, sampling, seed=3, stop=stop)) == short.text
    with pytest.raises(UserError, match="no tokenizer"):
        next(Generator(config, base, max_length=64).stream([1], 4))


def test_a_stream_keeps_its_adapter(tiny):
    """Whatever was generated before with another one; and it stops where that one is written over
    it."""
    config, base = tiny
    ffba, tokenizer = AdapterConfig("ffba", rank=8), load_tokenizer("tiny")
    adapters = {
        name: random_adapter(config, ffba, seed, 0.3) for seed, name in enumerate(("a", "b"), 5)
    }
    generator = Generator(config, base, adapters, ffba, tokenizer, max_length=64)
    sampling = Sampling(1.0)
    [alone] = generator.generate(["ab"], 20, sampling)
    [other] = generator.generate(["ab"], 20, sampling, adapter_names=["b"])
    assert "".join(generator.stream("ab", 20, sampling)) == alone.text != other.text
    pieces = generator.stream("ab", 20, sampling)
    next(pieces)
    generator.use("b")
    with pytest.raises(UserError, match="switched while a stream"):
        list(pieces)


def test_bad_input(tiny):
    config, base = tiny
    generator = Generator(config, base, max_length=32)
    for prompts, n, words in [
        ([[1] * 30], 5, ("30 tokens", "max_length=32", "max_new_tokens=5")),
        ([[]], 5, ("prompt 0 is empty",)),
        ([[1], [320]], 5, ("prompt 1", "320")),
        (["text"], 5, ("no tokenizer",)),
        ([[1]], 0, ("max_new_tokens=0",)),
        ([[1]], 3.0, ("max_new_tokens=3.0",)),
        ([[1, 2.5]], 5, ("prompt 0", "2.5")),
        ("hello", 5, ("prompts must be a list",)),
        ([1, 2, 3], 5, ("prompts must be a list",)),
        (None, 5, ("prompts must be a list", "None")),
    ]:
        with pytest.raises(UserError) as error:
            generator.generate(prompts, n)
        assert all(word in str(error.value) for word in words), error.value
    assert len(generator.generate([[1] * 27], 5)[0].tokens) == 5  # exactly max_length
    with pytest.raises(UserError, match="max_position_embeddings=2048"):
        Generator(config, base, max_length=4096)
    # One layer's key and value of 32 channels in 4 bytes are 256 bytes a slot.
    with pytest.raises(
        UserError, match=r"batch_size=1000000000 with 32 tokens a row needs a cache of 8192.0 GB"
    ):
        Generator(config, base, max_length=32, batch_size=10**9)
    for name in ("x", 1):
        with pytest.raises(UserError, match=f"{name!r} is not loaded"):
            generator.use(name)
    # One-shot iterables, arrays and numbers of other libraries are what they hold.
    [plain] = generator.generate([[1, 2]], 3, stop=[7], seed=3)
    for prompts in (
        iter([[1, 2]]),
        [np.array([1, 2])],
        jnp.array([[1, 2]]),
        [(np.int64(1), jnp.int32(2))],
    ):
        assert generator.generate(prompts, np.int64(3), stop=iter([7]), seed=jnp.int32(3)) == [
            plain
        ]
    assert Generator(config, base, max_length=np.int64(32)).generate(
        [[1, 2]], 3, stop=[7], seed=3
    ) == [plain]
    [stopped] = generator.generate([[1, 2]], 3, stop=iter(plain.tokens[:1]))
    assert stopped.tokens == [] and stopped.finished
    small = dataclasses.replace(config, vocab_size=200)
    text = Generator(
        small, init_base(jax.random.key(0), small), tokenizer=load_tokenizer("tiny"), max_length=32
    )
    # the first byte of its first character
    with pytest.raises(UserError, match="prompt 0 has token id 230, outside"):
        text.generate(["日"], 2)
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(0.9)) == Sampling(0.5, 3, 0.9)
    for arguments, words in [
        ({"stop": ["\n"]}, "must be token ids below the model's vocab_size"),
        ({"stop": 2**40}, "must be token ids"),
        ({"stop": [-5]}, "must be token ids"),
        ({"seed": 2**32}, "integer from 0 to"),
        ({"seed": -1}, "integer from 0 to"),
        ({"adapter_names": [["a"]]}, "is not loaded"),
        ({"sampling": 0.7}, "sampling=0.7 must be a Sampling"),
    ]:
        with pytest.raises(UserError, match=words):
            generator.generate([[1]], 5, **arguments)
    ffba = AdapterConfig("ffba", rank=8)
    adapter = init_adapter(jax.random.key(0), config, ffba)
    for arguments, words in [
        ({"adapter_config": ffba}, "without adapters"),
        ({"adapters": [adapter]}, "trees by name"),
        (
            {"adapters": {"a": adapter}, "adapter_config": load_tokenizer("tiny")},
            "must be an AdapterConfig",
        ),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"max_length": None}, "max_length=None"),
    ]:
        with pytest.raises(UserError, match=words):
            Generator(config, base, **arguments)
    with pytest.raises(UserError, match="prompt 0 holds half a character"):
        text.generate(["a\udce9"], 2)
    with pytest.raises(UserError, match="adapter leaf"):
        Generator(
            config,
            base,
            {"a": init_adapter(jax.random.key(0), config, ffba)},
            AdapterConfig("ffba", rank=16),
        )
    for bad in [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": "0.7"},
    ]:
        with pytest.raises(UserError, match=next(iter(bad))):
            Sampling(**bad)


def test_the_cache_is_as_long_as_max_length_needs(tiny, monkeypatch):
    """A prompt whose bucket would leave the new tokens no room is padded to less; the text is the
    same."""
    config, base = tiny
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, 20).tolist()
    slots, grow = [], generator_module.grow
    monkeypatch.setattr(
        generator_module, "grow", lambda cache, n: slots.append(n) or grow(cache, n)
    )
    generator = Generator(config, base, max_length=30, batch_size=1)
    assert generator.generate([prompt], 5)[0].tokens == naive(config, base, prompt, 5)
    assert slots == [32]  # the prompt's bucket alone


def test_bucket():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]))

    def kept(k, p):
        return np.isfinite(keep_top(logits, k, p)).tolist()

    assert kept(2, 1.0) == [[False, True, False, True], [True, False, True, False]]
    assert kept(0, 0.65) == [[False, True, False, True], [True, False, False, False]]  # .4 + .3; .7
    # .4 + .3 + .2; .7 + .15
    assert kept(0, 0.71) == [[False, True, True, True], [True, False, True, False]]
    # After top-k 2 the first row's best token has 4/7, so it is a nucleus of 0.5 by itself.
    assert kept(2, 0.5) == [[False, True, False, False], [True, False, False, False]]
    assert kept(9, 1.0) == [[True] * 4] * 2


def test_sample_draws_the_tempered_distribution():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = sample(keys, jnp.broadcast_to(logits, (20000, 4)), Sampling(temperature=2.0, top_k=3))
    expected = np.sqrt([0.0, 0.4, 0.2, 0.3])
    found = np.bincount(np.asarray(drawn), minlength=4) / 20000
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.015)
    assert sample(keys[:1], logits[None], Sampling()).tolist() == [1]
    # 0 in float32, or nearly
    for cold in (Sampling(1e-39), Sampling(1e-38, top_p=0.9), Sampling(1e-46, top_p=0.9)):
        assert set(sample(keys[:99], jnp.broadcast_to(logits, (99, 4)), cold).tolist()) == {1}
