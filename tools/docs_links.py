"""A hook of mkdocs: a page's links to files of the repository, which are no pages, lead to where it
is, or are plain text while it is nowhere."""

from __future__ import annotations

import os
import re
from typing import Any

_OUTWARDS = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with those links settled. Raises FileNotFoundError for one that leads nowhere."""
    root = os.path.dirname(config["config_file_path"])

    def settle(link: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join("docs", link[2]))
        if not os.path.exists(os.path.join(root, path)):
            raise FileNotFoundError(f"{page.file.src_path}: {link[0]}")
        if not config["repo_url"]:
            return link[1]
        return f"[{link[1]}]({config['repo_url'].rstrip('/')}/blob/main/{path}{link[3] or ''})"

    return _OUTWARDS.sub(settle, markdown)
