"""The way of dQ in the Hopper backward, as a model in random order: no deadlock, no lost share."""

from __future__ import annotations

import importlib
import random
from types import ModuleType

import pytest
from dq_protocol import Model, Setting


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """Built by `make host`."""
    return importlib.import_module("flash_attn_host")


def random_setting(draw: random.Random) -> Setting:
    key_heads = draw.randint(1, 7)
    section = draw.randint(1, min(3, key_heads))
    return Setting(
        seqlen_q=draw.randint(1, 13),
        seqlen_k=draw.randint(1, 17),
        window=draw.choice([(-1, -1), (-1, 0), (2, 1), (0, 0), (-1, 3), (4, -1)]),
        key_heads=key_heads,
        section=section,
        slots=min(draw.randint(1, 3) * section, key_heads),
        deterministic=draw.random() < 0.5,
        clusters=draw.randint(1, 6),
        blocks=draw.randint(1, 2),
        group_size=draw.randint(1, 2),
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_order_ends_with_every_share_converted(host: ModuleType, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(12):
        Model(host, random_setting(draw), draw.randrange(2**30)).run()


def test_the_model_finds_a_deadlock(host: ModuleType) -> None:
    """Fewer slots than a section has key heads: an item waits for one that is drawn after it."""
    setting = Setting(8, 16, (-1, -1), 4, section=2, slots=1, deterministic=False, clusters=1)
    with pytest.raises(AssertionError, match="deadlock"):
        for seed in range(20):
            Model(host, setting, seed).run()
