"""AdapterConfig: a method with its sizes, checked, and what it puts into each of a layer's four
products."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.adapters.methods import BLOCKS, METHODS, PRODUCTS, PROJECTIONS, Method
from flora_jax.errors import UserError, require, require_known, split_names

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

    forward: the pieces of A's columns, each named after its projection (or "block", read once for
        the block).
    matrix: projections whose own piece returns through a B of its own, `[rank, d_out]`.
    repeat: projections that a piece (its own, or else the sum of the incoming ones) is
        repeat-and-added to.
    backward: projections with rows B that read the incoming z, `[backward_rank, d_out]`.
    skips_first: layer 0 has no such rows, since its incoming z is zero.
    skips_last: the last layer has no such columns, since nothing reads their z.
    """

    forward: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    repeat: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    backward_rank: int = 0
    skips_first: bool = False
    skips_last: bool = False


def _names(value: str | Sequence[str] | None, field: str) -> tuple[str, ...] | None:
    """`"q,gate"` or `("q", "gate")` as a tuple in the order of PROJECTIONS; None stays None."""
    if value is None:
        return None
    known = ", ".join(PROJECTIONS)
    require(
        isinstance(value, str | Sequence),
        f"adapter.{field}={value!r} must name projections, some of {known}",
    )
    given = split_names(value) if isinstance(value, str) else list(value)
    # PEFT's names
    given = [v.removesuffix("_proj") if isinstance(v, str) else v for v in given]
    for name in given:
        require_known(name, PROJECTIONS, f"adapter.{field}: projection {name!r}")
    return tuple(p for p in PROJECTIONS if p in given)


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _methods(able: Callable[[Method], bool]) -> str:
    return ", ".join(name for name, row in METHODS.items() if able(row))


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A row of METHODS with its sizes. Immutable and hashable; bad values raise UserError.

    method: a name of METHODS.
    rank: r, channels a piece. `fft` ignores it.
    alpha: the scale is s = alpha / rank (alpha / sqrt(rank) with rslora); default alpha = rank, so
        that s = 1 (sqrt(rank) with rslora).
    targets: the projections adapted; default all seven. Methods that go around a block need it
        whole.
    add_to: where repeat-and-add adds; default the method's own row.
    activation: `act` on the path around the block (fpa, parallel).
    dropout: on the input that the A's read, in training.
    zero_init: the side that starts at zero, "A" or "B"; default the method's own row. It must be A
        where repeat-and-add adds z unchanged, so that step 0 equals the base.
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
        require_known(self.method, METHODS, f"adapter.method={self.method!r}")
        require(
            _is_number(self.rank, numbers.Integral) and self.rank >= 1,
            f"adapter.rank={self.rank!r} must be a positive integer",
        )
        self._set(rank=int(self.rank))
        self._settle_numbers()
        self._check_activation()
        self._settle_projections()
        self._settle_zero_init()
        self._refuse_unused()
        self._check_reach()

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _settle_numbers(self) -> None:
        alpha = self.rank if self.alpha is None else self.alpha
        require(
            _is_number(alpha) and math.isfinite(alpha) and alpha > 0,
            f"adapter.alpha={alpha!r} must be a positive number",
        )
        require(
            _is_number(self.dropout) and 0 <= self.dropout < 1,
            f"adapter.dropout={self.dropout!r} must be in [0, 1)",
        )
        require(
            isinstance(self.rslora, bool), f"adapter.rslora={self.rslora!r} must be true or false"
        )
        # Plain numbers: one of numpy's would promote a bfloat16 model.
        self._set(alpha=float(alpha), dropout=float(self.dropout))

    def _check_activation(self) -> None:
        require_known(self.activation, ACTIVATIONS, f"adapter.activation={self.activation!r}")
        require(
            self.activation == "identity" or self.row.activation,
            f"adapter.activation={self.activation!r}: {self.method} is linear; only "
            f"{_methods(lambda row: row.activation)} take an activation",
        )

    def _settle_projections(self) -> None:
        targets = _names(self.targets, "targets")
        add_to = _names(self.add_to, "add_to")
        if targets is None:
            targets = PROJECTIONS
        require(bool(targets), f"adapter.targets is empty; name some of {', '.join(PROJECTIONS)}")
        require(
            not add_to or self.row.adds == "repeat",
            f"adapter.add_to={','.join(add_to or ())}: {self.method} has no repeat-and-add; only "
            f"{_methods(lambda row: row.adds == 'repeat')} have",
        )
        if add_to is None:
            add_to = tuple(p for p in self.row.add_to if p in targets)
        self._set(targets=targets, add_to=add_to)

    def _settle_zero_init(self) -> None:
        if self.zero_init is None:
            self._set(zero_init=self.row.zero)
        require(
            self.zero_init in ("A", "B"), f"adapter.zero_init={self.zero_init!r} must be A or B"
        )
        require(
            self.zero_init == "A" or not self.add_to,
            f"adapter.zero_init='B': {self.method} adds z as it is (add_to="
            f"{','.join(self.add_to)}), so A must start at zero",
        )

    def _refuse_unused(self) -> None:
        """Refuses settings that a method without an adapter would ignore."""
        if self.row.reads is not None:
            return
        unset = AdapterConfig("lora", self.rank, zero_init=self.row.zero)
        for field in ("alpha", "rslora", "targets", "dropout", "zero_init"):
            value = getattr(self, field)
            require(
                value == getattr(unset, field),
                f"adapter.{field}={value!r}: {self.method} has no adapter; leave it unset",
            )

    def _check_reach(self) -> None:
        """Refuses targets that would leave a part of the adapter without effect."""
        row = self.row
        where = f"adapter.targets={','.join(self.targets)}"
        for p in self.add_to:
            require(
                p in self.targets,
                f"adapter.add_to: {p!r} is not among {where}; add it there or leave it out here",
            )
        require(
            row.reads != "projection" or row.adds != "repeat" or self.add_to == self.targets,
            f"adapter.add_to={','.join(self.add_to)}: {self.method} adds to every target; restrict "
            "targets instead",
        )
        require(
            row.writes != "stream" or self.targets == PROJECTIONS,
            f"{where}: {self.method} carries channels through every block and needs all "
            "projections",
        )
        if row.writes == "block":
            for block in BLOCKS:
                self._check_block(block, where)

    def _check_block(self, block: str, where: str) -> None:
        """Refuses a path around the block that begins or ends nowhere."""
        inputs, output = BLOCKS[block]
        whole = (*PRODUCTS[inputs], output)
        reads = [p for p in PRODUCTS[inputs] if p in self.targets]
        ends = output in self.targets
        require(
            bool(reads) or not ends,
            f"{where}: {self.method} writes {output!r} but reads none of {', '.join(whole[:-1])}",
        )
        require(
            self.row.reads != "block" or not reads or set(whole) <= set(self.targets),
            f"{where}: {self.method} goes around the {block} block; name all of {', '.join(whole)} "
            "or none",
        )
        for p in reads:
            require(
                ends or p in self.add_to,
                f"{where}: the adapter of {p!r} would reach nothing; add {output!r} to targets",
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
        slots = {}
        for inputs, output in BLOCKS.values():
            slots[inputs] = self._input_slot(inputs)
            slots[output] = self._output_slot(output, len(slots[inputs].forward))
        return slots

    def _targeted(self, product: str) -> tuple[str, ...]:
        return tuple(p for p in PRODUCTS[product] if p in self.targets)

    def _input_slot(self, product: str) -> Slot:
        """The slot of the product that reads a block's input."""
        ins = self._targeted(product)
        block = ("block",) if ins else ()
        forward = {"projection": ins, "input": ins, "block": block}.get(self.row.reads, ())
        stream = self.row.writes == "stream"
        return Slot(
            forward=forward,
            matrix=forward if self.row.adds == "matrix" else (),
            repeat=tuple(p for p in ins if p in self.add_to),
            backward=ins if stream else (),
            backward_rank=self.rank * stream,
            skips_first=stream and product == "qkv",
        )

    def _output_slot(self, product: str, pieces: int) -> Slot:
        """The slot of the product that writes a block's output; pieces: how many the block's input
        product reads."""
        outs = self._targeted(product)
        forward = outs if self.row.reads in ("projection", "output") else ()
        backward = outs if self.row.writes == "block" else ()
        return Slot(
            forward=forward,
            matrix=forward if self.row.adds == "matrix" else (),
            repeat=tuple(p for p in outs if p in self.add_to),
            skips_last=self.row.writes == "stream" and product == "down",
            backward=backward,
            backward_rank=self.rank * pieces if backward else 0,
        )

    def check(self, widths: Mapping[str, tuple[int, int]]) -> None:
        """Raises UserError unless `rank` divides every width that repeat-and-add fills (`widths`:
        projection -> (d_in, d_out))."""
        filled = {f"projection {p!r}": widths[p][1] for p in self.add_to}
        for what, width in filled.items():
            if width % self.rank:
                common = math.gcd(*filled.values())
                fits = [r for r in range(1, common + 1) if common % r == 0]
                near = sorted(sorted(fits, key=lambda r: abs(r - self.rank))[:4])
                raise UserError(
                    f"adapter.rank={self.rank} does not divide {width}, the width of {what}, as "
                    "repeat-and-add in "
                    f"{self.method} needs; ranks near it that do: {', '.join(map(str, near))}"
                )


def has_adapter(adapter_config: AdapterConfig | None) -> bool:
    """Whether there is one: fft has none."""
    return adapter_config is not None and adapter_config.row.reads is not None
