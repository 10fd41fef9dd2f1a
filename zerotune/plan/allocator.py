"""What torch's CUDA caching allocator would take from a GPU for a trace of allocations: the peaks of allocated and reserved bytes.

torch asks CUDA for segments, cuts them into blocks, and keeps freed blocks for later requests; what it holds but cannot use is why
a run that needs 70 GiB may not fit into 75. Summing live tensors does not show that; replaying each request through the same rules
does, as xMem does it (arXiv:2510.21048). The rules are those of c10/cuda/CUDACachingAllocator.cpp in torch's main branch of 2026,
with the options that torch starts with; where a rule stands here, the function that it was read from is named. Tests, against what
torch publishes of itself: tests/test_allocator.py.

It leaves out more than one stream, CUDA graphs' pools, garbage collection, max_split_size, rounding to powers of two, and what
lives outside the allocator (the CUDA context, NCCL's and other libraries' own memory). It takes for granted:
- a segment lies at a higher address than the earlier ones of its pool. The driver keeps no order; it decides between equal sizes;
- address space never ends. torch's expandable segment is as long as 9/8 of the device, and one that is full is followed by another.

A training step can need more segments when it is repeated: it then finds the cache of the one before, and cuts it otherwise than
it cut new memory. So give replay() a few steps, not one.
"""

from bisect import bisect_left, insort
from operator import attrgetter
from typing import NamedTuple

# Bytes; c10/core/AllocatorConfig.h.
MIN_BLOCK = 512  # kMinBlockSize: each block is a multiple of it
SMALL_REQUEST = 2**20  # kSmallSize: the largest request that the small pool serves
SMALL_SEGMENT = 2 * 2**20  # kSmallBuffer: a segment of the small pool, and its page
LARGE_SEGMENT = 20 * 2**20  # large_segment_size(): what requests below the next number share, and the large pool's page
MIN_LARGE_REQUEST = 10 * 2**20  # kMinLargeAlloc: from here on a request has a segment of its own
LARGE_ROUNDING = 2 * 2**20  # kRoundLarge: of such a segment

LIVE, FREE, UNMAPPED = "live", "free", "unmapped"  # a block's states; unmapped: addresses without memory, in expandable segments
ADDRESS_BITS = 64
ADDRESS = 2**ADDRESS_BITS - 1
ENDLESS = 2**60  # bytes of addresses


class Peaks(NamedTuple):
    """Bytes: torch.cuda.max_memory_allocated() and torch.cuda.max_memory_reserved(), each the highest of its own moment."""

    allocated: int
    reserved: int


class OutOfMemory(Exception):
    """A request that does not fit into the limit although everything unused was given back; request: bytes, peaks: until then."""

    def __init__(self, request, limit, peaks):
        super().__init__(f"{request:,} bytes do not fit: the limit is {limit:,}, the peaks so far are {peaks}")
        self.request = request
        self.peaks = peaks


def replay(events, expandable_segments=False, limit=None):
    """Return the Peaks of a trace of one stream, which starts on an empty device.

    events: an iterable of (block, size). block > 0: allocate `size` bytes under that number, which may be used again once it is
    free; block < 0: free number -block, the size is ignored. expandable_segments: as PYTORCH_ALLOC_CONF sets it. limit: bytes that
    the allocator can get from the device, None if there is no end to them.

    A million events take seconds. Raises OutOfMemory where torch would, and ValueError for a number that is allocated while it is
    live, or freed while it is not.
    """
    allocator = Allocator(expandable_segments, limit)
    for block, size in events:
        if block > 0:
            allocator.allocate(block, size)
        else:
            allocator.free(-block)
    return allocator.peaks


def round_size(size):
    """Return the bytes that a request of size > 0 bytes occupies. round_size(), without roundup_power2_divisions."""
    return -(-size // MIN_BLOCK) * MIN_BLOCK


def segment_size(size):
    """Return the bytes of the segment that is made for a request of `size` rounded bytes. get_allocation_size()."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < MIN_LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // LARGE_ROUNDING) * LARGE_ROUNDING


def room(block):
    """Return a free block's bytes, with those that it could grow by. get_free_block()'s expandable_size."""
    right = block.right
    return block.size + (right.size if right is not None and right.state is UNMAPPED else 0)


def cut(block, size):
    """Shorten a block to `size` bytes; return the rest, its right neighbour in the same state, which no list of the pool holds."""
    rest = Block(block.pool, block.address + size, block.size - size, block.state, block, block.right)
    if block.right is not None:
        block.right.left = rest
    block.right = rest
    block.size = size
    return rest


class Block:
    """A stretch of a segment, `size` bytes from `address` on; left, right: its neighbours in the segment, None at the ends."""

    __slots__ = ("pool", "address", "size", "state", "left", "right")

    def __init__(self, pool, address, size, state, left=None, right=None):
        self.pool = pool
        self.address = address
        self.size = size
        self.state = state
        self.left = left
        self.right = right


class Pool:
    """The blocks that are not live of the small or the large requests; addresses are this pool's own and begin at 0."""

    def __init__(self, small, expandable):
        self.small = small
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT  # find_expandable_block()
        self.expandable = expandable
        self.end = 0  # where the next segment begins
        self.keys = []  # of the free blocks, sorted: by size, then by address (BlockComparatorSize), both in one number
        self.free = {}  # the free blocks by address
        self.unmapped = []  # blocks, sorted by address (BlockComparatorAddress)
        if expandable:
            self.unmapped.append(Block(self, 0, ENDLESS // self.page * self.page, UNMAPPED))

    def splits(self, rest):
        """Say whether the `rest` bytes of a block that a request leaves over become a block. should_split()."""
        return rest >= MIN_BLOCK if self.small or self.expandable else rest > SMALL_REQUEST

    def keep(self, block):
        """Enter a free or unmapped block."""
        if block.state is FREE:
            insort(self.keys, block.size << ADDRESS_BITS | block.address)
            self.free[block.address] = block
        else:
            insort(self.unmapped, block, key=attrgetter("address"))

    def drop(self, block):
        """Strike a free or unmapped block out."""
        if block.state is FREE:
            del self.keys[bisect_left(self.keys, block.size << ADDRESS_BITS | block.address)]
            del self.free[block.address]
        else:
            self.unmapped.remove(block)

    def join(self, block):
        """Enter a free or unmapped block, as one with the neighbours that are in the same state. try_merge_blocks()."""
        left, right = block.left, block.right
        if left is not None and left.state is block.state:
            self.drop(left)
            block.address = left.address
            block.size += left.size
            block.left = left.left
            if block.left is not None:
                block.left.right = block
        if right is not None and right.state is block.state:
            self.drop(right)
            block.size += right.size
            block.right = right.right
            if block.right is not None:
                block.right.left = block
        self.keep(block)

    def best_fit(self, size):
        """Take out and return the smallest free block of at least `size` bytes, the lowest of equals; None if there is none.

        Where a block can grow, it counts as large as it can become: the end of an expandable segment is saved for what fits nowhere
        else. That is decided between neighbours in the order of sizes alone, so that the search may end early. get_free_block().
        """
        keys, free = self.keys, self.free
        place = bisect_left(keys, size << ADDRESS_BITS)
        if place == len(keys):
            return None
        if self.expandable:
            while place + 1 < len(keys) and room(free[keys[place + 1] & ADDRESS]) < room(free[keys[place] & ADDRESS]):
                place += 1
        return free.pop(keys.pop(place) & ADDRESS)

    def lowest_room(self, size):
        """Return the block where `size` bytes of free and unmapped addresses begin that include unmapped ones; the lowest such.

        find_expandable_block().
        """
        for block in self.unmapped:
            first = block.left if block.left is not None and block.left.state is FREE else block
            found, block = 0, first
            while found < size and block is not None and block.state is not LIVE:
                found += block.size
                block = block.right
            if found >= size:
                return first
        raise AssertionError("the last unmapped block has no end")


class Allocator:
    """The allocator's state; allocated, reserved: bytes at this moment. The arguments are those of replay()."""

    def __init__(self, expandable_segments=False, limit=None):
        self.limit = limit
        self.small, self.large = Pool(True, expandable_segments), Pool(False, expandable_segments)
        self.grow = self.extend if expandable_segments else self.add_segment
        self.blocks = {}  # the live ones by number; None for one of 0 bytes
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0

    @property
    def peaks(self):
        """The Peaks until this moment."""
        return Peaks(self.peak_allocated, self.peak_reserved)

    def allocate(self, number, size):
        """Make block `number` of `size` bytes. malloc() and alloc_found_block().

        The block may be larger than its rounded size, and counts as that large: a rest that is not split off goes with it.
        """
        if number in self.blocks:
            raise ValueError(f"block {number} is allocated while it is live")
        size = round_size(int(size))  # int: a NumPy number would overflow in the keys
        if size == 0:  # NativeCachingAllocator::allocate() does not ask for nothing
            self.blocks[number] = None
            return
        pool = self.small if size <= SMALL_REQUEST else self.large  # get_pool()
        block = pool.best_fit(size) or self.grow(pool, size)
        if block is None:
            self.empty_cache()
            block = self.grow(pool, size)
            if block is None:
                raise OutOfMemory(size, self.limit, self.peaks)
        if pool.splits(block.size - size):
            rest = cut(block, size)
            rest.state = FREE
            pool.keep(rest)
        block.state = LIVE
        self.blocks[number] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, number):
        """Give block `number` back to its pool; its memory stays reserved. free_block()."""
        if number not in self.blocks:
            raise ValueError(f"block {number} is freed while it is not live")
        block = self.blocks.pop(number)
        if block is not None:
            self.allocated -= block.size
            block.state = FREE
            block.pool.join(block)

    def empty_cache(self):
        """Give back to the device what is reserved and wholly unused: torch.cuda.empty_cache(), and what torch does when a request
        does not fit. release_cached_blocks(), release_blocks().

        Those are the segments without a live block; in an expandable segment, the pages.
        """
        for pool in (self.large, self.small):
            for block in [pool.free[key & ADDRESS] for key in pool.keys]:
                if pool.expandable:
                    self.unmap(block)
                elif block.left is None and block.right is None:
                    pool.drop(block)
                    self.reserved -= block.size

    def segments(self):
        """Return what is reserved: a list of (is it the small pool's, [(address, size, state) of each block]), small ones first.

        As in snapshot(), a segment is a stretch of memory without a gap: an expandable segment may be several, or none.
        """
        blocks = [*self.small.free.values(), *self.large.free.values(), *filter(None, self.blocks.values())]
        found = []
        for block in sorted(blocks, key=lambda block: (not block.pool.small, block.address)):
            if block.left is not None and block.left.state is not UNMAPPED:
                continue  # not the first of its segment
            pool, stretch = block.pool, []
            while block is not None and block.state is not UNMAPPED:
                stretch.append((block.address, block.size, block.state))
                block = block.right
            found.append((pool.small, stretch))
        return found

    def reserve(self, size):
        """Take memory from the device; return whether it had that much."""
        if self.limit is not None and self.reserved + size > self.limit:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def add_segment(self, pool, size):
        """Return a new segment for a request of `size` rounded bytes, None if the device has no memory for it. alloc_block()."""
        size = segment_size(size)
        if not self.reserve(size):
            return None
        block = Block(pool, pool.end, size, FREE)
        pool.end += size
        return block

    def extend(self, pool, size):
        """Return a block of at least `size` bytes out of the pool's expandable segment, which grows by as many pages as that takes.

        None if the device has no memory for them; pages that were mapped until then remain. try_allocate_expandable_block().
        """
        block = pool.lowest_room(size)
        if block.state is UNMAPPED and not self.map(block, min(block.size, size)):
            return None
        while block.size < size:
            gap = block.right  # unmapped: were it free, it would be part of the block
            if not self.map(gap, min(gap.size, size - block.size)):
                return None
            block = gap  # has joined with what was left of it
        pool.drop(block)
        return block

    def map(self, block, size):
        """Back the first `size` bytes of an unmapped block, in whole pages, and free them; return whether there was memory for it.

        map_block(). Unmapped blocks begin and end where pages do.
        """
        pool = block.pool
        size = -(-size // pool.page) * pool.page
        if not self.reserve(size):
            return False
        pool.drop(block)
        if size < block.size:
            pool.keep(cut(block, size))
        block.state = FREE
        pool.join(block)
        return True

    def unmap(self, block):
        """Give the whole pages of a free block back to the device. unmap_block()."""
        pool = block.pool
        begin = -(-block.address // pool.page) * pool.page
        end = (block.address + block.size) // pool.page * pool.page
        if begin >= end:
            return
        pool.drop(block)
        if begin > block.address:
            middle = cut(block, begin - block.address)
            pool.keep(block)
            block = middle
        if end < block.address + block.size:
            pool.keep(cut(block, end - begin))
        block.state = UNMAPPED
        pool.join(block)
        self.reserved -= end - begin
