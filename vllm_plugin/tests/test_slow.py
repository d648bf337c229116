"""What takes minutes: SmolLM2 in float32 and bfloat16; bases that are no plain Llama; every method
compiled and on two ranks; fewer heads of keys than ranks.

    FLORA_VLLM_EXPORTS=exports python -m pytest vllm_plugin/tests -m slow

make_slow_exports.py writes exports/slow, make_exports.py the rest.
"""

import pytest
from conftest import (
    BACKEND,
    METHODS,
    bank_settings,
    check,
    expected,
    generate,
    mixed,
    on_ranks,
    rows,
    settings,
    wanted,
)

pytestmark = pytest.mark.slow

# How far logprobs may lie from those of our model, which computes in float32 throughout.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}
SMOLLM2 = [
    *(("float32", name) for name in ("pf_lora", "fpa", "ffba", "ffba_qd_add", "zflora")),
    *(("bfloat16", name) for name in ("pf_lora", "ffba", "zflora")),
]
ARCHITECTURES = ["qwen2", "qwen3", "mistral", "smollm3", "granite"]
IN_BANK = ["ffba_0", "base", "ffba_1", "ffba_2"]


@pytest.mark.parametrize("way", ["plugin", "backend"])
@pytest.mark.parametrize("dtype, name", SMOLLM2)
def test_smollm2(slow_exports, dtype, name, way):
    import vllm

    more = BACKEND if way == "backend" else {}
    llm = vllm.LLM(**settings(slow_exports / dtype / name, **{**more, "dtype": dtype}))
    owed = expected(slow_exports / dtype)[name]
    check(generate(llm, wanted(owed)), rows(owed), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_bank_of_smollm2(slow_exports, dtype):
    import vllm

    llm = vllm.LLM(**bank_settings(slow_exports / dtype, "ffba_0", 2, dtype=dtype))
    asked, owed = mixed(slow_exports / dtype / "bank", IN_BANK)
    check(generate(llm, asked), owed, TOLERANCE[dtype])


@pytest.mark.parametrize("way", ["plugin", "backend"])
@pytest.mark.parametrize("name", ["ffba", "zflora"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_architecture(slow_exports, model_type, name, way):
    import vllm

    llm = vllm.LLM(
        **settings(slow_exports / model_type / name, **(BACKEND if way == "backend" else {}))
    )
    owed = expected(slow_exports / model_type)[name]
    check(generate(llm, wanted(owed)), rows(owed))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_bank_over_each_architecture(slow_exports, model_type):
    """Over the base as transformers knows it, by its own model_type."""
    import vllm

    llm = vllm.LLM(**bank_settings(slow_exports / model_type, "ffba_0", 2))
    asked, owed = mixed(slow_exports / model_type / "bank", IN_BANK)
    check(generate(llm, asked), owed)


def test_each_architecture_on_two_ranks(slow_exports):
    engines, owed = [], []
    for model_type in ARCHITECTURES:
        own, answers = cases(slow_exports / model_type, ["zflora"])
        engines += own
        owed += answers
    for own, right in zip(on_ranks(engines, tensor_parallel_size=2), owed, strict=True):
        check(own, right)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ffba", "zflora")])
def test_every_method_compiled(exports, name):
    import vllm

    owed = expected(exports)[name]
    llm = vllm.LLM(**settings(exports / name, enforce_eager=False))
    check(generate(llm, wanted(owed)), rows(owed))


def cases(exports, names):
    """For `on_ranks`: exports and a bank of ffba, and what is owed."""
    owed = expected(exports)
    asked, answers = mixed(exports / "bank", IN_BANK)
    engines = [[settings(exports / name), wanted(owed[name])] for name in names]
    engines.append([bank_settings(exports, "ffba_0", 2), asked])
    return engines, [*(rows(owed[name]) for name in names), answers]


def test_every_method_on_two_ranks(exports):
    engines, owed = cases(exports, METHODS)
    for own, right in zip(on_ranks(engines, tensor_parallel_size=2), owed, strict=True):
        check(own, right)


def test_fewer_heads_of_keys_than_ranks(slow_exports):
    engines, owed = cases(slow_exports / "heads", ["ffba", "ffba_qd_add", "zflora"])
    for own, right in zip(on_ranks(engines, tensor_parallel_size=2), owed, strict=True):
        check(own, right)


def test_processes_of_vllm(exports):
    """Two ranks as its server starts them."""
    engines, owed = cases(exports, ["ffba", "zflora"])
    found = on_ranks(engines, launched=False, tensor_parallel_size=2)
    for own, right in zip(found, owed, strict=True):
        check(own, right)
