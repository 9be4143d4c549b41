"""Brute force of csrc/arith through flash_attn_host: masks, tile ranges, tile order, Philox,
dropout, sequences."""

from __future__ import annotations

import importlib
import itertools
import random
from types import ModuleType

import pytest

np = pytest.importorskip("numpy")  # test_environment.py sees to it that CI has it

INT_MAX = 2**31 - 1
BOUNDS = (-1, 0, 1, 6, 70, 1000, INT_MAX)
SEQLENS = (0, 1, 2, 5, 31, 64, 65, 130)
TILES = ((1, 1), (3, 2), (16, 16), (32, 64), (64, 32), (128, 128))


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """Built by `make host`."""
    return importlib.import_module("flash_attn_host")


def visible(left: int, right: int, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """The mask rule in its own words: a band around the bottom-right diagonal."""
    row = np.arange(seqlen_q, dtype=np.int64)[:, None]
    key = np.arange(seqlen_k, dtype=np.int64)[None, :]
    distance = key - (row + seqlen_k - seqlen_q)
    below = distance >= -left if left >= 0 else np.full(distance.shape, True)
    above = distance <= right if right >= 0 else np.full(distance.shape, True)
    return below & above


def tiles(matrix: np.ndarray, tile_m: int, tile_n: int) -> tuple[np.ndarray, np.ndarray]:
    """Per tile: some pair visible; every pair visible, where keys outside the matrix are not."""
    seqlen_q, seqlen_k = matrix.shape
    rows, cols = -(-seqlen_q // tile_m), -(-seqlen_k // tile_n)
    some = np.zeros((rows * tile_m, cols * tile_n), dtype=bool)
    some[:seqlen_q, :seqlen_k] = matrix
    every = some.copy()
    every[seqlen_q:] = True  # rows that don't exist need no mask
    shape = (rows, tile_m, cols, tile_n)
    return some.reshape(shape).any(axis=(1, 3)), every.reshape(shape).all(axis=(1, 3))


def hull(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-open range of the true flags of each line; max == min where there are none."""
    begin = flags.argmax(axis=1)
    end = flags.shape[1] - flags[:, ::-1].argmax(axis=1)
    return begin, np.where(flags.any(axis=1), end, begin)


def check_ranges(flags: np.ndarray, ranges: np.ndarray, what: str) -> None:
    """The range holds every flagged tile and nothing else; an empty range is any min == max."""
    begin, end = hull(flags) if flags.shape[1] else (np.zeros(len(flags)), np.zeros(len(flags)))
    assert (flags.sum(axis=1) == end - begin).all(), f"{what}: flagged tiles are not contiguous"
    assert (ranges[:, 0] <= ranges[:, 1]).all(), f"{what}: max < min in {ranges}"
    empty = begin == end
    assert (ranges[empty, 0] == ranges[empty, 1]).all(), f"{what}: {ranges} visits hidden tiles"
    expected = np.stack([begin, end], axis=1)[~empty]
    assert (ranges[~empty] == expected).all(), f"{what}: expected {expected}, got {ranges[~empty]}"


@pytest.mark.parametrize("left", BOUNDS)
@pytest.mark.parametrize("right", BOUNDS)
def test_tile_ranges_match_the_mask_rule(host: ModuleType, left: int, right: int) -> None:
    mask = host.Mask(left, right)
    for seqlen_q, seqlen_k in itertools.product(SEQLENS, SEQLENS):
        matrix = visible(left, right, seqlen_q, seqlen_k)
        case = f"window ({left}, {right}), seqlens {seqlen_q} x {seqlen_k}"
        assert (host.attends_matrix(mask, seqlen_q, seqlen_k) == matrix).all(), case
        assert host.hides_any_key(mask, seqlen_q, seqlen_k) == (not matrix.all()), case
        for tile_m, tile_n in TILES:
            grid = host.TileGrid(tile_m, tile_n, seqlen_q, seqlen_k, mask)
            what = f"{case}, tile {tile_m} x {tile_n}"
            some, full_n = tiles(matrix, tile_m, tile_n)
            _, full_m = tiles(matrix.T, tile_n, tile_m)
            assert some.shape == (grid.num_m_blocks(), grid.num_n_blocks())
            check_ranges(some, host.n_block_ranges(grid), f"n_block_range, {what}")
            check_ranges(some.T, host.m_block_ranges(grid), f"m_block_range, {what}")
            check_ranges(full_n, host.full_n_block_ranges(grid), f"full_n_block_range, {what}")
            check_ranges(full_m, host.full_m_block_ranges(grid), f"full_m_block_range, {what}")


@pytest.mark.parametrize("left", BOUNDS)
@pytest.mark.parametrize("right", BOUNDS)
def test_full_tiles_lie_inside_the_visited_ones(host: ModuleType, left: int, right: int) -> None:
    mask = host.Mask(left, right)
    for seqlen_q, seqlen_k in itertools.product(SEQLENS, SEQLENS):
        for tile_m, tile_n in TILES:
            grid = host.TileGrid(tile_m, tile_n, seqlen_q, seqlen_k, mask)
            what = f"window ({left}, {right}), {seqlen_q} x {seqlen_k}, tile {tile_m} x {tile_n}"
            for visited, full in (
                (host.n_block_ranges(grid), host.full_n_block_ranges(grid)),
                (host.m_block_ranges(grid), host.full_m_block_ranges(grid)),
            ):
                inside = (visited[:, 0] <= full[:, 0]) & (full[:, 1] <= visited[:, 1])
                assert inside.all(), f"{what}: full {full[~inside]}, visited {visited[~inside]}"


@pytest.mark.parametrize("left", BOUNDS)
@pytest.mark.parametrize("right", BOUNDS)
def test_as_many_key_tiles_visit_a_query_tile_as_it_expects(
    host: ModuleType, left: int, right: int
) -> None:
    """The backward waits for that many; one too few or too many would hang or lose a share."""
    mask = host.Mask(left, right)
    for seqlen_q, seqlen_k in itertools.product(SEQLENS, SEQLENS):
        for tile_m, tile_n in TILES:
            grid = host.TileGrid(tile_m, tile_n, seqlen_q, seqlen_k, mask)
            visits = np.zeros(grid.num_m_blocks(), dtype=int)
            for begin, end in host.m_block_ranges(grid):
                visits[begin:end] += 1
            expected = host.n_block_ranges(grid)
            assert (visits == expected[:, 1] - expected[:, 0]).all(), (
                left,
                right,
                seqlen_q,
                seqlen_k,
            )


# Known answers of Philox4x32-7, from the Random123 distribution: counter, key, bits.
PHILOX_VECTORS = (
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
)


@pytest.mark.parametrize(("counter", "key", "bits"), PHILOX_VECTORS)
def test_philox_gives_the_published_answers(
    host: ModuleType, counter: tuple[int, ...], key: tuple[int, ...], bits: tuple[int, ...]
) -> None:
    assert host.philox4x32_7(*counter, *key) == bits


@pytest.mark.parametrize("state", [(0, 0), (12345, 7), (2**40 + 3, 2**33 + 1), (-1, -1)])
def test_dropout_takes_every_byte_of_a_call_once(host: ModuleType, state: tuple[int, int]) -> None:
    """16 elements a call, in pairs of neighbours 8 apart; all of a block's calls differ."""
    seed, offset = (value % 2**64 for value in state)
    batch_head, rows, cols = 6, 40, 50
    byte = np.full((48, 64), -1)
    for a, b in itertools.product(range(48 // 4), range(64 // 4)):
        words = host.philox4x32_7(a, b, batch_head, offset % 2**32, seed % 2**32, seed // 2**32)
        first_row, first_col = a // 4 * 16 + a % 4 * 2, b // 4 * 16 + b % 4 * 2
        for (below, right), word in zip(itertools.product((0, 8), (0, 8)), words, strict=True):
            for place, (down, aside) in enumerate(itertools.product((0, 1), (0, 1))):
                at = first_row + below + down, first_col + right + aside
                assert byte[at] == -1, "an element has two bytes"
                byte[at] = word >> 8 * place & 255
    assert (byte >= 0).all(), "an element has no byte"
    for last_kept_byte in (0, 127, 229, 254, 255):
        kept = host.kept_matrix(last_kept_byte, *state, batch_head, rows, cols)
        assert (kept == (byte[:rows, :cols] <= last_kept_byte)).all()


def as_slices(
    batch: int, rows: int, entries: int, cu: list[int] | None, entry: int | None
) -> tuple[int, list[int]]:
    """Entry and row numbers of a sequence, by slicing."""
    if cu is None:
        return min(max(batch if entry is None else entry, 0), entries - 1), list(range(rows))
    begin, end = max(cu[batch], 0), max(cu[batch + 1], 0)
    return 0, list(range(rows))[begin:end]


def check_sequences(
    host: ModuleType, batch: int, rows_q: int, rows_k: int, **given: object
) -> None:
    """sequence_of() against slices of the rows; nothing outside of the tensors, whatever is given.

    The rows of softmax_d that sequences have are whole tiles, and disjoint if those of q are.
    """
    entries_k = 1 if given["cu_seqlens_k"] else 3 if given["batch_idx_k"] else batch
    table = host.sequence_table(batch, rows_q, rows_k, entries_k, **given).tolist()
    entries_q = 1 if given["cu_seqlens_q"] else batch
    d_rows = host.packed_softmax_d_rows(batch, rows_q)
    d_end, q_end = 0, 0
    for idx, (entry_q, first_q, seqlen_q, entry_k, first_k, seqlen_k, first_d) in enumerate(table):
        entry, expected = as_slices(idx, rows_q, entries_q, given["cu_seqlens_q"], None)
        assert entry_q == entry and list(range(first_q, first_q + seqlen_q)) == expected
        of_batch = {name: values and values[idx] for name, values in given.items()}
        entry, expected = as_slices(
            idx, rows_k, entries_k, given["cu_seqlens_k"], of_batch["batch_idx_k"]
        )
        if of_batch["seqused_k"] is not None:
            expected = expected[: max(of_batch["seqused_k"], 0)]
        if of_batch["leftpad_k"] is not None:
            expected = expected[max(of_batch["leftpad_k"], 0) :]
        assert entry_k == entry and list(range(first_k, first_k + seqlen_k)) == expected
        assert 0 <= first_q <= first_q + seqlen_q <= rows_q and 0 <= entry_q < entries_q
        assert 0 <= first_k <= first_k + seqlen_k <= rows_k and 0 <= entry_k < entries_k
        if given["cu_seqlens_q"] is None:
            assert first_d == 0
        else:
            assert first_d % 128 == 0 and first_d + host.round_up(seqlen_q, 128) <= d_rows
            assert first_d >= d_end or first_q < q_end or seqlen_q == 0
            d_end, q_end = first_d + host.round_up(seqlen_q, 128), first_q + seqlen_q


def random_values(draw: random.Random, count: int, most: int, garbage: bool) -> list[int]:
    if not garbage:
        return [draw.randint(0, most) for _ in range(count)]
    choices = (-INT_MAX - 1, -1, 0, most, INT_MAX)
    return [draw.choice((draw.randint(-most, 2 * most), *choices)) for _ in range(count)]


@pytest.mark.parametrize("garbage", [False, True])
def test_sequences_are_slices_of_the_rows(host: ModuleType, garbage: bool) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        batch, rows_q, rows_k = draw.randint(1, 5), draw.randint(0, 300), draw.randint(0, 300)
        cu_q = random_values(draw, batch + 1, rows_q, garbage)
        cu_k = random_values(draw, batch + 1, rows_k, garbage)
        packed_k = draw.random() < 0.5
        given = {
            "cu_seqlens_q": cu_q if garbage else sorted(cu_q),
            "cu_seqlens_k": (cu_k if garbage else sorted(cu_k)) if packed_k else None,
            "seqused_k": random_values(draw, batch, rows_k, garbage),
            "leftpad_k": random_values(draw, batch, rows_k, garbage),
            "batch_idx_k": None if packed_k else random_values(draw, batch, 2, garbage),
        }
        chosen = {name: draw.choice((None, value)) for name, value in given.items()}
        check_sequences(host, batch, rows_q, rows_k, **chosen)


ORDERS = tuple(itertools.product((1, 2, 7), (1, 3, 8), (1, 2, 3, 8), (False, True)))


@pytest.mark.parametrize(("num_blocks", "num_batch_heads", "heads", "descending"), ORDERS)
def test_tile_order_is_a_permutation_longest_first(
    host: ModuleType, num_blocks: int, num_batch_heads: int, heads: int, descending: bool
) -> None:
    table = host.TileOrder(num_blocks, num_batch_heads, heads, descending).table()
    every_tile = set(itertools.product(range(num_blocks), range(num_batch_heads)))
    assert len(table) == len(every_tile)
    assert {tuple(row) for row in table.tolist()} == every_tile
    sections = table[:, 1] // heads
    assert (np.diff(sections) >= 0).all(), "a section ends before the next one starts"
    for section in np.unique(sections):
        blocks = table[sections == section, 0]
        steps = np.diff(blocks)
        assert (steps <= 0).all() if descending else (steps >= 0).all()
        longest = num_blocks - 1 if descending else 0
        assert blocks[0] == longest


@pytest.mark.parametrize(("num_blocks", "num_batch_heads", "heads", "descending"), ORDERS)
@pytest.mark.parametrize("at_least", [1, 3, 9])
def test_the_last_section_is_as_large_as_asked(
    host: ModuleType,
    num_blocks: int,
    num_batch_heads: int,
    heads: int,
    descending: bool,
    at_least: int,
) -> None:
    first = host.first_in_last_section(at_least, heads, num_batch_heads)
    table = host.TileOrder(num_blocks, num_batch_heads, heads, descending, first).table()
    assert 0 <= first <= num_batch_heads - min(at_least, num_batch_heads)
    assert first % heads == 0 and num_batch_heads - first < at_least + heads
    # Before it the order is that of the heads before it alone, in it that of a single section.
    before, last = table[: first * num_blocks], table[first * num_blocks :]
    if first > 0:
        alone = host.TileOrder(num_blocks, first, heads, descending).table()
        assert (before == alone).all()
    rest = num_batch_heads - first
    one_section = host.TileOrder(num_blocks, rest, rest, descending).table()
    assert (last == one_section + [0, first]).all()


def test_descending_order_starts_with_the_longest_causal_tiles(host: ModuleType) -> None:
    grid = host.TileGrid(64, 32, 1000, 1000, host.Mask(-1, 0))
    ranges = host.n_block_ranges(grid)
    work = ranges[:, 1] - ranges[:, 0]
    table = host.TileOrder(len(ranges), 4, 4, True).table()
    assert (np.diff(work[table[:, 0]]) <= 0).all()
    assert work[table[0, 0]] == work.max() > work.min()


def test_heads_per_section_fills_the_budget(host: ModuleType) -> None:
    assert host.heads_per_section(100, 250, 8) == 2
    assert host.heads_per_section(100, 99, 8) == 1, "one head even where it doesn't fit"
    assert host.heads_per_section(100, 10_000, 8) == 8, "no more heads than there are"
    assert host.heads_per_section(0, 10_000, 8) == 8, "heads without keys cost nothing"
    assert host.heads_per_section(2**40, 2**42, 8) == 4, "sizes past 32 bits"


def test_rounding(host: ModuleType) -> None:
    for value, unit in itertools.product(range(20), range(1, 9)):
        assert host.ceil_div(value, unit) == -(-value // unit)
        assert host.round_up(value, unit) == -(-value // unit) * unit
