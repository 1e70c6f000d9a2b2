"""Accelerators: names of slices, and what is known of a device."""

from __future__ import annotations

import math

import pytest

from eso_jax import chips
from eso_jax.errors import EsoError


@pytest.mark.parametrize(("name", "topology", "count"), [
    ("v5p-1024", "v5p:8x8x8", 512), ("v5p-8", "v5p:2x2x1", 4), ("v4-32", "v4:2x2x4", 16),
    ("v5litepod-8", "v5e:2x4", 8), ("v6e-256", "v6e:16x16", 256), ("v5p:16x16x24", "v5p:16x16x24", 6144),
    ("V6E:2X2", "v6e:2x2", 4), ("tpu7x:4x4x4", "tpu7x:4x4x4", 128), ("h100:8", "h100:8", 8),
    ("h100:4x8", "h100:4x8", 32)])
def test_both_names_of_a_slice(name: str, topology: str, count: int) -> None:
    found = chips.topology(name)
    assert found.name == topology and found.devices == count
    assert chips.topology(found.accelerator_type or topology) == found


def test_accelerator_types_count_cores_or_chips() -> None:
    for name, topology in chips.ACCELERATOR_TYPES.items():
        kind, _, count = name.rpartition("-")
        per_chip = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}[kind]
        assert math.prod(chips.topology(topology).shape) * per_chip == int(count)


@pytest.mark.parametrize(("name", "says"), [
    ("v5p-7", "v5p-8, v5p-16"), ("v5p", "kind:AxBxC"), ("v9:2x2", "known are v4, v5e"), ("v5e:2x2x2", "v5e:4x4"),
    ("v5p:8x8", "v5p:4x4x4"), ("v5e:0x4", "v5e comes in AxB"), ("h100:2x2x2", "HOSTSxGPUS")])
def test_a_wrong_name_is_told_what_would_be_right(name: str, says: str) -> None:
    with pytest.raises(EsoError, match=f"--topology = '{name}': .*{says}"):
        chips.topology(name)


def test_a_device_is_known_by_its_kind() -> None:
    assert chips.of_device("TPU v5 lite") is chips.CHIPS["v5e"]
    assert chips.of_device("NVIDIA H200") is chips.CHIPS["h200"]
    assert chips.of_device("cpu") is None
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    for chip in chips.CHIPS.values():  # operations per byte: a slip of a power of ten would show
        assert 100 < chip.flops / chip.bandwidth < 1000 and 2 < chip.bandwidth / chip.network < 14
