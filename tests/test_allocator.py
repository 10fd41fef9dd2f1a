"""The model of torch's caching allocator against what is published of the real one: constants, tests, traces, snapshots."""

import itertools
import random
import re
from pathlib import Path

import numpy
import pytest
import torch

from zerotune.plan import allocator as rules
from zerotune.plan.allocator import FREE, LIVE, Allocator, OutOfMemory, Peaks, replay

KIB, MIB, GIB = 2**10, 2**20, 2**30
BOTH = pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])


def after(script, expandable=False, limit=None):
    """Return the Allocator after the words of a script: a:1.5 allocates a, of 1.5 MiB; -a frees it; empty_cache. limit: MiB."""
    allocator = Allocator(expandable, limit and int(limit * MIB))
    for word in script.split():
        if word == "empty_cache":
            allocator.empty_cache()
        elif word.startswith("-"):
            allocator.free(word[1:])
        else:
            name, size = word.split(":")
            allocator.allocate(name, float(size) * MIB)
    return allocator


def places(allocator, names):
    """Return where blocks begin, in MiB, in their pools."""
    return [allocator.blocks[name].address / MIB for name in names.split()]


def totals(segments):
    """Return (size, live bytes, free bytes) of each segment."""
    sums = [[sum(size for _, size, state in blocks if state is wanted) for wanted in (LIVE, FREE)] for _, blocks in segments]
    return [(live + free, live, free) for live, free in sums]


def test_constants_of_the_installed_torch():
    header = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
    published = {name: int(value) for name, value in re.findall(r"size_t (\w+)\s*=\s*(\d+);", header.read_text())}
    ours = (rules.SMALL_SEGMENT, rules.MIN_BLOCK, rules.SMALL_REQUEST, rules.MIN_LARGE_REQUEST, rules.LARGE_ROUNDING)
    assert published == dict(zip("kSmallBuffer kMinBlockSize kSmallSize kMinLargeAlloc kRoundLarge".split(), ours, strict=True))
    assert f"large_segment_size_{{{rules.LARGE_SEGMENT}}}" in header.read_text()


@pytest.mark.parametrize(
    ("size", "allocated", "reserved", "expandable_reserved"),
    [
        (0, 0, 0, 0),  # NativeCachingAllocator::allocate() has no block for it
        (1, 512, 2 * MIB, 2 * MIB),  # "a 1 byte allocation will be counted at 512 bytes": zdevito's guide of 2022-08
        (513, 1024, 2 * MIB, 2 * MIB),
        (256 * 4, 1024, 2 * MIB, 2 * MIB),  # torch.randn(256): test_cuda.py::test_memory_stats
        (MIB, MIB, 2 * MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB, 20 * MIB),  # is rounded before its segment is chosen
        (10 * MIB + 512, 10 * MIB + 512, 12 * MIB, 20 * MIB),
        (20 * MIB + 512, 20 * MIB + 512, 22 * MIB, 40 * MIB),
        (84 * MIB, 84 * MIB, 84 * MIB, 100 * MIB),  # 21 * 2**20 floats: test_cuda.py::test_allocator_settings
        (64 * MIB, 64 * MIB, 64 * MIB, 80 * MIB),  # a trace in ROCm/legacy-rocm-build#6603: it maps 80 MiB
    ],
)
def test_one_request(size, allocated, reserved, expandable_reserved):
    assert replay([(1, size)]) == (allocated, reserved)
    assert replay([(1, size)], expandable_segments=True) == (allocated, expandable_reserved)


def test_a_rest_of_a_large_segment_up_to_1_mib_belongs_to_the_request():
    assert replay([(1, 11 * MIB)]) == (12 * MIB, 12 * MIB)  # should_split(): the rest is 1 MiB, and would have to be more
    assert replay([(1, 11 * MIB - 512)]) == (11 * MIB - 512, 12 * MIB)
    assert replay([(1, 11 * MIB)], expandable_segments=True) == (11 * MIB, 20 * MIB)  # there 512 bytes are enough
    assert replay([(1, MIB - 512), (2, 512), (3, MIB)]) == (2 * MIB, 2 * MIB)  # and in the small pool


SMALL, LARGE = 2 * MIB, 20 * MIB
GRAPH = [  # bytes, segments, reserved, reserved when the graph is gone; the last two again with expandable segments
    (512, 1, SMALL, SMALL, SMALL, SMALL),
    (MIB, 2, 2 * SMALL, SMALL, 2 * SMALL, SMALL),
    (MIB + 512, 1, LARGE, LARGE, LARGE, LARGE),
    (10 * MIB - 512, 2, 2 * LARGE, LARGE, 2 * LARGE, 2 * LARGE),
    (10 * MIB + 512, 3, 36 * MIB, 12 * MIB, 2 * LARGE, LARGE),
]


@BOTH
@pytest.mark.parametrize("case", GRAPH, ids=[str(case[0]) for case in GRAPH])
def test_graph_memory_stats(case, expandable):
    # test_cuda.py::test_graph_memory_stats_and_use_result_after_destroy_graph: the statistics of a pool of its own after
    #     b = a.clone()
    #     for _ in range(5): b = b.clone() + 1
    # A capture holds two more blocks of 512 bytes, its random seed and offset, in the small pool.
    size, segments, *reserved = case
    reserved, reserved_in_the_end = reserved[2:] if expandable else reserved[:2]
    allocator = Allocator(expandable)
    held = ["seed", "offset"] if size <= MIB else []
    for name in held:
        allocator.allocate(name, 8)
    allocator.allocate(0, size)
    for step in range(5):
        allocator.allocate("clone", size)
        allocator.allocate(step + 1, size)
        allocator.free("clone")
        allocator.free(step)
    assert (allocator.allocated, allocator.reserved) == (size + 512 * len(held), reserved)
    assert len(allocator.segments()) == (1 if expandable else segments)
    for name in held:
        allocator.free(name)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (size, reserved_in_the_end)
    assert len(allocator.segments()) == 1


def test_small_requests_share_a_segment_and_large_ones_do_not():
    # docs/source/notes/cuda.rst, on MemPool.snapshot(): three tensors of 1 MB are in 1, 1 and 2 segments of 2 MB.
    assert [len(after(script).segments()) for script in ("a:1", "a:1 b:1", "a:1 b:1 c:1")] == [1, 1, 2]
    # test_cuda.py::test_nested_mempool: each tensor of 20 MB is a segment.
    assert totals(after("a:20 b:20").segments()) == [(20 * MIB, 20 * MIB, 0)] * 2


@BOTH
def test_allocate_in_thread_to_pool(expandable):
    # test_cuda.py::TestBlockStateAbsorption: a tensor of 4 floats that is gone, then ten times two of 20 MiB and their sum. 4
    # segments, one of the small pool; with expandable ones 2.
    allocator = after("four:0.00001 -four" + 10 * " a:20 b:20 c:20 -a -b -c", expandable)
    assert len(allocator.segments()) == (2 if expandable else 4)
    assert allocator.peaks == (60 * MIB, 62 * MIB)
    allocator.empty_cache()
    assert (allocator.segments(), allocator.reserved) == ([], 0)


# What torchvision's ResNet-18 allocates, as the author of torch's snapshots recorded it on a GPU: of each convolution the bytes of
# its weight, its channels, the bytes of its output for one image, and of the workspace that it takes for the time of the call. The
# batch norm after it has four tensors of 4 bytes a channel and a counter of 8 bytes, and keeps two statistics of 4 bytes a channel.
# https://github.com/zdevito/zdevito.github.io, assets/trace.html: elements_size and actions, for eight images.
RESNET18 = [
    (37632, 64, 3211264, 114048),
    *4 * [(147456, 64, 802816, 410880)],
    (294912, 128, 401408, 300672),
    (589824, 128, 401408, 1639936),
    (32768, 128, 401408, 38528),
    *2 * [(589824, 128, 401408, 1639936)],
    (1179648, 256, 200704, 1181952),
    (2359296, 256, 200704, 6555648),
    (131072, 256, 200704, 133376),
    *2 * [(2359296, 256, 200704, 6555648)],
    (4718592, 512, 100352, 4721024),
    (9437184, 512, 100352, 26218496),
    (524288, 512, 100352, 526720),
    *2 * [(9437184, 512, 100352, 26218496)],
]
SHORTCUTS = (7, 12, 17)  # the output of their batch norm is freed once it is added
# assets/segments.svg there: size, active_allocated and inactive of each segment after model.cuda() and model(input) with one image.
# _posts/2022-08-16-memory-snapshots.markdown says of it: 14 segments, 106.0MiB, the first with 19398656 bytes active.
SNAPSHOT = [
    (20971520, 19398656, 1572864),
    (20971520, 20971520, 0),
    (20971520, 11042816, 9928704),
    (27262976, 0, 27262976),
    (2097152, 2097152, 0),
    (2097152, 2030592, 66560),
    *5 * [(2097152, 2007040, 90112)],
    (2097152, 2004992, 92160),
    (2097152, 1505280, 591872),
    (2097152, 0, 2097152),
]


def resnet18():
    """Yield the trace's sizes: of the model's tensors, then None, then of a forward pass of one image; negative ones are freed."""
    for weight, channels, _, _ in RESNET18:
        yield from (weight, *4 * [4 * channels], 8)
    yield from (2048000, 4000, None)
    yield 602112  # the image
    for number, (_, channels, output, workspace) in enumerate(RESNET18):
        yield from (output, workspace, -workspace, output, 4 * channels, 4 * channels)
        if number in SHORTCUTS:
            yield -output
        if number == 0:
            yield from (802816, 1605632)  # max pooling: output, indices
    yield from (2048, 4000, MIB, -MIB)  # average pooling; the linear layer and its workspace


def test_recorded_trace_of_resnet18():
    allocator, sizes = Allocator(), resnet18()
    newest = {}  # number of a size's newest block: all that the trace frees
    for number, size in enumerate(itertools.takewhile(lambda size: size is not None, sizes)):
        allocator.allocate(number, size)
    # _posts/2022-12-09-memory-traces.markdown prints where the first six blocks lie in the first segment of 2.0MiB.
    assert [allocator.blocks[number].address for number in range(6)] == [0, 37888, 38400, 38912, 39424, 39936]
    # segments.svg: 12,976,128 bytes of parameters in one segment, 20,922,368 and a gap of 49,152 in the next, 9,437,184 in a third.
    large = [live for size, live, _ in totals(allocator.segments()) if size == 20 * MIB]
    assert large == [12976128, 20922368 + 49152, 9437184]
    for number, size in enumerate(sizes, start=1000):
        if size > 0:
            allocator.allocate(number, size)
            newest[size] = number
        else:
            allocator.free(newest.pop(-size))
    assert sorted(totals(allocator.segments())) == sorted(SNAPSHOT)
    assert allocator.peaks.reserved == sum(size for size, _, _ in SNAPSHOT) == 106 * MIB


def test_recorded_growth_with_a_guard():
    # pytorch/pytorch#123548 and #193400, measured with torch 2.12: a canary of 64 MiB, then in each cycle A of 91 and B of 45.5 MiB
    # and a guard of 2 MiB; A and B are freed, the guard stays. After cycle 0 allocated is 66 and reserved 220 MiB. With expandable
    # segments alone and with the defaults reserved stays under 500 MiB, while allocated grows to 306.
    cycle = " a{0}:91 b{0}:45.5 guard{0}:2 -a{0} -b{0}"
    first = after("canary:64" + cycle.format(0), expandable=True)
    assert (first.allocated, first.reserved) == (66 * MIB, 220 * MIB)
    for expandable in (False, True):
        allocator = after("canary:64" + "".join(map(cycle.format, range(121))), expandable)
        assert allocator.allocated == 306 * MIB
        assert allocator.peaks.reserved < 500 * MIB


@BOTH
def test_out_of_memory(expandable):
    # test_cuda.py::test_out_of_memory_retry: a half of a device, part of which CUDA takes, can be had once, and again when freed.
    total, usable = 16 * 1024, 16 * 1024 - 400
    assert after(f"a:{total / 2} -a b:{total / 2}", expandable, usable).allocated == total // 2 * MIB
    with pytest.raises(OutOfMemory) as error:
        after(f"a:{total / 2} b:{total / 2}", expandable, usable)
    assert error.value.request == total // 2 * MIB
    assert error.value.peaks.allocated == total // 2 * MIB
    # test_set_per_process_memory_fraction: with a half allowed and 2 MiB taken 0.499 fit, a half does not.
    allocator = after(f"a:0.004 big:{total * 0.499 - 2} -big empty_cache", expandable, total / 2)
    assert allocator.reserved == 2 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate("half", total // 2 * MIB)
    allocator.allocate("another", 4096)  # "ensure out of memory error doesn't disturb" what follows
    # test_max_split_expandable: 120 MiB are three times 40 and no fourth, and once 120 when those are freed.
    three = "a:40 b:40 c:40"
    with pytest.raises(OutOfMemory):
        after(three + " d:40", expandable, 120)
    assert after(three + " -a -b -c d:120", expandable, 120).peaks == (120 * MIB, 120 * MIB)


def test_best_fit():
    # 5 + 3 + 7 + 2 MiB of 20: once a (5) and c (7) are free, 4 MiB fit into both of them and into the last 3 MiB not at all.
    assert places(after("a:5 b:3 c:7 d:2 -a -c e:4"), "e") == [0]
    assert places(after("a:7 b:3 c:5 d:2 -a -c e:4"), "e") == [10]  # the smaller one, although it lies behind
    assert places(after("a:5 b:3 c:5 d:2 -a -c e:4"), "e") == [0]  # the lower of two equals
    assert places(after("a:5 b:3 c:7 d:2 -a -c e:2.5"), "e") == [17]
    assert after("a:5 b:3 c:7 d:2 -a -c e:8").reserved == 40 * MIB  # 15 MiB are free, and no 8 in one piece


def test_free_neighbours_become_one_block():
    for order in itertools.permutations("abc"):
        allocator = after("a:5 b:5 c:5 d:5 " + " ".join(f"-{name}" for name in order))
        assert totals(allocator.segments()) == [(20 * MIB, 5 * MIB, 15 * MIB)]
        assert [size for _, size, _ in allocator.segments()[0][1]] == [15 * MIB, 5 * MIB]
        allocator.allocate("e", 15 * MIB)
        assert allocator.reserved == 20 * MIB
    assert after("a:12 b:12 -a -b c:24").reserved == 48 * MIB  # not across segments
    assert after("a:12 b:12 -a -b c:24", expandable=True).reserved == 40 * MIB  # the two pages that 24 MiB took


def test_a_large_block_serves_small_pieces_but_not_the_small_pool():
    allocator = after("a:100 -a b:2 c:3 d:1")
    assert totals(allocator.segments()) == [(2 * MIB, MIB, MIB), (100 * MIB, 5 * MIB, 95 * MIB)]
    assert after("a:100 -a b:2 empty_cache").reserved == 100 * MIB  # 2 MiB hold all of it


def test_the_end_of_an_expandable_segment_is_saved():
    # 6 + 9 of 20 MiB, then the 6 are freed: 4 MiB fit best into the last 5, but those can grow. get_free_block().
    assert places(after("a:6 b:9 -a c:4"), "c") == [15]
    assert places(after("a:6 b:9 -a c:4", expandable=True), "c") == [0]
    assert places(after("a:5 b:3 c:5 d:2 -a -c e:4", expandable=True), "e") == [0]  # the lower of two equals
    # 10 MiB beside a hole of 20 count as 30, and 12 are less.
    assert places(after("a:10 b:30 c:20 e:12 f:8 -b -e empty_cache g:5", expandable=True), "g") == [60]
    # 7 MiB fit nowhere: 5 are there, the rest is mapped behind them.
    grown = after("a:6 b:9 -a c:7", expandable=True)
    assert (places(grown, "c"), grown.reserved) == ([15], 40 * MIB)


def test_unmapped_pages_of_an_expandable_segment():
    # b covers 10 to 40 MiB, of which the page from 20 to 40 can be given back.
    hole = "a:10 b:30 c:20 -b empty_cache"
    allocator = after(hole, expandable=True)
    assert allocator.reserved == 40 * MIB
    assert totals(allocator.segments()) == [(20 * MIB, 10 * MIB, 10 * MIB), (20 * MIB, 20 * MIB, 0)]
    # 25 MiB begin in the free rest and bring the page back: find_expandable_block() takes the lowest addresses.
    refilled = after(hole + " d:25", expandable=True)
    assert (places(refilled, "d"), refilled.reserved) == ([10], 60 * MIB)
    assert totals(refilled.segments()) == [(60 * MIB, 55 * MIB, 5 * MIB)]
    # 35 MiB are more than the hole has, and go to the end.
    assert places(after(hole + " d:35", expandable=True), "d") == [60]
    # A piece on both sides of a live one: two holes, and both are filled where a request needs them.
    holes = after("a:20 b:20 c:1.5 d:58.5 -a -b -d empty_cache e:90", expandable=True)
    assert (places(holes, "e"), holes.reserved) == ([41.5], 100 * MIB)


def test_what_is_given_back_under_a_limit():
    # 20 MiB for a and 30 for b are cached when 44 are asked for, 60 allowed: both go.
    allocator = after("a:5 b:30 -a -b c:44", limit=60)
    assert (allocator.reserved, allocator.peaks) == (44 * MIB, (44 * MIB, 50 * MIB))
    assert after("a:5 b:30 -a -b c:44").peaks.reserved == 94 * MIB
    # One live piece keeps its segment from CUDA, and 20 + 44 are more than 60.
    with pytest.raises(OutOfMemory):
        after("a:5 x:5 b:30 -a -b c:44", limit=60)
    # Segments of both pools go, for either: 20 of the large pool, for a block of the small one, and the reverse.
    assert after("a:5 -a b:0.5", limit=20).reserved == 2 * MIB
    assert after("a:0.5 -a b:5", limit=20).reserved == 20 * MIB
    # 60 MiB of pages are mapped, 80 allowed: the page of b is given back, and 40 MiB are mapped behind c.
    pages = after("a:20 b:20 c:20 -b d:40", expandable=True, limit=80)
    assert (places(pages, "d"), pages.reserved, pages.peaks.reserved) == ([60], 80 * MIB, 80 * MIB)
    with pytest.raises(OutOfMemory):
        after("a:20 b:20 c:20 -b d:60", expandable=True, limit=80)


def test_a_step_may_need_more_the_second_time():
    # New segments: 3 of 20, 16 of the 17 left, 18 of their own. Cached ones: 3 go into the 18, 16 into the 20, and 18 fit nowhere.
    step = " a:3 b:16 c:18 -a -b -c"
    assert [after(step * times).peaks.reserved // MIB for times in (1, 2, 3)] == [38, 56, 56]
    assert [after(step * times, expandable=True).peaks.reserved // MIB for times in (1, 2, 3)] == [40, 40, 40]


def random_trace(seed, events=2000, largest=64 * MIB):
    """Return a trace of sizes over all scales, some often repeated as in training; it ends with all freed."""
    chance = random.Random(seed)
    common = [int(2 ** chance.uniform(6, largest.bit_length() - 1)) for _ in range(12)]
    trace, live = [], []
    for number in range(1, events):
        size = chance.choice(common) if chance.random() < 0.7 else int(2 ** chance.uniform(0, largest.bit_length() - 1))
        trace.append((number, size))
        live.append(number)
        while live and chance.random() < (0.5 if len(live) < 60 else 0.6):
            trace.append((-live.pop(chance.randrange(len(live))), 0))
    chance.shuffle(live)
    return trace + [(-number, 0) for number in live]


def check(allocator):
    """Assert what is true of a real allocator at each moment."""
    allocated = reserved = 0
    ends = {True: 0, False: 0}
    for small, blocks in allocator.segments():
        page = 2 * MIB if small else 20 * MIB
        assert blocks[0][0] >= ends[small], "segments overlap"
        for (address, size, state), (following, _, next_state) in itertools.pairwise(blocks):
            assert address + size == following, "blocks of a segment overlap or leave a gap"
            assert LIVE in (state, next_state), "two free neighbours"
        begin, ends[small] = blocks[0][0], blocks[-1][0] + blocks[-1][1]
        if allocator.small.expandable:
            assert begin % page == ends[small] % page == 0
        assert all(size > 0 and size % 512 == 0 for _, size, _ in blocks)
        reserved += ends[small] - begin
        allocated += sum(size for _, size, state in blocks if state is LIVE)
    assert (allocated, reserved) == (allocator.allocated, allocator.reserved)
    assert allocated <= reserved <= allocator.peak_reserved and allocated <= allocator.peak_allocated
    for pool in (allocator.small, allocator.large):
        assert pool.keys == sorted(block.size << 64 | block.address for block in pool.free.values())
        assert all(block.state is FREE and address == block.address for address, block in pool.free.items())
        assert [block.address for block in pool.unmapped] == sorted(block.address for block in pool.unmapped)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_invariants(seed, expandable):
    trace = random_trace(seed, 1200)
    allocator = Allocator(expandable, limit=replay(trace).allocated * 3 // 4)
    sizes, failed, peak = {}, 0, Peaks(0, 0)
    for step, (number, size) in enumerate(trace):
        if number > 0:
            there = [block for small, blocks in allocator.segments() if small == (size <= MIB) for block in blocks]
            fits = [(free, address) for address, free, state in there if state is FREE and free >= size]
            before = allocator.reserved
            try:
                allocator.allocate(number, size)
            except OutOfMemory:
                failed += 1
                assert not fits
                continue
            block = allocator.blocks[number]
            sizes[number] = size
            assert size <= block.size < size + (512 if expandable or size <= MIB else MIB + 512)
            if not expandable and fits:
                assert (block.address, allocator.reserved) == (min(fits)[1], before)
            elif fits:
                assert allocator.reserved == before
        elif -number in sizes:
            allocator.free(-number)
            del sizes[-number]
        peak = Peaks(max(peak.allocated, allocator.allocated), max(peak.reserved, allocator.reserved))
        if step % 7 == 0:
            check(allocator)
        if step % 400 == 399:
            allocator.empty_cache()
            check(allocator)
    assert failed and not sizes and allocator.allocated == 0
    assert allocator.peaks == peak
    check(allocator)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.segments()) == (0, [])


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_a_limit_only_says_whether_it_fits(seed, expandable):
    trace = random_trace(seed)
    free = replay(trace, expandable)
    assert free.allocated < free.reserved
    assert replay(trace, expandable, limit=free.reserved) == free
    with pytest.raises(OutOfMemory):
        replay(trace, expandable, limit=free.allocated - 1)
    outcomes = []
    for percent in range(100, 160, 5):
        limit = free.allocated * percent // 100
        try:
            assert replay(trace, expandable, limit).reserved <= limit
            outcomes.append(True)
        except OutOfMemory as error:
            assert error.peaks.reserved <= limit
            outcomes.append(False)
    assert outcomes[-1] is True


@pytest.mark.parametrize(("expandable", "largest"), [(False, MIB), (True, 64 * MIB)], ids=["small requests", "expandable"])
@pytest.mark.parametrize("seed", range(3))
def test_repeating_a_trace_takes_nothing_more(seed, expandable, largest):
    # Where all segments are alike, or there is one, each request finds the place that it had the first time. Elsewhere it may not:
    # test_a_step_may_need_more_the_second_time.
    trace = random_trace(seed, largest=largest)
    assert replay(trace + trace, expandable) == replay(trace, expandable)


@BOTH
def test_events(expandable):
    trace = random_trace(7, 300)
    assert replay(iter(trace), expandable) == replay(trace, expandable)
    assert replay(numpy.array(trace), expandable) == replay(trace, expandable)  # its numbers are of 64 bits
    assert replay([(numpy.int64(1), numpy.int64(3 * GIB))], expandable).allocated == 3 * GIB
    again = [(1, MIB), (-1, MIB), (1, 3 * MIB), (2, 0), (-2, 0)]  # a number is free for another block; so is the size at a free
    assert replay(again, expandable) == (3 * MIB, 22 * MIB)
    assert replay([], expandable) == (0, 0)
    for mistake in ([(1, 512), (1, 512)], [(-1, 512)], [(1, 512), (-1, 512), (-1, 512)], [(0, 512)], [(1, 0), (1, 0)]):
        with pytest.raises(ValueError, match=r"block \d is (allocated|freed)"):
            replay(mistake, expandable)
