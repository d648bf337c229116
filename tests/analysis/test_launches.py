"""The GPU launch plan: what is read out of a compiled step, on text whose counts are known; the
command; and, where the extra `gpu-plan` or `gpu-plan-cuda13` is installed, real compilations held
to what the methods promise."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from support import PLANS, largest

from experiments.gpu_cells import LOOP_IN_GRAPH
from flora_jax import AdapterConfig, Llama, LlamaConfig, fuse, init_adapter, launches
from flora_jax.adapters import Scaled
from flora_jax.analysis import compilers, launch_plan
from flora_jax.analysis.targets import TARGETS
from flora_jax.errors import UserError, run_command
from flora_jax.inference.decoding import begin, decode
from flora_jax.inference.sampling import Sampling
from flora_jax.models import attention
from flora_jax.models.decode_product import Behind, Columns, Gated, Term, decode_product
from flora_jax.models.llama import KVCache, abstract_base
from flora_jax.training.step import TrainState, make_train_step

# x [8, 64] times W [64, 128]: a pad of W, a copy of the cache, an update of the cache in place, and
# a slice read.
HLO = """HloModule jit_step

%fused_pad (param_0.1: bf16[64,128]) -> bf16[128,128] {
  %param_0.1 = bf16[64,128]{1,0} parameter(0)
  %zero.1 = bf16[] constant(0)
  ROOT %pad.1 = bf16[128,128]{1,0} pad(%param_0.1, %zero.1), padding=0_64x0_0
}

%fused_update (param_0.2: bf16[8,32,64], param_1.2: bf16[8,64], param_2.2: s32[]) -> bf16[8,32,64] {
  %param_0.2 = bf16[8,32,64]{2,1,0} parameter(0)
  %param_1.2 = bf16[8,64]{1,0} parameter(1)
  %bitcast.2 = bf16[8,1,64]{2,1,0} bitcast(%param_1.2)
  %zero.2 = s32[] constant(0)
  %param_2.2 = s32[] parameter(2)
  ROOT %update.2 = bf16[8,32,64]{2,1,0} dynamic-update-slice(\
%param_0.2, %bitcast.2, %zero.2, %param_2.2, %zero.2)
}

%fused_slice (param_0.3: f32[8,128]) -> (f32[8,64], /*index=1*/bf16[8,64]) {
  %param_0.3 = f32[8,128]{1,0} parameter(0)
  %slice.3 = f32[8,64]{1,0} slice(%param_0.3), slice={[0:8], [0:64]}
  %convert.3 = bf16[8,64]{1,0} convert(%slice.3)
  ROOT %tuple.3 = (f32[8,64]{1,0}, bf16[8,64]{1,0}) tuple(%slice.3, %convert.3)
}

ENTRY %main.9 (params__w.1: bf16[64,128], x.1: bf16[8,128], cache_k.1: bf16[8,32,64], i.1: s32[]) \
-> bf16[8,32,64] {
  %params__w.1 = bf16[64,128]{1,0} parameter(0), metadata={op_name="params['w']"}
  %x.1 = bf16[8,128]{1,0} parameter(1)
  %cache_k.1 = bf16[8,32,64]{2,1,0} parameter(2)
  %i.1 = s32[] parameter(3)
  %wide = bf16[128,128]{1,0} fusion(%params__w.1), kind=kLoop, calls=%fused_pad
  %call = (f32[8,128]{1,0}, s8[4194304]{0}) custom-call(%x.1, %wide), \
custom_call_target="__cublas$lt$matmul"
  %y = f32[8,128]{1,0} get-tuple-element(%call), index=0
  %parts = (f32[8,64]{1,0}, bf16[8,64]{1,0}) fusion(%y), kind=kLoop, calls=%fused_slice
  %part = bf16[8,64]{1,0} get-tuple-element(%parts), index=1
  %again = bf16[8,32,64]{2,1,0} copy(%cache_k.1)
  %new = bf16[8,64]{1,0} bitcast(%part)
  ROOT %grown = bf16[8,32,64]{2,1,0} fusion(%again, %new, %i.1), kind=kLoop, calls=%fused_update
}
"""
SEQUENCE = """001: kCustomKernel   [source | next=002 (1)] fused_pad grid: [1, 1, 1]
002: kCublasLtMatmul [prev=001 (1) | next=003 (1)] kCublasLtMatmul
003: kCustomKernel   [prev=002 (1) | sink] fused_slice grid: [1, 1, 1]
004: kWhile          [source | sink]
  condition:
    005: kCustomKernel [source | sink] less
  body:
    006: kCopy         [source | sink] kCopy
007: kCustomKernel   [prev=004 (1) | sink] fused_update grid: [1, 1, 1]
"""
NAMES = {1: "wide", 2: "call", 3: "parts", 5: "less", 6: "again", 7: "grown"}
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {i}\n'
    "  }\n}\n"
    for i, name in NAMES.items()
)

planner = pytest.mark.skipif(not PLANS, reason="needs the extra gpu-plan or gpu-plan-cuda13")


def test_parse_hlo():
    computations, entry = launch_plan.parse_hlo(HLO)
    assert entry == "main.9" and list(computations) == [
        "fused_pad",
        "fused_update",
        "fused_slice",
        "main.9",
    ]
    call = computations[entry]["call"]
    assert (call.opcode, call.operands, call.sizes) == (
        "custom-call",
        ("x.1", "wide"),
        (4096, 4194304),
    )
    grown = computations[entry]["grown"]
    assert (grown.opcode, grown.calls, grown.bytes, grown.root) == (
        "fusion",
        "fused_update",
        8 * 32 * 64 * 2,
        True,
    )
    assert computations["fused_update"]["param_2.2"].operands == ("2",)


def test_parse_launches_counts_leaves_alone():
    found = launch_plan.parse_launches(SEQUENCE, METADATA)
    assert found == [
        ("kCustomKernel", "wide"),
        ("kCublasLtMatmul", "call"),
        ("kCustomKernel", "parts"),
        ("kCustomKernel", "less"),
        ("kCopy", "again"),
        ("kCustomKernel", "grown"),
    ]


def test_longest_chain():
    computations, entry = launch_plan.parse_hlo(HLO)
    launched = dict.fromkeys(("wide", "call", "parts", "again", "grown"), 1)
    # wide, call, parts, grown; again beside them
    assert launch_plan.longest_chain(computations[entry], launched) == 4
    assert launch_plan.longest_chain(computations[entry], launched | {"again": 7}) == 8


def test_moved_bytes():
    computations, entry = launch_plan.parse_hlo(HLO)
    body = computations[entry]
    moved = {
        name: launch_plan.moved_bytes(body[name], body, computations)
        for name in NAMES.values()
        if name in body
    }
    assert moved == {
        "wide": 64 * 128 * 2 + 128 * 128 * 2,
        "call": 8 * 128 * 2 + 128 * 128 * 2 + 8 * 128 * 4,  # without the workspace
        "parts": 8 * 64 * 4 + 8 * 64 * 4 + 8 * 64 * 2,  # of 128 columns, 64
        "again": 2 * 8 * 32 * 64 * 2,
        "grown": 8 * 64 * 2 + 8 * 64 * 2 + 4,  # the update and its index, not the cache
    }


@pytest.mark.parametrize(
    "threshold, weights, cache",
    [
        (128 * 128 * 2, ["pad bf16[128,128]{1,0}"], ["copy bf16[8,32,64]{2,1,0}"]),
        (128 * 128 * 2 + 1, [], []),
    ],
)
def test_large_copies(threshold, weights, cache):
    computations, entry = launch_plan.parse_hlo(HLO)
    launched = ["wide", "call", "parts", "again", "grown"]
    found = launch_plan.large_copies(computations, entry, launched, ["call"], threshold)
    assert found == {"weights": weights, "cache": cache, "activations": []}


def test_a_product_spelt_out_is_a_large_copy():
    text = HLO.replace(
        "pad(%param_0.1, %zero.1), padding=0_64x0_0", "multiply(%param_0.1, %param_0.1)"
    )
    computations, entry = launch_plan.parse_hlo(text)
    found = launch_plan.large_copies(computations, entry, ["wide", "call"], ["call"], 30000)
    assert found["weights"] == ["multiply bf16[128,128]{1,0}"]


def test_model_of_time():
    # 3.3 GB at 3.3 TB/s is a millisecond; 250 launches at 2 µs are half of one.
    assert launch_plan.modelled_ms(3.3e9, 250, 3.3e12, 2.0) == pytest.approx(1.5)


def run(*flags):
    with pytest.raises(SystemExit) as end:
        run_command(launches.main, ["launches", *flags])
    return end.value.code


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--targets", "h10"], "--targets 'h10' is unknown; did you mean 'h100'"),
        (["--modes", "cudnn"], "--modes 'cudnn' is unknown"),
        (["--methods", "base,lorra"], "method 'lorra' is unknown here; did you mean"),
        (["--preset", "llama3.2-2b"], "preset 'llama3.2-2b' is unknown; did you mean"),
        (["--batch_sizes", "1,0"], "--batch_sizes '0' must be a positive integer"),
        (["--cache_length", "-5"], "--cache_length '-5' must be a positive integer"),
        (["--methods", "ffba", "--rank", "7"], "rank"),
        (
            ["--methods", "lora", "--adapters", "1,4"],
            "lora cannot hold a bank of 4 adapters; pf_lora,",
        ),
        (["--launch_us", "nan"], "--launch_us nan must be zero or more"),
        (["--dtype", "float8"], "--dtype"),
        (["--decode_kernels", "cudnn"], "--decode_kernels"),
        (["--decode_kernels", "layer", "--methods", "base,lora"], "lora has its products apart"),
        (["--decode_kernels", "layer", "--batch_sizes", "1,32"], "takes up to 16 rows, not 32"),
        (
            ["--decode_kernels", "layer", "--targets", "h100,a100", "--quantization", "fp8"],
            "--decode_kernels layer reads fp8 on a GPU from Ada on",
        ),
    ],
)
def test_bad_input_is_one_line(flags, line, capsys, monkeypatch):
    monkeypatch.setattr(compilers, "require_compiler", lambda: None)
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--methods", "base", "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "pip install -e '.[gpu-plan]'" in error and "'.[gpu-plan-cuda13]'" in error
    assert not os.path.exists(tmp_path / "out")


def test_rows_and_table(monkeypatch, tmp_path, capsys):
    """From counts at two depths to a row: 10 + 4 L launches a step, one weight copy a layer."""

    def plan_step(name, config, adapter_config, **settings):
        assert settings["row_multiple"] == 128
        L = config.num_hidden_layers
        copies = {"weights": ["pad"] * L, "cache": [], "activations": ["copy"]}
        return launch_plan.Plan(
            10 + 4 * L, 2 * L + 1, 3, 8 + 3 * L, 1000 * L + 500, copies, 7000000, 1, 10 + 4 * L
        )

    monkeypatch.setattr(launch_plan, "plan_step", plan_step)
    monkeypatch.setattr(compilers, "require_compiler", lambda: None)
    launches.main(
        [
            "launches",
            "--preset",
            "llama3.2-1b",
            "--methods",
            "base,lora",
            "--targets",
            "h100",
            "--modes",
            "cublas",
            "--batch_sizes",
            "8",
            "--launch_us",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "launches.json").read_text())
    about = result["provenance"]
    assert about["command"].startswith("python -m flora_jax.launches --preset") and str(
        tmp_path
    ) not in str(about)
    assert {"jax", "jaxlib", "flax"} <= about["versions"].keys()
    assert result["schema_version"] == 1 and result["smallest_kernel"] == 2048 * 512 * 2
    assert [row["label"] for row in result["rows"]] == ["base", "lora", "lora, dot merger off"]
    row = result["rows"][0]
    assert row["layer"] == {
        "launches": 4,
        "gemms": 2,
        "products": 0,
        "chain": 3,
        "moved": 1000,
        "weight_copies": 1,
        "cache_copies": 0,
        "activation_copies": 0,
    }
    assert row["step"]["launches"] == 10 + 4 * 16 and row["step"]["activation_copies"] == 1
    assert (
        row["copies"] == {"weights": {"pad": 4}, "activations": {"copy": 1}}
        and row["in_graphs"] == 1
    )
    assert row["model_ms"] == pytest.approx(1e3 * 16500 / 3.35232e12 + 1e-3 * 56)
    text = (tmp_path / "launches.md").read_text()
    assert (
        "| base | 4 (2) |" in text
        and "| 74 | 33 | 3 | 56 | 0 | 16 / 0 / 1 | 7 | 1 | 0.056 |" in text
    )
    assert text in capsys.readouterr().out
    assert "rows filled up to multiples of 128." in text
    launches.main(
        [
            "launches",
            "--methods",
            "base,ffba,base",
            "--targets",
            "h100,h100",
            "--modes",
            "cublas",
            "--batch_sizes",
            "8",
            "--adapters",
            "4",
            "--out",
            str(tmp_path / "bank"),
        ]
    )
    rows = json.loads((tmp_path / "bank/launches.json").read_text())["rows"]
    assert [(row["label"], row["adapters"]) for row in rows] == [
        ("base", 1),
        ("ffba, bank of 4", 4),
    ]


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


@planner
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_a_single_product(target):
    """One launch, one GEMM, and the bytes of x, W and y; with W padded first, a copy of a
    weight."""
    params = {"w": shape(1024, 2048)}
    plan = {}
    for name, step in {
        "plain": lambda params, x: x @ params["w"],
        "padded": lambda params, x: (
            jnp.pad(x, ((0, 0), (0, 24))) @ jnp.pad(params["w"], ((0, 24), (0, 0))) * 2
        ),
    }.items():
        compiled = launch_plan.compile_for(
            target, step, params, shape(16, 1024), options=launch_plan.MODES["cublas"]
        )
        plan[name] = launch_plan.read_plan(*compiled, threshold=1024 * 2048 * 2)
    plain = plan["plain"]
    assert (plain.launches, plain.gemms, plain.products, plain.chain) == (1, 1, 1, 1)
    assert plain.moved == 2 * (16 * 1024 + 1024 * 2048 + 16 * 2048)
    assert not any(plain.copies.values())
    assert any(copy.startswith("pad bf16[1048,2048]") for copy in plan["padded"].copies["weights"])


@planner
@pytest.mark.parametrize("key_value_heads, saved", [(4, 3), (8, 2)])
@pytest.mark.parametrize("target", ["h100", "a100"])
@pytest.mark.parametrize("mode", launch_plan.MODES)
def test_methods_keep_what_they_promise(mode, target, key_value_heads, saved):
    """A small model whose weights outweigh what else there is: at most one launch a layer more than
    the base, as many GEMMs, and nothing of a weight's size moved about; lora needs ten more. The
    attention kernel saves launches, most where query heads share keys, as they do in Llamas."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=key_value_heads,
        head_dim=64,
        tie_word_embeddings=True,
    )

    def plan(name, method, **how):
        return launch_plan.plan_model(
            name,
            config,
            method and AdapterConfig(method, 16),
            target=target,
            mode=mode,
            batch=8,
            cache_length=32,
            **how,
        )

    base, lora = plan("base", None), plan("lora", "lora")
    assert lora["layer"]["launches"] >= base["layer"]["launches"] + 10
    for name in ("ffba", "ffba_qg_add", "fpa", "zflora"):
        row = plan(name, name)
        assert row["layer"]["launches"] <= base["layer"]["launches"] + 1
        assert row["layer"]["gemms"] == base["layer"]["gemms"] and "weights" not in row["copies"]
        assert row["step"]["moved"] > base["step"]["moved"]
    written_out = plan("base", None, decode_kernels="none")
    assert base["layer"]["launches"] <= written_out["layer"]["launches"] - saved and not base[
        "copies"
    ].get("cache")


@planner
@pytest.mark.parametrize("method", [None, "ffba", "ffba_qg_add", "fpa", "zflora"])
@pytest.mark.parametrize("target", ["h100", "a100"])
@pytest.mark.parametrize("mode", launch_plan.MODES)
def test_one_token_moves_no_matrix(mode, target, method):
    """At batch 1 o is a sum for XLA, whose 2,048 rows of products it would round and write out, and
    the logits a cuBLAS call without float32 results, for which it would cast the unembedding."""
    config = dataclasses.replace(
        LlamaConfig.preset("llama3.2-1b"), vocab_size=8192, num_hidden_layers=2
    )
    plan = launch_plan.plan_step(
        method or "base",
        config,
        method and AdapterConfig(method, 32),
        target=target,
        mode=mode,
        batch=1,
    )
    assert not plan.copies["weights"]


def planned_in_kernels(method, **settings):
    """A step of a 1B's shapes in our kernels, on an H100 by default; its launches a layer."""
    config = dataclasses.replace(LlamaConfig.preset("llama3.2-1b"), vocab_size=8192)
    planned = launch_plan.plan_model(
        method or "base",
        config,
        method and AdapterConfig(method, 32),
        **{"target": "h100", "mode": "triton", "batch": 8, "decode_kernels": "layer"} | settings,
    )
    # Not even the unembedding is a library's product, and no weight is moved about.
    assert planned["step"]["gemms"] == 0 and "weights" not in planned["copies"]
    return planned["layer"]["launches"]


@planner
@pytest.mark.parametrize("target", ["h100", "a100", "l4"])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_layer_in_our_kernels_is_five_launches(batch, target):
    """Base and fused methods alike, one more where XLA sums several rows' attention; LoRA's B's are
    four more."""
    for method in (None, "ffa", "ffba", "zflora", "pf_lora"):
        expected = 5 + (batch > 1) + 4 * (method == "pf_lora")
        assert planned_in_kernels(method, batch=batch, target=target) == expected


@planner
def test_a_bank_in_our_kernels():
    """As many launches as of one adapter; what ffa's o and down read has to be there before it is
    added to them."""
    for method, expected in {"ffa": 8, "ffba": 6, "zflora": 6, "pf_lora": 10}.items():
        assert planned_in_kernels(method, adapters=4) == expected


@planner
@pytest.mark.parametrize(
    "quantization, target", [("int8", "h100"), ("int8", "l4"), ("fp8", "h100"), ("fp8", "l4")]
)
def test_codes_in_our_kernels(quantization, target):
    """Floats beside them of two bytes or of four: it must fit into an Ada's shared memory."""
    for batch, dtype, expected in ((1, "bfloat16", 5), (8, "bfloat16", 6), (16, "float32", 6)):
        how = {"batch": batch, "dtype": dtype, "quantization": quantization, "target": target}
        assert planned_in_kernels("ffba", **how) == expected


@planner
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("codes", [False, True])
def test_weights_are_loaded_ahead_in_sixteen_bytes(codes, rows, target, monkeypatch, tmp_path):
    """down of a 1B: all of a tile's weights, 8 KB by 128 threads or by 64 for codes, are four or
    eight such loads a thread, none of which waits in a register."""
    folder = contextlib.nullcontext(str(tmp_path))
    monkeypatch.setattr(launch_plan.tempfile, "TemporaryDirectory", lambda: folder)
    F, D = 8192, 2048

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def product(y, kernel, x):
        gated = Gated(y, F, Columns(y, 2 * F, 32), Columns(y, 2 * F + 32, 32))
        return decode_product([Term(gated, kernel, transposed=True)], D, Behind(residual=x))

    kernel = shape(D, F)
    if codes:
        scales = (shape(size, dtype=jnp.float32) for size in (D, F))
        kernel = Scaled(shape(D, F, dtype=jnp.int8), *scales, transposed=True)
    arguments = shape(rows, 2 * F + 64), kernel, shape(rows, D)
    launch_plan.compile_for(target, product, *arguments)
    [code] = [text for path in tmp_path.glob("*.ptx") if "mma.sync" in (text := path.read_text())]
    loads = 8 if codes else 4
    assert len(re.findall(r"cp\.async\.cg\.shared\S* [^;]*, 0x10", code)) >= loads * 2
    assert len(re.findall(r"ld\.global", code)) <= 4


def test_a_plugin_of_another_version_is_refused(monkeypatch):
    """It would end in a compiler's traceback."""
    versions = {"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.12.0.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(compilers, "has_compiler", lambda: True)
    with pytest.raises(UserError, match=r"pip install jax-cuda13-plugin==0\.11\.2"):
        compilers.require_compiler()
    versions["jax-cuda13-plugin"] = "0.11.1"
    compilers.require_compiler()


@planner
def test_the_kernel_warns_of_nothing():
    """Where every warning is shown, that of Pallas's Triton backend is not, which jax repeats at
    every lowering."""
    code = """
from flora_jax.adapters import Scaled
from flora_jax.analysis import compilers, launch_plan
from flora_jax.models.config import LlamaConfig
plan = launch_plan.plan_step("base", LlamaConfig.preset("tiny"), None, target="h100", mode="triton",
                             batch=1, cache_length=16)
print(plan.launches)
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
    assert "Triton backend" not in done.stderr


@planner
def test_a_bank_is_planned_with_its_mask():
    config = LlamaConfig.preset("tiny")
    one, four = (
        launch_plan.plan_step(
            "ffba",
            config,
            AdapterConfig("ffba", 8),
            target="h100",
            mode="triton",
            batch=4,
            cache_length=16,
            adapters=n,
        )
        for n in (1, 4)
    )
    assert four.moved > one.moved and four.gemms == one.gemms
    with pytest.raises(UserError, match="lora cannot hold a bank of 2"):
        launch_plan.check_bank("lora", 2)


def train_step(T, config):
    """A training step in bfloat16 and its arguments' shapes: one row of T packed tokens."""
    adapter_config = AdapterConfig("ffba", 8)
    optimizer = optax.adamw(1e-3)

    def start(key):
        trainable = {"adapter": init_adapter(key, config, adapter_config)}
        state = optimizer.init(trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, state, key)

    state = jax.eval_shape(start, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids)
    batch["loss_weights"] = jax.ShapeDtypeStruct((1, T), jnp.float32)
    dtype = jnp.bfloat16
    model = Llama(config, adapter_config, dtype=dtype, param_dtype=dtype, remat="products")
    step = make_train_step(model, optimizer)
    return step, (state, {"params": abstract_base(config, dtype)}, batch)


@planner
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_packed_training_holds_no_square(target, head_dim, monkeypatch):
    """A step over 8,192 packed tokens: Pallas's attention, forward and backward, fits the device
    and takes the segments as they are."""
    monkeypatch.setattr(attention, "pallas_runs", lambda q: True)
    T, config = 8192, dataclasses.replace(LlamaConfig.preset("tiny"), head_dim=head_dim)
    step, arguments = train_step(T, config)
    program = (compiled := launch_plan.compile_for(target, step, *arguments)[0]).as_text()
    assert largest(program) < T * T
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * T  # one square of float32
    assert "mha_forward" in program and "mha_backward" in program


@planner
def test_a_token_is_one_graph_and_the_loop_can_be_in_it():
    """By default XLA records what a token launches in one CUDA graph, and the host looks at each
    token whether another is wanted; the report times the loop in a graph beside it."""
    config, model = (
        LlamaConfig.preset("tiny"),
        Llama(LlamaConfig.preset("tiny"), decode_kernels="attention"),
    )
    base = abstract_base(config, jnp.bfloat16)
    params = jax.eval_shape(lambda base: fuse(base, None, config, None), base)
    cache = jax.eval_shape(lambda: KVCache.empty(config, 1, 64, jnp.bfloat16))
    logits, stop = jax.ShapeDtypeStruct((1, config.vocab_size), jnp.float32), jnp.full(8, -1)
    keys = jax.random.split(jax.random.key(0), 1)
    done = jax.ShapeDtypeStruct((1,), jnp.bool_)
    start = functools.partial(begin.__wrapped__, stop=stop, keys=keys, sampling=Sampling())
    state = jax.eval_shape(lambda *given: start(*given), logits, cache, done)

    def loop(params, state, limit):
        return decode.__wrapped__(model, params, state, limit, stop, keys)

    limit = jax.ShapeDtypeStruct((), jnp.int32)
    found = {}
    for name, options in (("default", {}), ("loop", LOOP_IN_GRAPH)):
        texts = launch_plan.compile_for("h100", loop, params, state, limit, options=options)[1]
        rows = re.findall(r"^( *)\d+: (k\w+)", texts["after"], re.MULTILINE)
        found[name] = [(kind, len(indent)) for indent, kind in rows]
    for name, graphs, indented in (("default", 1, False), ("loop", 0, True)):
        (at,) = (i for i, (kind, _) in enumerate(found[name]) if kind == "kWhile")
        inside = [kind for kind, _ in found[name][at:]]
        assert inside.count("kCommandBuffer") == graphs
        assert (found[name][at][1] > 0) == indented
