"""The ablations, a run a name: each states what differs from FFBA (QG-Add) at rank 32, on
SmolLM2-135M.

    python -m flora_jax.train --config configs/ablations.py:add_qkv --workdir runs/add_qkv --config.data.dir=DIR

`NAME,PRESET` is the same on another model preset (`add_qkv,llama3.2-1b`). Replies of DailyDialog++;
an adapter of 5.5 M parameters where nothing else is said. `python -m experiments.ablations` runs
whole groups and writes their tables. Expect differences of some hundredths in validation loss.
"""

from flora_jax.config import get_config as base_config
from flora_jax.errors import UserError, near_misses


def _ffba(add_to):
    return {"adapter.method": "ffba", "adapter.add_to": add_to}


def _at(method, rank, **changes):
    return {"adapter.method": method, "adapter.rank": rank, **changes}


# What trains of the base beside the adapter, at the rate of full fine-tuning (fpa's own, times
# 0.05).
_FREE = {
    "train.trainable": "params/.*/q_kernel,params/.*/gate_kernel",
    "optim.rate_rules": "params/.*=0.05",
}

GROUPS = {
    # Where repeat-and-add adds, the path around the block being there in all.
    "add_set": {
        "add_none": _ffba(""),
        "add_q": _ffba("q"),
        "add_qg": {},
        "add_qd": _ffba("q,down"),
        "add_qkv": _ffba("q,k,v"),
        "add_inputs": {"adapter.method": "ffba"},
        "add_all": _ffba("q,k,v,o,gate,up,down"),
    },
    # Half, one and two budgets; lora and fpa at the ranks of equal parameters.
    "rank": {
        "ffba_qg_add_r16": _at("ffba_qg_add", 16),
        "lora_r9": _at("lora", 9),
        "fpa_r40": _at("fpa", 40),
        "ffba_qg_add_r32": _at("ffba_qg_add", 32),
        "lora_r18": _at("lora", 18),
        "fpa_r80": _at("fpa", 80),
        "ffba_qg_add_r64": _at("ffba_qg_add", 64),
        "lora_r36": _at("lora", 36),
        "fpa_r160": _at("fpa", 160),
    },
    # By its identity FFBA (QG-Add) is FPA with tiled low-rank changes of q and gate; without that
    # constraint their kernels train whole.
    "low_rank": {
        "tiled_q_gate": _at("ffba_qg_add", 32),
        "free_q_gate": _at("fpa", 80, **_FREE),
        "frozen_q_gate": _at("fpa", 80),
    },
    # The side that starts at zero, at one rate each: a zero A moves faster, so a smaller one.
    "initialisation": {
        "lora_zero_B": _at("lora", 18),
        "lora_zero_A": _at("lora", 18, **{"adapter.zero_init": "A", "optim.learning_rate": 3e-4}),
        "fpa_zero_B": _at("fpa", 80),
        "fpa_zero_A": _at("fpa", 80, **{"adapter.zero_init": "A", "optim.learning_rate": 3e-4}),
        "add_none_zero_A": _ffba(""),
        "add_none_zero_B": {**_ffba(""), "adapter.zero_init": "B", "optim.learning_rate": 1e-3},
    },
    "scale": {
        "scale_0.5": {"adapter.alpha": 16.0},
        "scale_1": {},
        "scale_2": {"adapter.alpha": 64.0},
        "scale_4": {"adapter.alpha": 128.0},
        "rslora": {"adapter.rslora": True},  # 32 / √32 = 5.7
    },
    "activation": {
        f"act_{name}": _at("fpa", 80, **{"adapter.activation": name})
        for name in ("identity", "relu", "silu", "gelu", "tanh")
    },
    # Both blocks, one of them at the same rank, one of them at the rank that divides nearest to the
    # same parameters.
    "blocks": {
        "both": {},
        "attention": {"adapter.targets": "q,k,v,o"},
        "attention_r48": {"adapter.targets": "q,k,v,o", "adapter.rank": 48},
        "mlp": {"adapter.targets": "gate,up,down"},
        "mlp_r64": {"adapter.targets": "gate,up,down", "adapter.rank": 64},
    },
}


def get_config(name="add_qg"):
    name, _, preset = name.partition(",")
    runs = {run: changes for group in GROUPS.values() for run, changes in group.items()}
    if name not in runs:
        raise UserError(f"ablation {name!r} is unknown; {near_misses(name, runs)}")
    config = base_config(preset or "smollm2-135m", "ffba_qg_add")
    if not preset:
        config.model.weights = "smollm2-135m-instruct"
    config.adapter.rank = 32
    config.data.tasks = "dailydialogpp"
    config.data.max_length = 256
    config.data.validation_size = 60
    config.train.steps = 80
    config.train.batch_size = 4
    config.train.eval_every = config.train.save_every = 40
    for field, value in runs[name].items():
        section, field = field.split(".")
        config[section][field] = value
    return config
