"""A model of the way of dQ in the Hopper backward (docs/backward_sm90.md): who waits for whom.

Every role of every thread block is a generator that yields what it waits for, a function that is
true once it may go on. The scheduler lets any role that may run take its next step, in random
order: a state in which none may and work is left is a deadlock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

Step = Iterator[Callable[[], bool]]


@dataclass(frozen=True)
class Setting:
    """A problem and how it is cut. Sizes are those of one key head with one query head."""

    seqlen_q: int
    seqlen_k: int
    window: tuple[int, int]
    key_heads: int
    section: int  # key heads a section
    slots: int
    deterministic: bool
    blocks: int  # thread blocks
    group_size: int = 1  # query heads a key head
    tile_m: int = 2
    tile_n: int = 4
    groups: int = 2  # of a dQ tile, converted one by one
    converters: int = 2
    stages: int = 2  # query tiles that are loaded ahead

    @property
    def ascending(self) -> bool:
        """Items walk from the diagonal on, and a key head's last key tile is drawn first."""
        return self.deterministic and self.window[1] >= 0


class Model:
    def __init__(self, host: ModuleType, setting: Setting, seed: int) -> None:
        self.s, self.random = setting, random.Random(seed)
        mask = host.Mask(*setting.window)
        grid = host.TileGrid(
            setting.tile_m, setting.tile_n, setting.seqlen_q, setting.seqlen_k, mask
        )
        self.m_ranges = [tuple(map(int, r)) for r in host.m_block_ranges(grid)]
        self.n_ranges = [tuple(map(int, r)) for r in host.n_block_ranges(grid)]
        self.m_blocks = len(self.n_ranges)
        self.tiles = setting.group_size * self.m_blocks
        sizes = (setting.key_heads, setting.section)
        # Rows of (block, key head).
        ascending = setting.ascending
        self.items = host.TileOrder(len(self.m_ranges), *sizes, ascending).table().tolist()
        self.order = host.TileOrder(self.tiles, *sizes, not ascending).table().tolist()
        self.next_item = self.next_group = 0
        pairs = [(h, t) for h in range(setting.key_heads) for t in range(self.tiles)]
        self.contributed = dict.fromkeys(pairs, 0)
        self.converted = dict.fromkeys(pairs, 0)
        # (slot, tile) -> per group the shares that are in the sums: (key head, key tile)
        self.sums: dict[tuple[int, int], list[list[tuple[int, int]]]] = {
            (slot, tile): [[] for _ in range(setting.groups)]
            for slot in range(setting.slots)
            for tile in range(self.tiles)
        }
        self.dq: dict[tuple[int, int, int], list[int]] = {}

    def expected(self, tile: int) -> list[int]:
        """The key tiles that see a query tile, in the order in which they are drawn."""
        key_tiles = list(range(*self.n_ranges[tile % self.m_blocks]))
        return key_tiles[::-1] if self.s.ascending else key_tiles

    def query_tiles(self, n_block: int) -> list[int]:
        heads, tiles = range(self.s.group_size), range(*self.m_ranges[n_block])
        in_order = [h * self.m_blocks + m for h in heads for m in tiles]
        return in_order if self.s.ascending else in_order[::-1]

    def thread_block(self) -> list[Step]:
        """Its loader, sender and converters. Computing warpgroups pass loaded tiles on."""
        loaded: list[tuple[int, int, int | None]] = []  # key head, key tile, query tile; None: end
        done: list[bool] = []

        def loader() -> Step:
            while True:
                yield lambda: True
                item, self.next_item = self.next_item, self.next_item + 1
                if item >= len(self.items):
                    done.append(True)
                    return
                n_block, head = self.items[item]
                for query_tile in self.query_tiles(n_block):
                    owner = (head - self.s.slots, query_tile)
                    if head >= self.s.slots:
                        yield lambda owner=owner: self.converted[owner] == self.s.groups
                    yield lambda: len(loaded) < self.s.stages
                    loaded.append((head, n_block, query_tile))
                yield lambda: len(loaded) < self.s.stages
                loaded.append((head, n_block, None))

        def sender() -> Step:
            previous = None
            while True:
                yield lambda: bool(loaded or done)
                if not loaded:
                    return
                head, n_block, tile = loaded.pop(0)
                if tile is not None:
                    if self.s.deterministic:
                        turn = self.expected(tile).index(n_block)
                        yield lambda k=(head, tile), turn=turn: self.contributed[k] >= turn
                        assert self.contributed[head, tile] == turn
                    for group in range(self.s.groups):
                        yield lambda: True
                        self.sums[head % self.s.slots, tile][group].append((head, n_block))
                if previous is not None:
                    yield lambda: True
                    self.contributed[previous] += 1
                previous = None if tile is None else (head, tile)

        def converter() -> Step:
            unannounced = None
            while True:
                yield lambda: True
                number, self.next_group = self.next_group, self.next_group + 1
                if number >= self.s.groups * len(self.order):
                    break
                group = number % self.s.groups
                tile, head = self.order[number // self.s.groups]
                key, expected = (head, tile), self.expected(tile)
                if expected:
                    if self.contributed[key] < len(expected) and unannounced:
                        self.converted[unannounced] += 1
                        unannounced = None
                    yield lambda k=key, all_of=expected: self.contributed[k] == len(all_of)
                if unannounced:
                    self.converted[unannounced] += 1
                yield lambda: True
                shares: list[tuple[int, int]] = []
                if expected:
                    slot = self.sums[head % self.s.slots, tile]
                    shares, slot[group] = slot[group], []
                assert all(owner == head for owner, _ in shares), "another key head's sums"
                self.dq[head, tile, group] = [n_block for _, n_block in shares]
                unannounced = key
            if unannounced:
                self.converted[unannounced] += 1

        return [loader(), sender(), *(converter() for _ in range(self.s.converters))]

    def run(self) -> None:
        """Until all is done. Raises AssertionError at a deadlock, or where a result is wrong."""
        roles = [role for _ in range(self.s.blocks) for role in self.thread_block()]
        waiting = [(role, next(role)) for role in roles]
        while waiting:
            able = [i for i, (_, may_go_on) in enumerate(waiting) if may_go_on()]
            assert able, f"deadlock: {self.s}"
            i = self.random.choice(able)
            role = waiting[i][0]
            try:
                waiting[i] = (role, next(role))
            except StopIteration:
                del waiting[i]
        for head in range(self.s.key_heads):
            for tile in range(self.tiles):
                for group in range(self.s.groups):
                    shares, expected = self.dq[head, tile, group], self.expected(tile)
                    in_order = shares if self.s.deterministic else sorted(shares)
                    assert in_order == expected, f"{shares} instead of {expected}: {self.s}"
        assert not any(any(groups) for groups in self.sums.values()), "sums that nobody converted"
