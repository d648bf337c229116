"""What an export carries of the licence of its base: files, NOTICE, "Built with Llama", header."""

import hashlib
import json
import os

import pytest
from support import ROOT, random_adapter

from flora_jax.adapters import AdapterConfig
from flora_jax.export import main
from flora_jax.interop.adapter_files import save_adapter
from flora_jax.interop.formats import FORMATS
from flora_jax.interop.licences import Licence, base_licence
from flora_jax.models.config import LlamaConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = LlamaConfig.preset("tiny")
AGREEMENT = (
    "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version Release Date: September 25, 2024\n"
)
NOTICE_32 = (
    "Llama 3.2 is licensed under the Llama 3.2 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)
NOTICE_3 = (
    "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)


def method_of(form):
    return "ffba" if form == "vllm" else "lora"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """By method: a LoRA of others and an ffba, which say nothing of their base but a name."""
    paths = {}
    for method in ("lora", "ffba"):
        config = AdapterConfig(method, 4)
        trained = {"adapter": random_adapter(TINY, config, 1), "params": {}}
        paths[method] = tmp_path_factory.mktemp(method) / "a"
        save_adapter(paths[method], trained, TINY, config, "base", "f")
    (paths["lora"] / "flora_config.json").unlink()
    about = paths["ffba"] / "adapter_config.json"
    stored = json.loads(about.read_text())
    del stored["fingerprint"]
    about.write_text(json.dumps(stored))
    return paths


@pytest.fixture
def exported(hf_directory, adapters, tmp_path, capsys):
    """`exported(form, files)` exports a base with these files; the directory, and what was said."""

    def make(form, files):
        base = hf_directory(tmp_path / "base")
        for name, text in files.items():
            (base / name).write_text(text)
        adapter = adapters[method_of(form)]
        main(
            [
                "export",
                "--model",
                str(base),
                "--adapter",
                str(adapter),
                "--format",
                form,
                "--out",
                str(tmp_path / form),
            ]
        )
        return tmp_path / form, capsys.readouterr().out

    return make


def own(directory):
    """The licence files of an export."""
    names = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    return {
        path.name: path.read_text() for path in directory.iterdir() if path.name.startswith(names)
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_llama_of_metas(exported, form):
    """Its weights and an adapter of it alike."""
    files = {
        "LICENSE.txt": AGREEMENT,
        "USE_POLICY.md": "# Llama 3.2 Acceptable Use Policy\n",
        "README.md": "---\nlicense: llama3.2\n---\nA base.",
    }
    out, said = exported(form, files)
    assert own(out) == {
        "LICENSE.txt": AGREEMENT,
        "USE_POLICY.md": files["USE_POLICY.md"],
        "NOTICE": NOTICE_32,
    }
    card = (out / "README.md").read_text()
    assert "\nlicense: llama3.2\n" in card and "\n\n**Built with Llama**\n\n" in card
    assert (
        f"\n# Llama: base, fine-tuned with {method_of(form)}\n" in card
        and "| base model | base |" in card
    )
    assert "licence:" not in said
    report = json.loads((out / "flora_export.json").read_text())
    assert report["licence"] == "llama3.2" and report["files"].keys() >= own(out).keys()


def test_metas_licence_is_known_by_its_file_alone(exported):
    out, said = exported(
        "peft", {"LICENSE": "\n  META LLAMA 3 COMMUNITY LICENSE\nAGREEMENT\n", "NOTICE": "Ours.\n"}
    )
    assert own(out)["NOTICE"] == "Ours.\n\n" + NOTICE_3
    card = (out / "README.md").read_text()
    assert "\nlicense: llama3\n" in card and "**Built with Meta Llama 3**" in card
    assert "\n# Llama 3: base, fine-tuned" in card and "licence:" not in said


def test_metas_licence_whose_text_is_not_at_hand(exported):
    out, said = exported("peft", {"README.md": "---\nlicense: llama3.1\n---\n"})
    assert own(out) == {"NOTICE": NOTICE_32.replace("3.2", "3.1")}
    assert "**Built with Llama**" in (out / "README.md").read_text()
    [line] = [line for line in said.splitlines() if line.startswith("licence:")]
    assert (
        "the text of the Llama 3.1 Community License is not among the base's files" in line
        and str(out) in line
    )


@pytest.mark.parametrize(
    ("form", "carried"),
    [("merged", True), ("transformers", True), ("peft", False), ("vllm", False)],
)
def test_a_llama_architecture_under_another_licence(exported, form, carried):
    """As SmolLM2 is. An adapter holds nothing of the base."""
    files = {
        "LICENSE": "Apache License\nVersion 2.0\n",
        "NOTICE.txt": "Some lab.\n",
        "README.md": f"---\nlicense: apache-2.0\n---\n{AGREEMENT}",
    }
    out, said = exported(form, files)
    assert own(out) == (
        {"LICENSE": files["LICENSE"], "NOTICE.txt": "Some lab.\n"} if carried else {}
    )
    card = (out / "README.md").read_text()
    assert (
        "\nlicense: apache-2.0\n" in card
        and f"\n# base, fine-tuned with {method_of(form)}\n" in card
    )
    assert "Built with" not in card and "Meta" not in card and "licence:" not in said


def test_a_base_that_states_nothing(exported):
    out, said = exported("merged", {})
    card = (out / "README.md").read_text()
    assert (
        own(out) == {}
        and "license:" not in card
        and "not stated" in card
        and "licence:" not in said
    )


def test_only_plain_files_of_the_base_come_along(hf_directory, tmp_path):
    """Links that leave it and directories do not; those of the hub's cache do."""
    base = hf_directory(tmp_path / "base")
    (tmp_path / "secret").write_text(AGREEMENT)
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (base / "NOTICE").mkdir()
    (base / "LICENSE-long").write_bytes(b" " * (2**20 + 1))
    (base / "license.txt").write_text("MIT License")
    os.mkfifo(base / "LICENSE.pipe")
    assert base_licence(str(base)) == Licence(None, (base / "license.txt",))

    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "ab").write_text(AGREEMENT)
    (snapshot / "LICENSE.txt").symlink_to("../../blobs/ab")
    assert base_licence(str(snapshot)) == Licence("llama3.2", (snapshot / "LICENSE.txt",))


def test_sources_without_a_directory(tmp_path, monkeypatch):
    """Random weights have no licence; a `.gguf` file states a name."""
    assert base_licence("random") == Licence()
    (tmp_path / "m.gguf").write_bytes(b"")
    monkeypatch.setattr("flora_jax.interop.licences.find_licence", lambda source: "llama3.2")
    found = base_licence(str(tmp_path / "m.gguf"))
    assert found == Licence("llama3.2") and found.text_missing


@pytest.mark.parametrize(
    ("name", "base", "title"),
    [
        ("llama3.2", "meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"),
        ("llama3", "meta-llama/Meta-Llama-3-8B", "Llama 3: Meta-Llama-3-8B"),
        ("llama3", "a/Llama-3-8B", "Llama-3-8B"),
        ("llama2", "meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("mit", "a/b", "a/b"),
        (None, "a/b", "a/b"),
    ],
)
def test_the_name_begins_as_metas_licences_ask(name, base, title):
    assert Licence(name).title(base) == title


def test_our_own_licence():
    """The published text of Apache-2.0 with our name in its appendix, and the package's field."""
    text = (ROOT / "LICENSE").read_text()
    name = "Copyright 2026 The flora_jax authors"
    assert text.count(name) == 1
    published = text.replace(name, "Copyright [yyyy] [name of copyright owner]")
    assert hashlib.sha256(published.encode()).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()
