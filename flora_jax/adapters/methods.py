"""The family as a table: a row says where z is read, where it is added and where it is written.

Every adapter here computes `z = s · act(x A)`, a narrow product of r channels a piece, and puts z
somewhere. What sets the methods apart is only (a) which inputs the A's read, (b) how z returns to
the projection it was read beside, (c) where else z goes. A new method is one new row.

Llama's seven projections sit in four fused products, two blocks:

    attention:  qkv (q, k, v)  ->  o          mlp:  gate_up (gate, up)  ->  down
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# The fused products, by block: the projections that read the block's input, and the one that writes
# its output.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
BLOCKS: dict[str, tuple[str, str]] = {"attention": ("qkv", "o"), "mlp": ("gate_up", "down")}
PROJECTIONS: tuple[str, ...] = tuple(p for names in PRODUCTS.values() for p in names)


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the family's table (README, "The family"; FLoRA, arXiv 2511.00050)."""

    # Who owns an A: every projection; every projection of a block's input; the block's input once;
    # the block's output projection; nobody.
    reads: Literal["projection", "input", "block", "output"] | None
    # How z returns to the output of the projection it was read beside: through a matrix B of its
    # own, by repeat-and-add (to the projections of `add_to`), or not at all.
    adds: Literal["matrix", "repeat"] | None = None
    add_to: tuple[str, ...] = ()
    # Where all of a block's z go: the rows B of the block's output projection; the residual
    # stream's extra channels, which the rows B of later qkv and gate_up products read; nowhere.
    writes: Literal["block", "stream"] | None = None
    # The side that starts at zero, so that step 0 equals the base.
    zero: Literal["A", "B"] = "B"
    # Whether the trained adapter is a change of W alone; a path around the non-linearity is not.
    mergeable: bool = False
    # Whether `act` may be non-linear (the path around the block only).
    activation: bool = False
    # The peak rate of a run that names none. A zero A with a full B moves the output 18 to 64 times
    # as far in one Adam step as LoRA's zero B does, so the rate belongs to the method
    # (docs/methods.md). For scale s = 1; ffba_qd_add's is a guess, and fft's a third of the best
    # one on SmolLM2-135M, since larger models want less.
    learning_rate: float | None = None


_LORA = Method(reads="projection", adds="matrix", zero="B", mergeable=True, learning_rate=1e-3)
_FFA = Method(
    reads="projection",
    adds="repeat",
    add_to=PROJECTIONS,
    zero="A",
    mergeable=True,
    learning_rate=1e-4,
)
_FPA = Method(reads="block", writes="block", zero="B", activation=True, learning_rate=1e-3)
_ZFLORA = Method(reads="output", writes="stream", zero="B", learning_rate=1e-3)


def _ffba(*add_to: str) -> Method:
    return Method(
        reads="input", adds="repeat", add_to=add_to, writes="block", zero="A", learning_rate=3e-4
    )


METHODS: dict[str, Method] = {
    "fft": Method(reads=None, learning_rate=5e-5),
    "lora": _LORA,
    "pf_lora": _LORA,
    "ffa": _FFA,
    "fpa": _FPA,
    "parallel": _FPA,
    "ffba": _ffba("q", "k", "v", "gate", "up"),
    "ffba_qg_add": _ffba("q", "gate"),
    "ffba_qd_add": _ffba("q", "down"),
    "zflora": _ZFLORA,
}
