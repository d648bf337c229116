"""What is locked: that it is what setup.py asks for, whole and with hashes; and how it is
installed."""

import re
import runpy

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

from tools import install

# The Pythons that setup.py is for, on Linux; a marker may ask for any of these.
ENVIRONMENTS = {
    version: {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{version}.0",
        "python_version": version,
        "sys_platform": "linux",
    }
    for version in ("3.11", "3.12", "3.13")
}


def lines(extra):
    """Of the lock, a line each pin, without the comments."""
    text = (ROOT / f"requirements/{extra}.txt").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if not line.startswith("#")]


def pins(extra, environment):
    """Version by name, in one environment."""
    found = {}
    for line in lines(extra):
        pin = Requirement(line.partition(" --hash")[0])
        if pin.marker is None or pin.marker.evaluate(environment):
            assert canonicalize_name(pin.name) not in found, pin
            (exact,) = pin.specifier
            assert exact.operator == "==", pin
            found[canonicalize_name(pin.name)] = exact.version
    return found


@pytest.fixture
def ranges(monkeypatch):
    """The lists of setup.py, by name."""
    monkeypatch.setattr(setuptools, "setup", dict)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("version", ENVIRONMENTS)
@pytest.mark.parametrize("extra, name", [("demo", "DEMO"), ("test", "TEST_WITHOUT_PEERS")])
def test_the_lock_is_within_the_ranges(ranges, extra, name, version):
    """setup.py changed and the lock did not: `make lock`."""
    environment = ENVIRONMENTS[version]
    found = pins(extra, environment)
    asked = [Requirement(text) for text in [*ranges["RUNTIME"], *ranges[name]]]
    assert len(asked) > 20
    for need in asked:
        if need.marker is None or need.marker.evaluate(environment):
            assert need.specifier.contains(found[canonicalize_name(need.name)]), need


@pytest.mark.parametrize("version", ENVIRONMENTS)
def test_the_demo_is_of_the_tests(version):
    """So that one environment serves both."""
    demo, test = (pins(extra, ENVIRONMENTS[version]) for extra in ("demo", "test"))
    assert demo.items() < test.items()
    assert not {"torch", "peft"} & test.keys()


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_each_has_hashes_and_no_address(extra):
    assert len(lines(extra)) > 50
    for line in lines(extra):
        pin, *hashes = re.split(r" +--hash=", line)
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ;[\w\s.'()<>=!]+)?", pin)
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes)
    text = (ROOT / f"requirements/{extra}.txt").read_text()
    comments = re.findall("^ *#.*$", text, re.MULTILINE)
    assert [line.split()[-1] for line in comments] == ["command:", "lock"]  # how it was made


PIP_CONFIG = """\
:env:.index-url='https://mirror/simple'
:env:.timeout='60'
global.extra-index-url='https://one/simple https://two/simple'
global.index-url='https://elsewhere/simple'
install.find-links='wheels'
list.format='columns'
"""


def test_uv_looks_where_pip_does():
    flags = install.uv_flags(install.pip_settings(PIP_CONFIG.splitlines()))
    assert flags[2:] == [
        *("--default-index", "https://mirror/simple"),
        *("--index", "https://one/simple", "--index", "https://two/simple"),
        *("--find-links", "wheels"),
    ]


class Machine:
    """Stands for `subprocess.run`: what fails there, by a word of the command, and what it says."""

    def __init__(self, **fails):
        self.fails = fails
        self.ran = []

    def __call__(self, command, **_):
        words = " ".join(command)
        how = "uv" if " -m uv " in words else "pip"
        what = re.search(r"config|requirements|editable|uv$", words)[0]
        self.ran.append(f"{how} {what}")
        said = self.fails.get(f"{how}_{what}", "")
        return install.subprocess.CompletedProcess(command, bool(said), "", said)


@pytest.mark.parametrize(
    "fails, ran, code",
    [
        ({}, ["uv requirements", "uv editable"], 0),
        ({"pip_uv": "none"}, ["pip requirements", "pip editable"], 0),
        ({"uv_requirements": "no"}, ["uv requirements", "pip requirements", "uv editable"], 0),
        (
            {"uv_requirements": "no", "pip_requirements": "ERROR: no x==1"},
            ["uv requirements", "pip requirements", "uv editable"],
            0,
        ),
        (
            {"uv_requirements": "no", "pip_requirements": f"ERROR: {install.MISMATCH}"},
            ["uv requirements", "pip requirements"],
            1,
        ),
        (
            {"uv_editable": "no", "pip_editable": "no"},
            ["uv requirements", "uv editable", "pip editable"],
            1,
        ),
    ],
)
def test_what_cannot_be_installed_is_taken_from_the_ranges(monkeypatch, capsys, fails, ran, code):
    machine = Machine(**fails)
    monkeypatch.setattr(install.subprocess, "run", machine)
    assert install.main("test") == code
    assert machine.ran == ["pip config", "pip uv", *ran]
    said = "requirements/test.txt cannot be installed (no x==1); taking setup.py's ranges\n"
    assert capsys.readouterr().out == said * ("ERROR: no x==1" in fails.values())


def test_an_extra_without_a_lock_is_taken_from_the_ranges(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(install.subprocess, "run", machine)
    assert install.main("docs") == 0
    assert machine.ran == ["pip config", "pip uv", "uv editable"]
