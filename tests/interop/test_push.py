"""`export --push`: what it says and asks of the hub, whose client's own signatures stand in for
it."""

from unittest.mock import create_autospec

import huggingface_hub
import pytest

from flora_jax.errors import UserError
from flora_jax.export import main
from flora_jax.interop.push import push


@pytest.fixture
def hub(monkeypatch):
    """The hub's client; of whoever has a token."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    api.create_repo.return_value = "https://hub/me/mine"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return api


@pytest.fixture
def exported(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "deep" / "model.safetensors").write_bytes(bytes(2_500_000))
    return tmp_path


def command(*flags):
    """Of a run that is not there, which is found out after the hub is asked."""
    main(["export", "--workdir", "no-run", "--format", "merged", "--out", "no-out", *flags])


def test_nothing_is_sent_unless_confirmed(hub, exported):
    said = push(exported, "me/mine", confirmed=False)
    assert said == (
        "would upload 2 files, 2.5 MB, to me/mine (README.md, deep/model.safetensors); "
        "add --confirm to do it"
    )
    assert not hub.mock_calls


def test_it_goes_to_a_private_repository(hub, exported):
    said = push(exported, "me/mine", confirmed=True)
    assert said == "uploaded 2 files, 2.5 MB, to me/mine: https://hub/me/mine"
    hub.create_repo.assert_called_once_with("me/mine", private=True, exist_ok=True)
    sent = hub.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", exported)


def test_what_the_hub_refuses_is_one_line(hub, exported):
    hub.upload_folder.side_effect = ConnectionError("the line\nis dead")
    with pytest.raises(UserError, match=r"--push=me/mine: the line is dead; the export is whole"):
        push(exported, "me/mine", confirmed=True)


def test_it_is_refused_before_anything_is_read(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, error in (("mine", "ORG/NAME"), ("me/a b", "no name of a repository")):
        with pytest.raises(UserError, match=f"--push='{name}' .*{error}"):
            command("--push", name)
    with pytest.raises(UserError, match="--confirm goes with --push"):
        command("--confirm")
    hub.whoami.side_effect = ConnectionError("refused")
    with pytest.raises(UserError, match="--push=me/mine: refused; check the token"):
        command("--push", "me/mine", "--confirm")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="--push=me/mine needs a token"):
        command("--push", "me/mine", "--confirm")
    with pytest.raises(UserError, match="no-run"):  # a dry run needs none
        command("--push", "me/mine")
    assert not list(tmp_path.iterdir())
