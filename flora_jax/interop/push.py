"""Uploads an export to the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from flora_jax.errors import UserError, in_a_line, require


def check_push(repo: str, confirmed: bool) -> None:
    """Raises UserError for a wrong name of a repository and, if the upload is confirmed, without a
    token that the hub knows."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push={repo!r} is no name of a repository: {error}") from None
    require("/" in repo, f"--push={repo!r} must name its owner, too: ORG/NAME")
    if not confirmed:
        return
    require(
        huggingface_hub.get_token() is not None,
        f"--push={repo} needs a token that may write; `hf auth login`, or set HF_TOKEN",
    )
    with _told_of(repo, "check the token and the network"):
        huggingface_hub.HfApi().whoami()


def push(directory: Path, repo: str, confirmed: bool) -> str:
    """Uploads the directory to a repository, which is private if it is new.

    Not confirmed, it uploads nothing. Returns a line on what was done or would be. Raises UserError
    where the hub refuses.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    what = f"{len(files)} files, {megabytes:.1f} MB, to {repo}"
    if not confirmed:
        names = ", ".join(str(path.relative_to(directory)) for path in files)
        return f"would upload {what} ({names}); add --confirm to do it"
    api = huggingface_hub.HfApi()
    with _told_of(repo, f"the export is whole: `hf upload {repo} {directory}` goes on"):
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=directory, commit_message="Exported by flora_jax"
        )
    return f"uploaded {what}: {url}"


@contextlib.contextmanager
def _told_of(repo: str, remedy: str) -> Iterator[None]:
    try:
        yield
    # Without a network, errors come from whichever HTTP library the hub's uses.
    except Exception as error:
        reason = in_a_line(error) or type(error).__name__
        raise UserError(f"--push={repo}: {reason}; {remedy}") from None
