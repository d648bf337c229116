"""AdapterConfig: a method with its sizes, checked, and what it puts into each of a layer's four products."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from flora_jax.adapters.methods import BLOCKS, METHODS, PRODUCTS, PROJECTIONS, Method
from flora_jax.errors import UserError, near_misses

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one fused product carries. Pieces are `rank` channels wide.

    forward: the pieces of A's columns, each named after its projection (or "block", read once for the block).
    matrix: projections whose own piece returns through a B of its own, `[rank, d_out]`.
    repeat: projections that a piece (its own, or else the sum of the incoming ones) is repeat-and-added to.
    backward: projections with rows B that read the incoming z, `[backward_rank, d_out]`.
    skips_first: layer 0 has no such rows, since its incoming z is zero.
    """

    forward: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    repeat: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    backward_rank: int = 0
    skips_first: bool = False


def _names(value: str | Sequence[str] | None, field: str) -> tuple[str, ...] | None:
    """`"q,gate"` or `("q", "gate")` as a tuple in the order of PROJECTIONS; None stays None."""
    if value is None:
        return None
    if not isinstance(value, str | Sequence):
        raise UserError(
            f"adapter.{field}={value!r} must name projections, some of {', '.join(PROJECTIONS)}"
        )
    given = (
        [v.strip() for v in value.split(",") if v.strip()]
        if isinstance(value, str)
        else list(value)
    )
    # as PEFT has them
    given = [v.removesuffix("_proj") if isinstance(v, str) else v for v in given]
    for name in given:
        if name not in PROJECTIONS:
            raise UserError(
                f"adapter.{field}: projection {name!r} is unknown; {near_misses(str(name), PROJECTIONS)}"
            )
    return tuple(p for p in PROJECTIONS if p in given)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A row of METHODS with its sizes. Immutable and hashable; bad values raise UserError.

    method: a name of METHODS.
    rank: r, channels a piece. `fft` ignores it.
    alpha: the scale is s = alpha / rank (alpha / sqrt(rank) with rslora); default alpha = rank, so that s = 1
        (sqrt(rank) with rslora).
    targets: the projections adapted; default all seven. Methods that go around a block need it whole.
    add_to: where repeat-and-add adds; default the method's own row.
    activation: `act` on the path around the block (fpa, parallel).
    dropout: on the input that the A's read, in training.
    zero_init: the side, "A" or "B", that starts at zero, the other one starting full; default the method's own row. It
        must be A where repeat-and-add or the stream passes z on as it is, since step 0 is to equal the base.
    """

    method: str
    rank: int
    alpha: float | None = None
    rslora: bool = False
    targets: tuple[str, ...] | None = None
    add_to: tuple[str, ...] | None = None
    activation: str = "identity"
    dropout: float = 0.0
    zero_init: str | None = None

    def __post_init__(self):
        if self.method not in list(METHODS):  # a list compares what a dict could not hash
            raise UserError(
                f"adapter.method={self.method!r} is unknown; {near_misses(str(self.method), METHODS)}"
            )
        if (
            not isinstance(self.rank, numbers.Integral)
            or isinstance(self.rank, bool)
            or self.rank < 1
        ):
            raise UserError(f"adapter.rank={self.rank!r} must be a positive integer")
        object.__setattr__(self, "rank", int(self.rank))
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))

        def number(value):
            return isinstance(value, numbers.Real) and not isinstance(value, bool)

        if not (number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"adapter.alpha={self.alpha!r} must be a positive number")
        if not (number(self.dropout) and 0 <= self.dropout < 1):
            raise UserError(f"adapter.dropout={self.dropout!r} must be in [0, 1)")
        # Plain numbers: one of numpy's would promote a bfloat16 model.
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))
        if not isinstance(self.rslora, bool):
            raise UserError(f"adapter.rslora={self.rslora!r} must be true or false")
        if self.activation not in list(ACTIVATIONS):
            known = near_misses(str(self.activation), ACTIVATIONS)
            raise UserError(f"adapter.activation={self.activation!r} is unknown; {known}")
        if self.activation != "identity" and not self.row.activation:
            raise UserError(
                f"adapter.activation={self.activation!r}: {self.method} is linear; only "
                f"{', '.join(m for m, row in METHODS.items() if row.activation)} take an activation"
            )
        targets, add_to = _names(self.targets, "targets"), _names(self.add_to, "add_to")
        targets = PROJECTIONS if targets is None else targets
        if not targets:
            raise UserError(f"adapter.targets is empty; name some of {', '.join(PROJECTIONS)}")
        if add_to is not None and add_to != () and self.row.adds != "repeat":
            raise UserError(
                f"adapter.add_to={','.join(add_to)}: {self.method} has no repeat-and-add; only "
                f"{', '.join(m for m, row in METHODS.items() if row.adds == 'repeat')} have"
            )
        if add_to is None:
            add_to = tuple(p for p in self.row.add_to if p in targets)
        if self.zero_init is None:
            object.__setattr__(self, "zero_init", self.row.zero)
        if self.zero_init not in ("A", "B"):
            raise UserError(f"adapter.zero_init={self.zero_init!r} must be A or B")
        if self.zero_init == "B" and (add_to or self.row.writes == "stream"):
            where = f"add_to={','.join(add_to)}" if add_to else "the stream's channels"
            raise UserError(
                f"adapter.zero_init='B': {self.method} adds z as it is ({where}), so A must start at zero"
            )
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "add_to", add_to)
        unset = (
            AdapterConfig("lora", self.rank, zero_init=self.row.zero)
            if self.row.reads is None
            else self
        )
        for field in ("alpha", "rslora", "targets", "dropout", "zero_init"):
            if (value := getattr(self, field)) != getattr(unset, field):
                raise UserError(
                    f"adapter.{field}={value!r}: {self.method} has no adapter; leave it unset"
                )
        self._check_reach()

    def _check_reach(self) -> None:
        """Refuses targets that would leave a part of the adapter without effect."""
        row, where = self.row, f"adapter.targets={','.join(self.targets)}"
        outside = [p for p in self.add_to if p not in self.targets]
        if outside:
            raise UserError(
                f"adapter.add_to: {outside[0]!r} is not among {where}; add it there or leave it out here"
            )
        if row.reads == "projection" and row.adds == "repeat" and self.add_to != self.targets:
            raise UserError(
                f"adapter.add_to={','.join(self.add_to)}: {self.method} adds to every target; restrict targets instead"
            )
        if row.writes == "stream" and self.targets != PROJECTIONS:
            raise UserError(
                f"{where}: {self.method} carries channels through every block and needs all projections"
            )
        if row.writes != "block":
            return
        for block, (inputs, output) in BLOCKS.items():
            whole = (*PRODUCTS[inputs], output)
            reads = [p for p in PRODUCTS[inputs] if p in self.targets]
            if output in self.targets and not reads:
                raise UserError(
                    f"{where}: {self.method} writes {output!r} but reads none of {', '.join(whole[:-1])}"
                )
            if row.reads == "block" and reads and any(p not in self.targets for p in whole):
                names = ", ".join(whole)
                raise UserError(
                    f"{where}: {self.method} goes around the {block} block; name all of {names} or none"
                )
            idle = [p for p in reads if p not in self.add_to and output not in self.targets]
            if idle:
                raise UserError(
                    f"{where}: the adapter of {idle[0]!r} would reach nothing; add {output!r} to targets"
                )

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def scale(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def slots(self) -> dict[str, Slot]:
        """What each fused product (qkv, o, gate_up, down) carries."""
        row, slots = self.row, {}
        for inputs, output in BLOCKS.values():
            ins = tuple(p for p in PRODUCTS[inputs] if p in self.targets)
            outs = tuple(p for p in PRODUCTS[output] if p in self.targets)
            forward_in = {"projection": ins, "input": ins, "block": ("block",) if ins else ()}.get(
                row.reads, ()
            )
            forward_out = outs if row.reads in ("projection", "output") else ()
            matrix = row.adds == "matrix"
            slots[inputs] = Slot(
                forward=forward_in,
                matrix=forward_in if matrix else (),
                repeat=tuple(p for p in ins if p in self.add_to),
                backward=ins if row.writes == "stream" else (),
                backward_rank=self.rank if row.writes == "stream" else 0,
                skips_first=row.writes == "stream" and inputs == "qkv",
            )
            slots[output] = Slot(
                forward=forward_out,
                matrix=forward_out if matrix else (),
                repeat=tuple(p for p in outs if p in self.add_to),
                backward=outs if row.writes == "block" else (),
                backward_rank=self.rank * len(forward_in) if row.writes == "block" and outs else 0,
            )
        return slots

    def check(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Raises UserError unless `rank` divides every width that repeat-and-add fills (`widths`: projection ->
        (d_in, d_out)); `zflora` fills the model width once, before the final norm."""
        filled = {f"projection {p!r}": widths[p][1] for p in self.add_to}
        if self.row.writes == "stream":
            filled["the residual stream"] = widths["o"][1]
        for what, width in filled.items():
            if width % self.rank:
                common = math.gcd(*filled.values())
                fits = [r for r in range(1, common + 1) if common % r == 0]
                near = sorted(sorted(fits, key=lambda r: abs(r - self.rank))[:4])
                raise UserError(
                    f"adapter.rank={self.rank} does not divide {width}, the width of {what}, as repeat-and-add in "
                    f"{self.method} needs; ranks near it that do: {', '.join(map(str, near))}"
                )
