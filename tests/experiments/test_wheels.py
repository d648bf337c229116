"""What `make wheels` collects, on metadata written by hand."""

from packaging.requirements import Requirement

from experiments.wheels import missing, read_have

PACKAGES = {
    "ours": {
        "requires_dist": [
            "Data_Set>=1",
            "jax",
            "win; sys_platform == 'win32'",
            "puzzles; extra == 'demo'",
        ]
    },
    "data-set": {"requires_dist": ["numpy", "tree[fast]", "shared"]},
    "tree": {"requires_dist": ["speed; extra == 'fast'", "other; extra == 'slow'", "data-set"]},
    "puzzles": {"requires_dist": ["jax"]},
    "jax": {"requires_dist": ["numpy", "shared"]},
    **{name: {} for name in ("numpy", "shared", "speed", "other", "win")},
}


def test_what_a_machine_lacks():
    """Neither jax nor what jax needs, though our packages need that, too; extras and markers
    count."""
    assert missing(PACKAGES, Requirement("ours[demo]"), ["JAX"]) == {
        "data-set",
        "tree",
        "speed",
        "puzzles",
    }
    assert missing(PACKAGES, Requirement("ours"), ["jax", "absent"]) == {
        "data-set",
        "tree",
        "speed",
    }
    everything = {"data-set", "tree", "speed", "jax", "numpy", "shared"}
    assert missing(PACKAGES, Requirement("ours"), []) == everything


def test_what_pip_freeze_prints():
    lines = [
        "jax==0.11.2",
        "torch==2.13.0+cu130",
        "pip @ file:///wheel",
        "-e /a/clone",
        "# a comment",
        "",
        "numpy",
    ]
    assert read_have(lines) == ["jax", "torch", "pip", "numpy"]
