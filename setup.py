"""Packaging of flora_jax: the library, its commands and what they need."""

from setuptools import find_packages, setup

RUNTIME = [
    "absl-py>=2.1",
    # in which tensorflow-datasets writes what we prepare; it asks for it on Linux alone
    "array_record>=0.8.3",
    "filelock>=3.15",
    "flax>=0.12",
    "gguf>=0.17",
    "grain>=0.2.14",
    "huggingface_hub>=1.0",
    # tensorflow-datasets needs it to prepare its own data sets and does not say so
    "importlib_resources>=6.0",
    # transformers renders chat templates with it, and asks for it in an extra alone
    "jinja2>=3.1",
    "jax>=0.10",
    "matplotlib>=3.9",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    # reads Parquet; tensorflow-datasets brings it
    "pyarrow>=20.0",
    # what the card of a model on the hub is written in; its errors are ours to catch
    "pyyaml>=6.0",
    "qwix>=0.1.8",
    "rouge-score>=0.1.2",
    "safetensors>=0.6",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    # Those from 5.15 to 5.21 misread some byte-level tokenizers, which is checked when one is
    # loaded.
    "transformers>=5.0,!=5.3.0",
]
DEMO = ["reasoning-gym>=0.1.20"]
# Reads data sets of the Hub; from 4.0 on it runs no code of theirs.
HUB = ["datasets>=4.0"]
# Only `python -m flora_jax.harness` imports it, and it needs no torch.
LM_EVAL = ["lm_eval>=0.4.13"]
WANDB = ["wandb>=0.21"]
# What our numbers are compared against. Nothing at run time imports them.
# Tests that need them skip without.
PEERS = ["peft>=0.18", "torch>=2.9"]
TEST_WITHOUT_PEERS = [
    *DEMO, *LM_EVAL, *WANDB, "hypothesis>=6.100", "ipykernel>=6.29", "nbclient>=0.10",
    "nbformat>=5.10", "pytest>=8.0", "pytest-xdist>=3.6",
]  # fmt: skip
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
# From Python 3.12 on the tests bring no peers: torch is gigabytes of CUDA there.
TEST = [
    *TEST_WITHOUT_PEERS,
    "peft>=0.18; python_version < '3.12'",
    "torch==2.13.0; python_version < '3.12'",
]

setup(
    name="flora_jax",
    version="0.1.0",
    description="FLoRA: fused forward-backward adapters for fine-tuning Llamas, in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # A wheel carries the configurations, for `--config ffba_1b`.
    packages=[*find_packages(include=["flora_jax", "flora_jax.*"]), "flora_jax.configs"],
    package_dir={"flora_jax.configs": "configs"},
    package_data={
        "flora_jax.interop": ["remote_code/*.py"],
        "flora_jax.models": ["decode_blocks.json"],
    },
    install_requires=RUNTIME,
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
        "demo": DEMO,
        "docs": DOCS,
        "hub": HUB,
        "lm-eval": LM_EVAL,
        "peers": PEERS,
        "test": TEST,
        "wandb": WANDB,
        "test-without-peers": TEST_WITHOUT_PEERS,
        # Compile for H100 / A100 on a machine without a GPU or driver, with one CUDA or the other.
        "gpu-plan": [
            "jax-cuda12-plugin>=0.10",
            "jax-cuda12-pjrt>=0.10",
            "nvidia-cuda-nvcc-cu12>=12.9",
        ],
        "gpu-plan-cuda13": [
            "jax-cuda13-plugin>=0.10",
            "jax-cuda13-pjrt>=0.10",
            "nvidia-cuda-nvcc>=13.0",
        ],
        "dev": [*TEST, "ruff>=0.12"],
    },
)
