"""Block sizes: an entry of the table serves its device, its kind of array and widths near it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from flora_jax.models import decode_blocks
from flora_jax.models.decode_blocks import Blocks, Shape, blocks_for, default_blocks
from flora_jax.models.decode_product import Term, decode_product

SHAPE = Shape(8, 2048, 3072, "bfloat16", True)
ENTRY = {
    **{"device": "a card", "batch": 4, "d_in": 2048, "d_out": 3000},
    **{"dtype": "bfloat16", "transposed": True, "reads": "bfloat16", "added": False},
    **{"columns": 64, "rows": 128, "stages": 3, "warps": 8},
}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(decode_blocks, "table", lambda: [ENTRY])
    monkeypatch.setattr(decode_blocks, "_device", lambda: "a card")


@pytest.mark.parametrize(
    "changes, found",
    [
        ({}, True),
        ({"d_out": 3374}, True),
        ({"d_out": 3376}, False),
        ({"added": True}, False),
        ({"reads": "float32"}, False),
        ({"d_in": 1792}, True),
        ({"d_in": 1791}, False),
        ({"batch": 2}, True),
        ({"batch": 1}, False),
        ({"batch": 9}, False),
        ({"dtype": "int8"}, False),
        ({"transposed": False}, False),
    ],
)
def test_what_an_entry_serves(measured, changes, found):
    shape = SHAPE._replace(**changes)
    assert blocks_for(shape) == (Blocks(64, 128, 3, 8) if found else default_blocks(shape))


def test_another_device_has_the_defaults(measured, monkeypatch):
    monkeypatch.setattr(decode_blocks, "_device", lambda: "another")
    assert blocks_for(SHAPE) == default_blocks(SHAPE)


def test_a_plan_is_of_the_device_that_it_is_made_for():
    assert decode_blocks._device() == jax.devices()[0].device_kind
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("a card", 132, "gpu"))
    with use_abstract_mesh(mesh):
        assert decode_blocks._device() == "a card"


def test_a_product_is_cut_as_its_entry_says(measured):
    def product(x, kernel):
        return decode_product([Term(x, kernel, transposed=True)], 3072, interpret=True)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 2048), (3072, 2048)))
    program = str(jax.make_jaxpr(product)(*shapes))
    assert "grid=(48,)" in program and "num_warps=8" in program and "num_stages=3" in program


def test_the_nearest_entry_serves(measured, monkeypatch):
    near = ENTRY | {"d_out": 3072, "columns": 16}
    monkeypatch.setattr(decode_blocks, "table", lambda: [ENTRY, near, ENTRY | {"d_out": 3100}])
    assert blocks_for(SHAPE).columns == 16


def test_what_is_measured_again_is_replaced():
    """Also by nothing, where the default is as fast."""
    new, other = ENTRY | {"columns": 16}, ENTRY | {"batch": 1}
    assert decode_blocks.replaced([ENTRY, other], [new], [new]) == [other, new]
    assert decode_blocks.replaced([ENTRY, other], [new], []) == [other]


def test_the_table_that_is_served_from():
    """Blocks that a kernel takes: powers of two, as many as a tensor core wants."""
    for entry in decode_blocks.table():
        assert entry.keys() == ENTRY.keys()
        blocks = [entry[field] for field in Blocks._fields]
        assert entry["columns"] >= 16 and entry["rows"] >= 16 and min(blocks) >= 1
        assert all(n & (n - 1) == 0 for n in (entry["columns"], entry["rows"], entry["warps"]))
