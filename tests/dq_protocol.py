"""A model of the way of dQ in the Hopper backward (docs/backward_sm90.md): who waits for whom.

Every role of every thread block is a generator that yields what it waits for, a function that is
true once it may go on. The scheduler lets any role that may run take its next step, in random
order: a state in which none may and work is left is a deadlock.
"""

from __future__ import annotations

import itertools
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
    clusters: int  # of thread blocks
    group_size: int = 1  # query heads a key head
    tile_m: int = 2
    tile_n: int = 4
    blocks: int = 1  # of a cluster, which share an item and split the groups
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

    def cluster(self) -> list[Step]:
        """The loaders, senders and converters of its thread blocks. Computing warpgroups pass
        loaded tiles on."""
        drawn: list[int] = []
        # Of each thread block: key head, key tile, query tile (None: end of an item) that it has
        # loaded its part of, and how many it has passed on.
        loaded: list[list[tuple[int, int, int | None]]] = [[] for _ in range(self.s.blocks)]
        passed_on = [0] * self.s.blocks
        done: list[bool] = []

        def loader(block: int) -> Step:
            def has_room() -> bool:
                return len(loaded[block]) < min(passed_on) + self.s.stages

            for n in itertools.count():
                if block == 0:
                    yield lambda: True
                    drawn.append(self.next_item)
                    self.next_item += 1
                yield lambda n=n: len(drawn) > n
                if drawn[n] >= len(self.items):
                    done.append(True)
                    return
                n_block, head = self.items[drawn[n]]
                for query_tile in self.query_tiles(n_block):
                    owner = (head - self.s.slots, query_tile)
                    if head >= self.s.slots:
                        yield lambda owner=owner: self.converted[owner] == self.s.groups
                    yield has_room
                    loaded[block].append((head, n_block, query_tile))
                yield has_room
                loaded[block].append((head, n_block, None))

        def may_pass_on(block: int) -> bool:
            """A tile comes in parts from all thread blocks. Their dS of it comes once they have
            added dQ of the last tile but one."""
            n = passed_on[block]
            return all(len(part) > n for part in loaded) and min(passed_on) >= n - 1

        def sender(block: int) -> Step:
            previous = None
            while True:
                yield (
                    lambda: (
                        may_pass_on(block)
                        or (len(done) == self.s.blocks and passed_on[block] == len(loaded[block]))
                    )
                )
                if passed_on[block] == len(loaded[block]):
                    return
                head, n_block, tile = loaded[block][passed_on[block]]
                if tile is not None:
                    if self.s.deterministic:
                        turn = self.s.blocks * self.expected(tile).index(n_block)
                        yield lambda k=(head, tile), turn=turn: self.contributed[k] >= turn
                        assert self.contributed[head, tile] < turn + self.s.blocks
                    for group in range(self.s.groups):
                        if group * self.s.blocks // self.s.groups == block:
                            yield lambda: True
                            self.sums[head % self.s.slots, tile][group].append((head, n_block))
                passed_on[block] += 1
                if self.s.blocks > 1 and tile is not None:
                    yield lambda: True
                    self.contributed[head, tile] += 1
                    continue
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
                shares_expected = self.s.blocks * len(expected)
                if expected:
                    if self.contributed[key] < shares_expected and unannounced:
                        self.converted[unannounced] += 1
                        unannounced = None
                    yield lambda k=key, n=shares_expected: self.contributed[k] == n
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

        blocks = range(self.s.blocks)
        return [
            *(loader(block) for block in blocks),
            *(sender(block) for block in blocks),
            *(converter() for _ in range(self.s.blocks * self.s.converters)),
        ]

    def run(self) -> None:
        """Until all is done. Raises AssertionError at a deadlock, or where a result is wrong."""
        roles = [role for _ in range(self.s.clusters) for role in self.cluster()]
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
