"""The latency command and what stands behind it: the times it reports, the arithmetic on them, what
it refuses."""

import importlib.util
import itertools
import json
import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bank import decode_gathered, stack_lora
from flora_jax.adapters import AdapterConfig
from flora_jax.analysis import comparison, timing
from flora_jax.analysis.comparison import REFERENCE, Measurement, Size
from flora_jax.analysis.latency_run import markdown
from flora_jax.analysis.peer import Peer
from flora_jax.analysis.timing import Setting
from flora_jax.analysis.unmerged import UnmergedDense
from flora_jax.analysis.variants import VARIANTS, random_adapter, trained_parameters
from flora_jax.errors import run_command
from flora_jax.inference.decoding import grow, prefill
from flora_jax.inference.generator import Generator
from flora_jax.latency import main
from flora_jax.models.config import LlamaConfig
from flora_jax.models.llama import Llama, init_base

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
FLAGS = (
    "--model",
    "random",
    "--preset",
    "tiny",
    "--rank",
    "8",
    "--new_tokens",
    "4",
    "--rounds",
    "2",
    "--prompt_lengths",
    "5",
    "--batch_sizes",
    "2",
)


@pytest.fixture
def small_reads(monkeypatch):
    """The bandwidth from reads of 4 MB: a test has no use for the real one."""
    real = timing.read_bandwidth
    monkeypatch.setattr(timing, "read_bandwidth", lambda: real(2**22))


@pytest.fixture(scope="module")
def base():
    return init_base(jax.random.key(0), TINY)


def test_the_command(tmp_path, small_reads, capsys):
    out = tmp_path / "new" / "out"
    started = time.perf_counter()
    main(["latency", *FLAGS, "--methods", "base,lora,ffba_folded", "--out", str(out)])
    elapsed = time.perf_counter() - started
    result, printed = json.loads((out / "latency.json").read_text()), capsys.readouterr()
    assert printed.out == (out / "latency.md").read_text() + "\n"
    assert all((out / f"latency.{suffix}").stat().st_size > 5000 for suffix in ("png", "pdf"))
    assert (
        result["schema_version"] == 1 and result["arguments"]["methods"] == "base,lora,ffba_folded"
    )
    assert (
        result["provenance"]["versions"]["jax"] == jax.__version__
        and result["provenance"]["device"]
    )
    assert result["bandwidth"]["gb_per_s"] == max(result["bandwidth"]["runs_gb_per_s"]) > 0
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["base", "lora", "ffba_folded"]

    # Sizes in closed form: parameters as the README counts them, each of 4 bytes read once.
    D, Q, K, F, L = 96, 96, 32, 192, 2
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(init_base(jax.random.key(0), TINY)))
    counts = {
        "base": 0,
        "lora": 5 * L * (7 * D + 2 * Q + 2 * K + 3 * F),
        "ffba_folded": 8 * L * 10 * D,
    }
    # 15,040 is the nearest to 15,360
    assert [rows["lora"]["rank"], rows["ffba_folded"]["rank"]] == [5, 8]
    for name, row in rows.items():
        assert row["parameters"] == counts[name]
        assert row["read_bytes"] == whole + 4 * counts[name]
        assert row["bytes_ratio"] == pytest.approx(1 + 4 * counts[name] / whole)
        tpot = row["tpot"]["median"]
        assert len(row["tpot"]["rounds"]) == 2 and tpot == pytest.approx(
            np.mean(row["tpot"]["rounds"])
        )
        assert row["tokens_per_second"] == pytest.approx(2 / tpot)
        assert row["bandwidth_share"] == pytest.approx(
            row["read_bytes"] / tpot / result["bandwidth"]["gb_per_s"] / 1e9
        )
        assert sum(row["ttft"]["rounds"]) + 3 * sum(row["tpot"]["rounds"]) < elapsed
    ratio, lora = (rows[name]["tpot_ratio"]["median"] for name in ("ffba_folded", "lora"))
    claim = rows["ffba_folded"]["beside"]["lora"]["tpot"]
    assert claim["less_than_lora"] == pytest.approx(1 - ratio / lora)
    assert not rows["base"]["beside"] and "lora" not in rows["lora"]["beside"]

    # In turns of 2 of the 3 tokens after the first: two a round, of which the first reads the
    # prompts.
    turns = [
        "latency",
        *FLAGS,
        "--methods",
        "base",
        "--turn_tokens",
        "2",
        "--out",
        str(tmp_path / "turns"),
    ]
    main(turns)
    row = json.loads((tmp_path / "turns/latency.json").read_text())["rows"][0]
    assert len(row["tpot"]["rounds"]) == 4 and len(row["ttft"]["rounds"]) == 2
    assert "2 rounds, 4 new tokens, 2 at a turn. Medians" in capsys.readouterr().out

    # The same command again is welcome, another one is not; results of before there were turns have
    # no word of them.
    del result["arguments"]["turn_tokens"]
    (out / "latency.json").write_text(json.dumps(result))
    main(["latency", *FLAGS, "--methods", "base,lora,ffba_folded", "--out", str(out)])
    assert json.loads((out / "latency.json").read_text())["arguments"]["turn_tokens"] is None
    other = ["latency", *FLAGS, "--methods", "base", "--out", str(out)]
    before = (out / "latency.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run_command(main, other)
    assert stopped.value.code == 2 and "another command" in capsys.readouterr().err
    assert (out / "latency.json").read_bytes() == before


def test_what_is_timed_is_the_generator(base):
    """The programs make the tokens that `Generator.generate` makes, and a time is that of all of
    them."""
    config, setting = AdapterConfig("ffba", 8), Setting(prompt_length=5, batch_size=2, new_tokens=6)
    model, params = comparison.build("ffba", base, TINY, config)
    programs, prompts = timing.compile_programs(model, params, setting), setting.prompts(TINY)
    states, counted = [], []

    def watch(params, state, limit, *rest):
        counted.append(int(limit))
        states.append(programs.decode(params, state, limit, *rest))
        return states[-1]

    started = time.perf_counter()
    ttft, tpot = timing.Programs(
        setting, programs.prefill, programs.grow, programs.begin, watch, 0.0, False
    ).run(params, prompts)
    elapsed = time.perf_counter() - started
    assert counted == [6] and min(ttft, tpot) > 0 and ttft + 5 * tpot < elapsed
    adapter = random_adapter(jax.random.key(1), TINY, config)
    expected = Generator(TINY, base, {"a": adapter}, config, max_length=64, batch_size=2).generate(
        prompts.tolist(), 6
    )
    for row, generation in zip(np.asarray(states[0].out), expected, strict=True):
        assert row[: len(generation.tokens)].tolist() == generation.tokens
    assert max(len(generation.tokens) for generation in expected) == 6


def test_prompts_are_read_in_the_first_rounds_only(base, monkeypatch):
    """Not counting the warm-up, whose time is never reported; and what is decoded after a copied
    state is what was decoded before."""
    model, params = comparison.build("base", base, TINY, None)
    setting = Setting(prompt_length=5, batch_size=2, new_tokens=6)
    programs, prompts, seen = (
        timing.compile_programs(model, params, setting),
        setting.prompts(TINY),
        [],
    )

    def watch(params, state, limit, *arguments):
        limits.append(int(limit))
        seen.append(programs.decode(params, state, limit, *arguments))
        return seen[-1]

    class Counting(timing.Programs):
        """Whose TTFT is the number of its prefill."""

        def start(self, *arguments):
            starts.append(None)
            return super().start(*arguments)[0], float(len(starts))

    watched = Counting(setting, programs.prefill, programs.grow, programs.begin, watch, 0.0, False)
    for prefills in (1, 2):
        starts, limits = [], []
        contestant = timing.Contestant(watched, params, prompts, prefills)
        contestant.warm_up()
        assert int(seen.pop().step) == 2
        times = [contestant() for _ in range(4)]
        assert [ttft for ttft, _ in times] == [i + 2.0 if i < prefills else None for i in range(4)]
        assert min(tpot for _, tpot in times) > 0
    assert len(seen) == 8
    for state in seen:
        np.testing.assert_array_equal(state.out, seen[0].out)
    whole = seen[0].out

    # In turns of 2: the second and third token, the next two, the last; then the same again. The
    # clock moves on by one second each time it is read, so that a turn takes one second, whatever
    # its tokens.
    starts, limits = [], []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    contestant = timing.Contestant(watched, params, prompts, prefills=1, turn=2)
    contestant.warm_up()
    times = [contestant() for _ in range(6)]
    assert [ttft for ttft, _ in times] == [2.0] + 5 * [None]
    assert [tpot for _, tpot in times] == [1 / 2, 1 / 2, 1] * 2
    assert limits == [2, 3, 5, 6, 3, 5, 6]
    np.testing.assert_array_equal(seen[-1].out, whole)
    assert [comparison.turns(6, turn) for turn in (None, 1, 2, 5)] == [1, 5, 3, 1]
    assert timing.paired_ratio([2.0, None, 6.0], [1.0, 5.0, None])["median"] == 2.0


def test_arithmetic_in_closed_form():
    """Synthetic rounds in which the machine slows to half its speed: times double, ratios stay."""
    setting = Setting(16, 4, 9)
    slow = [1.0, 2.0, 1.0, 4.0]

    def measurement(name, ttft, tpot):
        return Measurement(
            name,
            setting,
            [
                {
                    REFERENCE: (0.1 * s, 0.02 * s),
                    name: (ttft * s, tpot * s),
                    "peft": (0.2 * s, 0.04 * s),
                }
                for s in slow
            ],
            {name: (1.5, True)},
        )

    measurements = [measurement("lora", 0.15, 0.03), measurement("fpa", 0.11, 0.022)]
    sizes = {
        REFERENCE: Size(None, 0, 1000),
        "lora": Size(4, 7, 1100),
        "fpa": Size(8, 6, 1050),
        "peft": Size(4, 7, 1100),
    }
    rows = {row["method"]: row for row in comparison.table(measurements, sizes, gb_per_s=1e-4)}
    assert list(rows) == ["lora", "fpa", "peft"]
    fpa = rows["fpa"]
    assert fpa["tpot"]["median"] == pytest.approx(0.022 * 1.5)
    assert fpa["tpot"]["quartiles"] == pytest.approx([0.022, 0.022 * 2.5])
    for value, expected in (
        (fpa["tpot_ratio"], 1.1),
        (fpa["ttft_ratio"], 1.1),
        (rows["lora"]["tpot_ratio"], 1.5),
        (fpa["tpot_over_peer"]["peft"], 0.55),
        (rows["peft"]["tpot_ratio"], 2),
    ):
        assert [value["median"], *value["quartiles"]] == pytest.approx([expected] * 3)
    assert fpa["beside"]["lora"]["tpot"] == pytest.approx(
        {"less_than_lora": 1 - 11 / 15, "overhead_removed": 0.8}
    )
    assert fpa["beside"]["peft"]["tpot"] == pytest.approx(
        {"less_than_lora": 0.45, "overhead_removed": 0.9}
    )
    assert fpa["bytes_ratio"] == 1.05 and fpa["tokens_per_second"] == pytest.approx(4 / 0.033)
    assert fpa["bandwidth_share"] == pytest.approx(1050 / 0.033 / 1e5)
    assert len(rows["peft"]["tpot"]["rounds"]) == 8 and rows["peft"]["compile_seconds"] is None
    assert timing.claims(1.0, 0.9)["overhead_removed"] is None


def test_order_turns_around_each_round():
    seen = []
    contestants = {name: lambda name=name: seen.append(name) or (1.0, 1.0) for name in "abc"}
    assert [list(one) for one in timing.interleave(contestants, 3)] == [
        list("abc"),
        list("cba"),
        list("abc"),
    ]
    assert "".join(seen) == "abccbaabc"


def test_every_variant_is_built_from_disk_as_from_memory(base, tmp_path):
    mapped = comparison.on_disk(base, tmp_path)
    assert all(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(mapped))
    configs = comparison.adapter_configs(list(VARIANTS), TINY, rank=8, equal_parameters=True)
    sizes, budget = (
        comparison.sizes(TINY, base, configs),
        trained_parameters(TINY, AdapterConfig("ffba", 8)),
    )
    for name, config in configs.items():
        assert (config is None) == (sizes[name].rank is None)
        # ffa's and zflora's ranks divide a width; the nearest such one is within a third.
        assert config is None or abs(sizes[name].parameters / budget - 1) < 0.34, name
    for name in ("base_7", "ffa_merged", "ffba_folded"):
        own, other = (
            comparison.build(name, tree, TINY, configs[name])[1] for tree in (mapped, base)
        )
        assert jax.tree.all(
            jax.tree.map(lambda a, b: isinstance(a, jax.Array) and bool((a == b).all()), own, other)
        )


def test_gathered_lora_is_lora(base):
    """The bank's baseline: each row goes on as its own adapter alone goes on."""
    # the best token is a clear one
    base = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 2 else leaf, base)
    config, model = AdapterConfig("lora", 4), Llama(TINY, AdapterConfig("lora", 4))
    adapters = [random_adapter(jax.random.key(i), TINY, config, std=0.2) for i in range(3)]
    ids, prompts = [2, 0, 1, 2], Setting(16, 4, 6).prompts(TINY)
    generator = Generator(
        TINY, base, dict(zip("abc", adapters, strict=True)), config, max_length=64, batch_size=4
    )
    expected, first, caches = [], [], []
    for row, i in enumerate(ids):
        generator.use("abc"[i])
        expected.append(generator.generate(prompts.tolist(), 6)[row].tokens)
        logits, cache = prefill(model, generator.params, prompts, jnp.full(4, 16))
        first.append(logits[row : row + 1].argmax(-1))

        def own(leaf, row=row):
            return jnp.split(leaf, 4)[row] if leaf.ndim else leaf

        caches.append(jax.tree.map(own, grow(cache, 32)))
    shared, stacks = stack_lora(base, adapters, TINY, config)
    gathered = model.clone(dense=UnmergedDense)
    cache = jax.tree.map(lambda *rows: jnp.concatenate(rows) if rows[0].ndim else rows[0], *caches)
    token = jnp.concatenate(first).astype(jnp.int32)
    found = [token]
    for _ in range(5):
        token, cache = decode_gathered(
            gathered, shared, stacks, jnp.array(ids), token, cache, jnp.int32(1)
        )
        found.append(token)
    found = np.stack(found, 1).tolist()
    assert [row[: len(own)] for row, own in zip(found, expected, strict=True)] == expected
    assert len({tuple(row) for row in found}) == 4 and max(map(len, expected)) == 6


def refused(capsys, words, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(main, ["latency", *map(str, flags)])
    out, err = capsys.readouterr()
    assert (
        stopped.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    ), err
    for word in words:
        assert word in err, (word, err)


def test_bad_input(tmp_path, capsys):
    out = ("--out", tmp_path / "new")

    def line(words, *flags):
        refused(capsys, words, *FLAGS, *out, *flags)
        assert not (tmp_path / "new").exists()

    line(["method 'fbfa'", "'ffba'"], "--methods", "base,fbfa")
    line(["--methods is empty"], "--methods", ",")
    line(["preset 'tniy'", "'tiny'"], "--preset", "tniy")
    line(["--dtype 'float23'", "'float32'"], "--dtype", "float23")
    line(
        ["--prompt_lengths 2040", "max_position_embeddings=2048"],
        "--prompt_lengths",
        "5,2040",
        "--new_tokens",
        "9",
    )
    line(["--prompt_lengths", "'0'"], "--prompt_lengths", "0,5")
    line(["--batch_sizes", "'-1'"], "--batch_sizes=-1")
    line(["--batch_sizes", "'one'"], "--batch_sizes", "one")
    line(["batch_size=1000000000", "20 tokens a row", "GB; lower"], "--batch_sizes", "1000000000")
    line(["--rounds 0"], "--rounds", "0")
    line(["--new_tokens 1", "at least 2"], "--new_tokens", "1")
    line(["--turn_tokens 4", "from 1 to 3"], "--turn_tokens", "4")
    line(["--turn_tokens 0", "from 1 to 3"], "--turn_tokens", "0")
    line(["--turn_tokens 2", "--peer peft"], "--turn_tokens", "2", "--peer", "peft")
    line(["--rank 0"], "--rank", "0")
    line(["--rank", "invalid int"], "--rank", "x")
    line(["--peer", "vllm"], "--peer", "vllm")
    line(["rank=5", "ffba"], "--rank", "5", "--no-equal_parameters", "--methods", "ffba")
    line(["/no/such/model"], "--model", "/no/such/model", "--preset", "tiny")
    refused(capsys, ["needs --preset"], "--model", "random", *out)
    refused(capsys, ["--out"], *FLAGS)
    (tmp_path / "file").write_text("")
    refused(capsys, ["--out", "file"], *FLAGS, "--out", tmp_path / "file" / "x")
    refused(capsys, ["--out", "not empty"], *FLAGS, "--out", tmp_path)


def test_another_architecture_than_the_presets(tmp_path, hf_directory, capsys):
    hf_directory(tmp_path / "model")
    refused(
        capsys,
        ["--preset smollm2-135m", "another architecture"],
        "--model",
        tmp_path / "model",
        "--preset",
        "smollm2-135m",
        "--out",
        tmp_path / "new",
    )


def test_absent_peer(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "peft" else find(name, *rest),
    )
    refused(
        capsys,
        ["peft; pip install -e", ".[peers]"],
        *FLAGS,
        "--peer",
        "peft",
        "--out",
        tmp_path / "new",
    )


def test_peer_is_the_same_model(base):
    """PEFT's model with its adapter off gives our logits: it is timed on the same weights."""
    torch = pytest.importorskip("torch")
    peer, prompts = Peer(TINY, base, rank=4), Setting(16, 2, 4).prompts(TINY)
    assert peer.parameters == trained_parameters(TINY, AdapterConfig("lora", 4))
    with torch.no_grad(), peer.model.disable_adapter():
        theirs = peer.model(input_ids=torch.tensor(prompts, dtype=torch.long)).logits.numpy()
    ours = Llama(TINY, None).apply({"params": base}, prompts)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-4)
    ttft, tpot = peer.run(Setting(16, 2, 4), prompts)
    assert ttft > 0 and tpot > 0
    traced = []

    def trace(graph, _):
        traced.append(graph)
        return graph.forward

    peer._compiled = torch.compile(peer.model, dynamic=False, backend=trace)  # all but the compiler
    for _ in range(2):
        ttft, tpot = peer.run(Setting(16, 2, 4), prompts, compiled=True)
        assert ttft > 0 and tpot > 0 and traced


@pytest.mark.slow
def test_the_peer_beside_real_weights(tmp_path):
    """The whole table on SmolLM2, PEFT compiled and eager in the same rounds."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    main(
        [
            "latency",
            "--model",
            "smollm2-135m-instruct",
            "--methods",
            "base,lora_7,ffba",
            "--prompt_lengths",
            "32",
            "--batch_sizes",
            "1",
            "--rank",
            "16",
            "--new_tokens",
            "9",
            "--rounds",
            "3",
            "--peer",
            "peft",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "latency.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["ffba"]["bytes_ratio"] == pytest.approx(1 + 2_764_800 / 134_515_008)
    # no test fails on how fast
    for ratio in (rows["ffba"]["tpot_over_peer"]["peft"], rows["base"]["tpot_ratio"]):
        low, high = ratio["quartiles"]
        assert 0 < low <= ratio["median"] <= high < math.inf
    assert "peft_compiled" in {*rows, *result["left_out"]} and "over peft, same rounds" in markdown(
        result
    )
