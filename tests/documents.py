"""The pages, and what in them is to be run."""

import dataclasses
import re
import shlex

from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Before a block of commands, or behind one in the text: why no test runs it. No page shows it.
_MARK = r"<!-- not run: ([^>]+) -->"
# A block of any language, or one that is indented below an empty line.
_BLOCK = re.compile(
    rf"(?:^{_MARK}\n+)?(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```$"
    r"|(?<=\n\n)(?P<indented>(?:    [^\n]*\n)+))",
    re.DOTALL | re.MULTILINE,
)
# In the text.
_MODULE = r"(?:\w+=\S+ )*python -m\s+(?:flora_jax|experiments)\."
_INLINE = re.compile(rf"`({_MODULE}[^`]*)`(?:{_MARK})?")


@dataclasses.dataclass(frozen=True)
class Command:
    """A whole command of a page, in one line, and why it is not run; empty where it is."""

    page: str
    line: str
    reason: str

    @property
    def words(self):
        return shlex.split(self.line, comments=True)

    @property
    def module(self):
        """Of `python -m MODULE`; None for any other command."""
        words = [word for word in self.words if not re.match(r"\w+=", word)]
        return words[2] if words[:2] == ["python", "-m"] else None

    @property
    def flags(self):
        return self.words[self.words.index(self.module) + 1 :] if self.module else []


def commands():
    """Of each page the lines of its blocks, and the modules that are named in backticks with flags
    or without; not those with an ellipsis, which are part of a command."""
    for page, text in TEXTS.items():
        text = text.replace("\\\n", " ")
        for block in _BLOCK.finditer(text):
            if not block["language"]:
                for line in (block["fenced"] or block["indented"]).splitlines():
                    yield Command(page, " ".join(line.split()), block[1] or "")
        for line, reason in _INLINE.findall(_BLOCK.sub("", text)):
            if "…" not in line:
                yield Command(page, " ".join(line.split()), reason)


def python(page):
    """The Python of a page."""
    return [code for language, code in FENCE.findall(TEXTS[page]) if language == "python"]
