"""The four products of a layer, each with what rides in it, as one matrix a rank.

    T tokens   N places of a bank, 1 without one   r rank   R_f, R_b channels of one adapter that
    ride as outputs, as inputs

Tensor parallel, a rank holds its heads' or its channels' share of W and all columns A, so that z is
whole everywhere; of the rows B it holds a slice of every place, and the all-reduce that follows the
product anyway sums them up. There is no other collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from flora_vllm.plan import Plan

Range = tuple[int, int]


def _take(tensor: torch.Tensor, ranges: Sequence[Range], axis: int) -> torch.Tensor:
    """The parts of a tensor, one behind the other."""
    parts = [tensor.narrow(axis, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _length(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def share(size: int, rank: int, ranks: int) -> Range:
    """The range of `size` things that a rank of `ranks` holds; they need not divide."""
    return rank * size // ranks, (rank + 1) * size // ranks


class SlicedLinear(LinearBase):
    """A Linear of which this rank holds some outputs and inputs, each given as ranges of the whole
    weight `[out, in]`."""

    def __init__(
        self,
        outputs: Sequence[Range],
        inputs: Sequence[Range],
        *,
        bias: bool = False,
        prefix: str = "",
        writable: bool = False,
    ):
        super().__init__(_length(inputs), _length(outputs), bias, prefix=prefix, return_bias=False)
        self.outputs = tuple(outputs)
        self.inputs = tuple(inputs)
        if writable:
            self.quant_method = WritableLinearMethod(self)
        self.quant_method.create_weights(
            self,
            self.input_size,
            [self.output_size],
            self.input_size,
            self.output_size,
            self.params_dtype,
            weight_loader=self.load_weight,
        )
        if writable:
            self.weight.data.zero_()  # the places, too
        self.bias = None
        if bias:
            self.bias = nn.Parameter(
                torch.zeros(self.output_size, dtype=self.params_dtype), requires_grad=False
            )
            set_weight_attrs(self.bias, {"weight_loader": self.load_bias})

    def load_weight(self, weight: nn.Parameter, whole: torch.Tensor) -> None:
        """Copies this rank's share of the whole weight."""
        weight.data.copy_(_take(_take(whole, self.outputs, 0), self.inputs, 1))

    def load_bias(self, bias: nn.Parameter, whole: torch.Tensor) -> None:
        """Copies this rank's share of the whole bias."""
        bias.data.copy_(_take(whole, self.outputs, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, in]` to `[T, out]`."""
        return self.quant_method.apply(self, x, self.bias)


class FusedLinear(SlicedLinear):
    """The projections of one input and the adapter's channels in one product:
    `[x | z] · W -> [ys | z_out]`.

    widths: outputs of each projection in the whole model. own: the range of them that this rank
    holds, the outputs of a column-parallel product; rows: the range of the d_in inputs, of a
    row-parallel one, whose parts are summed over the ranks (`reduce`).

    forward(x `[T, in]`, z `[T, N R_b]` or None, masks or None) gives the list of ys and z_out
    `[T, N R_f]`, None where nothing rides as outputs. masks: of a bank, by product, `[T, N R_f]`,
    true for the channels that are not a token's own. A step is many small calls, so that what does
    not change is computed here.
    """

    def __init__(
        self,
        plan: Plan,
        product: str,
        widths: dict[str, int],
        own: dict[str, Range],
        rows: Range,
        d_in: int,
        *,
        reduce: bool,
        bias: bool,
        prefix: str,
        tp: tuple[int, int],
    ):
        rider = plan.riders[product]
        riding = plan.rank * len(rider.forward)
        outputs = []
        start = 0
        for name, width in widths.items():
            outputs.append((start + own[name][0], start + own[name][1]))
            start += width
        if rider.forward:
            outputs.append((start, start + plan.places * riding))
        inputs = [rows]
        own_z = share(rider.backward, *tp)  # of one place
        if rider.backward:
            starts = [d_in + place * rider.backward for place in range(plan.places)]
            inputs += [(at + own_z[0], at + own_z[1]) for at in starts]
        super().__init__(outputs, inputs, bias=bias, prefix=prefix, writable=plan.bank)
        self.plan = plan
        self.product = product
        self.rider = rider
        self.own_z = own_z
        self.names = list(widths)
        self.own = own
        self.reduce = reduce and self.tp_size > 1
        self.sizes = [stop - start for start, stop in own.values()]
        self.parts = [*self.sizes, self.output_size - sum(self.sizes)]
        self.act = None if plan.activation == "identity" else ACT2FN[plan.activation]
        self.B = nn.ModuleDict(
            {
                name: SlicedLinear([own[name]], [(0, plan.rank)], prefix=f"{prefix}.B.{name}")
                for name in rider.matrix
            }
        )
        self.tiles = {name: self._tile(*own[name]) for name in rider.repeat}
        self.pieces = [plan.rank] * len(rider.forward)
        # of each piece: the projection that it is added to, and through which matrix
        self.adds = [
            (i, self.names.index(name), self.B[name] if name in rider.matrix else None)
            for i, name in enumerate(rider.forward)
            if name in rider.matrix or name in rider.repeat
        ]
        # the projections that the sum of the pieces that came in is added to, by one rank
        summed = [name for name in rider.repeat if name not in rider.forward]
        self.summed = [] if self.reduce and self.tp_rank else [*map(self.names.index, summed)]

    def _tile(self, start: int, stop: int) -> torch.Tensor | None:
        """Which channel of z each output of this rank is added; None where it is a plain tiling."""
        r = self.plan.rank
        if start % r == 0 and (stop - start) % r == 0:
            return None
        return torch.arange(start, stop, device=self.weight.device) % r

    def load_weight(
        self, weight: nn.Parameter, whole: torch.Tensor, name: str | None = None
    ) -> None:
        """Copies this rank's share of the whole product; `name`: of one projection, of a base
        without adapters."""
        if name is None:
            super().load_weight(weight, whole)
            return
        rows = self._rows_of(name)
        columns = _length(self.inputs[:1])
        weight.data[rows, :columns] = _take(_take(whole, [self.own[name]], 0), self.inputs[:1], 1)

    def load_bias(self, bias: nn.Parameter, whole: torch.Tensor, name: str | None = None) -> None:
        """As load_weight. What is summed over the ranks has its bias on the first."""
        if self.reduce and self.tp_rank:
            return
        if name is None:
            super().load_bias(bias, whole)
        else:
            bias.data[self._rows_of(name)] = _take(whole, [self.own[name]], 0)

    def _rows_of(self, name: str) -> slice:
        """The rows of this rank's weight that hold a projection."""
        at = self.names.index(name)
        start = sum(self.sizes[:at])
        return slice(start, start + self.sizes[at])

    def forward(
        self,
        x: torch.Tensor,
        z: torch.Tensor | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """See the class."""
        if self.rider.backward:
            x = torch.cat([x, self._sliced(z)], -1)
        y = self.quant_method.apply(self, x, self.bias)
        *ys, out = y.split_with_sizes(self.parts, -1)
        if self.rider.forward:
            out = out if self.act is None else self.act(out)
            if masks is not None:
                out.masked_fill_(masks[self.product], 0)
            self._add(ys, out)
        if self.summed:
            pieces = z.unflatten(-1, (-1, self.plan.rank)).sum(-2)
            for at in self.summed:
                repeat_and_add(ys[at], pieces, self.tiles[self.names[at]])
        if self.reduce:  # which takes no strides on a CPU
            ys = [tensor_model_parallel_all_reduce(y.contiguous()) for y in ys]
        return ys, out if self.rider.forward else None

    def _sliced(self, z: torch.Tensor) -> torch.Tensor:
        """This rank's share of the incoming z, of each place."""
        start, stop = self.own_z
        if stop - start == self.rider.backward:
            return z
        return z.unflatten(-1, (self.plan.places, -1))[..., start:stop].flatten(-2)

    def _add(self, ys: list[torch.Tensor], out: torch.Tensor) -> None:
        """Adds pieces of z to projections."""
        if not self.adds:
            return
        if self.plan.places > 1:  # all but one of them are zeros
            out = out.unflatten(-1, (self.plan.places, -1)).sum(-2)
        pieces = out.split_with_sizes(self.pieces, -1)
        for i, at, matrix in self.adds:
            if matrix is not None:
                ys[at] = ys[at] + matrix(pieces[i])
            else:
                repeat_and_add(ys[at], pieces[i], self.tiles[self.names[at]])


def repeat_and_add(y: torch.Tensor, z: torch.Tensor, tile: torch.Tensor | None) -> None:
    """Adds z `[T, r]`, tiled along the last axis to y's width, to y in place; tile: which channel
    of z each of y's is added, where it is not the plain tiling."""
    if tile is None:
        y.view(y.shape[0], -1, z.shape[-1]).add_(z.unsqueeze(1))
    else:
        y.add_(z[..., tile])


class WritableLinearMethod(UnquantizedLinearMethod):
    """A weight that is written to while it serves. On a CPU vLLM multiplies with a packed copy and
    drops the weight; here it stays, and is packed again after each change."""

    def __init__(self, layer: LinearBase):
        super().__init__()
        context = get_current_vllm_config().compilation_config.static_forward_context
        context[_key(layer.prefix)] = layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs the weight where that is what is multiplied with."""
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x · weightᵀ + bias`."""
        if not current_platform.is_cpu():
            return super().apply(layer, x, layer.weight, bias)
        if torch.compiler.is_compiling():  # a compiled graph would hold the first packed copy
            return torch.ops.vllm.flora_packed_linear(x, bias, layer.prefix, layer.output_size)
        return layer.cpu_linear(x, layer.weight, bias)


def _key(prefix: str) -> str:
    return f"flora:{prefix}"


def _packed_linear(
    x: torch.Tensor, bias: torch.Tensor | None, prefix: str, width: int
) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[_key(prefix)]
    return layer.cpu_linear(x, layer.weight, bias)


def _packed_linear_shape(
    x: torch.Tensor, bias: torch.Tensor | None, prefix: str, width: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width))


direct_register_custom_op(
    op_name="flora_packed_linear", op_func=_packed_linear, fake_impl=_packed_linear_shape
)
