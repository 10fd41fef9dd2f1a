"""What DeepSpeed's ZeRO optimizers hold, at stages 1, 2 and 3, with what is offloaded: bytes by category, computed from shapes.

A place such as zero/stage3.py:791 is a file under deepspeed/runtime of DeepSpeed 0.19.8, where the formula was read.
"""

from collections import Counter

from zerotune.plan.parameters import (
    BUCKETS,
    FLOAT32,
    FLOAT64,
    FROZEN,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    REDUCTION,
    STEP,
    WEIGHTS,
    optimizer_groups,
    optimizer_states,
    optimizer_temporaries,
    pinned,
)

# ZeRO 1 and 2 ----------------------------------------------------------------------------------------------------------------


def flat_groups(groups, s):
    """Return ([[(elements, distance to the next one)] for each group], [elements of a rank's partition of each group]).

    Each group is one flat tensor, padded to twice the number of ranks (zero/stage_1_and_2.py:441).
    """
    lengths, partitions = [], []
    for group in groups:
        numels, offset, spaced = [p.numel for p in group], 0, []
        if s.round_robin:  # zero/stage_1_and_2.py:901
            numels = [n for start in range(s.ranks) for n in numels[start :: s.ranks]]
        for number, numel in enumerate(numels, 1):
            distance = numel + (-(offset + numel) % s.alignment if number < len(numels) else 0)
            spaced.append((numel, distance))
            offset += distance
        lengths.append(spaced)
        partitions.append(-(-offset // (2 * s.ranks)) * 2)
    return lengths, partitions


def pieces(spaced, partition):
    """Yield (rank, elements of a parameter, those of them in the rank's partition) of a flat group."""
    offset = 0
    for numel, distance in spaced:
        for rank in range(offset // partition, (offset + numel - 1) // partition + 1):
            part = min(offset + numel, (rank + 1) * partition) - max(offset, rank * partition)
            yield rank, numel, part
        offset += distance


def flattened(held, parameters, s, optim):
    """Add what DeepSpeedZeroOptimizer holds at stages 1 and 2 (zero/stage_1_and_2.py; lines alone are of this file)."""
    device, host, groups = held["device"], held["host"], optimizer_groups(parameters)
    lengths, partitions = flat_groups(groups, s)
    of_rank = [Counter() for _ in groups]  # rank -> elements of the parameters that its partition holds a piece of
    own_large, largest_part, cut = Counter(), 0, [Counter() for _ in groups]
    for number, spaced in enumerate(lengths):
        for rank, numel, part in pieces(spaced, partitions[number]):
            of_rank[number][rank] += numel
            cut[number][rank] += 1
            own_large[rank] += numel * (numel > s.bucket)
            largest_part = max(largest_part, part)
    owned = sum(of_rank, Counter())
    partition, largest = sum(partitions), max(p.numel for group in groups for p in group)
    offload = s.offload_optimizer != "none"
    compact = s.accumulated == FLOAT32 > s.itemsize  # a flat float32 partition collects the gradients: 1259
    staged = s.accumulated if compact and s.stage == 1 else s.itemsize  # of gradients on their way: 407

    device[WEIGHTS] = partition * s.ranks * s.itemsize
    device[FROZEN] = frozen_bytes(parameters, s)
    if s.contiguous or offload:
        device[BUCKETS] = s.buffers * s.bucket * staged  # 3266, 3275
    whole = max(owned.values()) * s.itemsize  # parameters at a partition's edges are held whole: 2192
    gradients = partition * FLOAT32 if compact else whole
    if not offload:
        device[GRADIENTS] = gradients
        device[OPTIMIZER] = partition * s.master  # a copy in float32 training, too: 560
        tensors = [(size,) for size in partitions]
        states_on_device, host[OPTIMIZER] = optimizer_states(optim, tensors, s.master, s.cuda)
        device[OPTIMIZER] += states_on_device
        device[STEP] = flat_step(s, optim, partitions, [max(c.values()) > 1 for c in cut], gradients, compact, largest_part)
        device[STEP] = max(device[STEP], gloo_copy(partitions, s) - gradients)
    else:
        device[STEP] = gloo_copy(partitions, s)
        pin = s.cuda and s.pin_optimizer
        copies = sum(pinned(size * s.master, pin) + pinned(size * s.itemsize, pin) for size in partitions)  # 560, 573
        host[OPTIMIZER] = copies + optimizer_states("cpu", [(partition,)], s.moment, s.cuda)[1]
        host[GRADIENTS] = sum(pinned(size * s.master, pin) for size in partitions) + pinned(largest * s.itemsize, pin)  # 937, 653
        device[GRADIENTS] = largest * s.itemsize + gradients * compact  # 659, 1270
        if s.accumulation > 1 and not compact:  # a tensor for each parameter of the partition: 1824
            sizes = Counter()
            for spaced, size in zip(lengths, partitions, strict=True):
                for rank, numel, _ in pieces(spaced, size):
                    sizes[rank] += pinned(numel * s.itemsize, pin)
            host[GRADIENTS] += max(sizes.values())

    # On their way: autograd's gradient of one parameter; a flat copy of a bucket that goes to more than one rank (2367), and
    # another one if it is sent in another type. A parameter larger than a bucket keeps its own gradient until it is reduced.
    trainable = partition * s.ranks
    copied = max(min(s.bucket, trainable), largest if largest > s.bucket else 0) * (s.ranks > 1 or compact or not s.contiguous)
    device[REDUCTION] = largest * s.itemsize + copied * (staged + s.communicated * (s.communicated != staged))
    if largest > s.bucket:
        every_large = sum(p.numel for group in groups for p in group if p.numel > s.bucket)
        kept = every_large if s.stage == 1 else max(own_large.values()) if compact else largest * (1 + offload)  # 1067, 1446
        device[REDUCTION] += kept * staged
    if not s.contiguous and not offload:
        device[REDUCTION] += min(s.bucket, trainable) * staged
    if compact:
        device[REDUCTION] += largest_part * FLOAT32  # 1326
    if offload:
        device[REDUCTION] += largest_part * FLOAT64  # the norm of each piece, as it goes to the host: 1886
    if s.accumulation > 1 and s.stage == 1:
        device[REDUCTION] += trainable * staged  # nothing is reduced before a step's last micro-batch: 2294
    elif s.accumulation > 1 and not compact and not offload:
        device[REDUCTION] += whole  # a micro-batch's own partition, which is then added to that of those before: 1040


def flat_step(s, optim, partitions, in_pieces, gradients, compact, largest_part):
    """Return the most bytes that DeepSpeedZeroOptimizer.step takes on the device on top of the states.

    partitions: elements of each group's partition; in_pieces: whether it holds more than one parameter; gradients: their bytes,
    which are freed while the last group is stepped. Lines are of zero/stage_1_and_2.py.
    """
    most = largest_part * FLOAT64  # the norm, parameter by parameter: 2684
    freed = 0
    for number, (size, several) in enumerate(zip(partitions, in_pieces, strict=True), 1):
        flat = size * s.itemsize if several and not compact else 0  # 3114
        cast = size * s.master if s.itemsize != s.master and not compact else 0  # 3118
        if number == len(partitions) and not compact and (flat or cast):
            freed = gradients
        most = max(most, flat + cast, (cast or flat) + optimizer_temporaries(optim, [(size,)], s.master, s.cuda) - freed)
        if compact:
            freed += size * FLOAT32
    return most


def whole_gradients(held, parameters, s, optim):
    """Add what BF16_Optimizer holds: float32 gradients of everything on each device (bf16_optimizer.py; lines are of this file)."""
    device, groups = held["device"], optimizer_groups(parameters)
    _, partitions = flat_groups(groups, s)
    partition = sum(partitions)
    everything = partition * s.ranks
    device[WEIGHTS] = everything * s.itemsize
    device[FROZEN] = frozen_bytes(parameters, s)
    device[GRADIENTS] = everything * FLOAT32 + sum(p.numel for group in groups for p in group) * s.itemsize  # 191, 523
    device[OPTIMIZER], held["host"][OPTIMIZER] = optimizer_states(optim, [(size,) for size in partitions], FLOAT32, s.cuda)
    device[OPTIMIZER] += partition * FLOAT32  # 182
    # All groups at once are reduced in one flat tensor, sent in the training precision (engine.py:3795), unless there is one alone
    # or the first is large (engine.py:151).
    first = partitions[0] * s.ranks
    copied = everything if len(groups) > 1 and first <= 5e8 else 0
    sent = (everything if copied else max(partitions) * s.ranks) * s.communicated * (s.communicated != FLOAT32)
    added = max(p.numel for group in groups for p in group) * FLOAT32  # 523
    device[REDUCTION] = max(copied * FLOAT32 + sent, added)
    temporaries = [optimizer_temporaries(optim, [(size,)], FLOAT32, s.cuda) for size in partitions]
    device[STEP] = max(*temporaries, gloo_copy(partitions, s))


def gloo_copy(partitions, s):
    """Return the bytes that gloo, which CPU processes use, copies of the group whose weights it gathers after a step."""
    return max(partitions) * s.ranks * s.itemsize if s.ranks > 1 and not s.cuda else 0


def frozen_bytes(parameters, s):
    """Return the bytes of whole frozen parameters, cast as DeepSpeed's engine casts floating ones (engine.py:2093)."""
    return sum(p.numel * stored_itemsize(p, s) for p in parameters if not p.learns)


def stored_itemsize(parameter, s):
    """Return the bytes of an element once DeepSpeed has the model: all but codes of one byte is in the training precision then."""
    return parameter.itemsize if parameter.itemsize == 1 or s.itemsize == FLOAT32 else s.itemsize


# ZeRO 3 ----------------------------------------------------------------------------------------------------------------------


def sharded(held, parameters, s, optim):
    """Add what DeepSpeedZeroOptimizer_Stage3 holds (zero/stage3.py; lines alone are of this file)."""
    device, host, nvme, groups = held["device"], held["host"], held["nvme"], optimizer_groups(parameters)
    shard = {p: -(-p.numel // s.ranks) for p in parameters}  # zero/partition_parameters.py:1817
    trainable, frozen = [p for group in groups for p in group], [p for p in parameters if not p.learns]
    elements, largest = sum(shard[p] for p in trainable), max(p.numel for p in trainable)
    largest_shard = -(-largest // s.ranks)
    if s.offload_param == "none":
        device[WEIGHTS] = elements * s.itemsize  # 972
        device[FROZEN] = sum(shard[p] * stored_itemsize(p, s) for p in frozen)
    else:
        offloaded_weights(host, nvme, groups, frozen, shard, s)
    if s.secondary > 1:  # hpZ's second copies, of all that has been gathered: zero/partition_parameters.py:1900
        place = device if s.offload_param == "none" else host
        of_machine = s.ranks // s.secondary
        place[WEIGHTS] += elements * of_machine * s.itemsize
        place[FROZEN] += sum(shard[p] * of_machine * stored_itemsize(p, s) for p in frozen)
    device[GATHERED], remembered = gathered_bytes(parameters, shard, s)
    if s.contiguous:
        device[BUCKETS] = s.bucket * s.communicated  # 782

    # Sub-groups of a group, each a flat tensor of its own to the optimizer, with the number of its parameters: 1210.
    sub_groups = []
    for group in groups:
        size, count = 0, 0
        for parameter in group:
            size, count = size + shard[parameter], count + 1
            if size >= s.sub_group or parameter is group[-1]:
                sub_groups.append((size, count))
                size, count = 0, 0
    on_device = sub_groups
    flat = elements * s.accumulated  # of gradients: 791
    if s.offload_optimizer == "none":
        device[GRADIENTS] = flat
    else:
        pin = s.cuda and s.pin_optimizer
        host[GRADIENTS] = pinned(flat, pin)
        on_device, on_host = [], [size for size, _ in sub_groups]
        if s.offload_optimizer == "nvme":
            on_host = swapped_optimizer(held, trainable, on_host, shard, s)
        host[OPTIMIZER] += sum(on_host) * s.master  # 1160
        host[OPTIMIZER] += optimizer_states("cpu", [(size,) for size in on_host], s.moment, s.cuda)[1]
        host[GRADIENTS] += sum(pinned(size * s.master, pin) for size in on_host)  # 1338
        if s.checks_infinity:  # absolute values and a mask of all gradients: 3013
            host[STEP] = max(host[STEP], flat + elements)
    sizes = [(size,) for size, _ in on_device]
    states_on_device, counters = optimizer_states(optim, sizes, s.master, s.cuda)
    # In float32, too, the masters are copies: the test that would spare them compares a device with its name (1163).
    device[OPTIMIZER] += states_on_device + sum(size for size, _ in on_device) * s.master
    host[OPTIMIZER] += counters
    device[STEP] = remembered + sharded_step(s, optim, on_device, elements, largest_shard)

    # On their way: autograd's gradient of one parameter; the bucket's flat copy in the order of ranks
    # (comm/coalesced_collectives.py:122), in the type it is sent in, and the own part of it in the type of the sum (1944).
    copied = min(s.bucket, sum(p.numel for p in trainable))
    if largest > s.bucket:  # such a gradient is a bucket by itself, and is copied only if the ranks do not divide it evenly
        copied = max(copied, largest if largest % s.ranks else 0)
        device[REDUCTION] += largest * s.itemsize
    own = -(-max(copied, largest) // s.ranks)
    copies = (s.communicated != s.itemsize) + 1 + (not s.cuda)  # gloo makes another one
    device[REDUCTION] += largest * s.itemsize + copied * s.communicated * copies
    device[REDUCTION] += own * s.accumulated * (s.accumulated != s.communicated)
    if not s.contiguous:
        device[REDUCTION] += min(s.bucket, sum(p.numel for p in trainable)) * s.itemsize
    if s.offload_optimizer != "none":  # its sum so far comes up for the norm in float64 (2028, 1964), 250 million elements a time
        device[REDUCTION] += largest_shard * s.accumulated + min(largest_shard, 250_000_000) * FLOAT64
        if s.offload_optimizer == "nvme":
            device[REDUCTION] += own * s.master  # 1453


def sharded_step(s, optim, sub_groups, elements, largest_shard):
    """Return the most bytes that DeepSpeedZeroOptimizer_Stage3.step takes on the device on top of the states.

    sub_groups: (elements, parameters) of those that are stepped on the device; elements: of all shards that are trained. Gathered
    weights are released before it begins (zero/stage3.py:2878).
    """
    if s.offload_optimizer != "none":
        return 0
    most = largest_shard * FLOAT64  # the norm, shard by shard: 2457
    if s.checks_infinity:
        most = max(most, elements * (s.accumulated + 1))  # 3013
    for size, count in sub_groups:
        copy = size * s.accumulated if count > 1 else 0  # 2686
        cast = size * s.master if s.accumulated != s.master else 0
        most = max(most, copy + cast, (cast or copy) + optimizer_temporaries(optim, [(size,)], s.master, s.cuda))
    return most


def gathered_bytes(parameters, shard, s):
    """Return the most bytes of whole parameters and of messages with them on a device at once, and those that stay in a step.

    Each submodule's turn fetches another stage3_prefetch_bucket_size ahead, whatever is there already, and stops at
    stage3_max_live_parameters alone (zero/partitioned_param_coordinator.py:453), where the last parameter may exceed either. After
    its forward pass a module's parameters stay if their next use is fewer than stage3_max_reuse_distance elements away, counting
    each module on the way in both passes (line 658): the last half of that distance in the order of use, which is taken to be the
    model's. To these come the module at work and the parameters that persist (zero/parameter_offload.py:247). A message of several
    parameters stays until the last of them is used, beside their copies (zero/partition_parameters.py:1343, 795).

    Products with quantised weights remember the whole codes until the loss is gone, which is after the step
    (bitsandbytes/autograd/_functions.py, ctx.tensors). One process gathers nothing where its shards are on its device
    (zero/partition_parameters.py:105).
    """
    if s.ranks == 1 and (s.offload_param == "none" or not s.cuda):
        return 0, 0
    sizes = {p: shard[p] * s.ranks for p in parameters}
    total, largest, persistent, kept, after = sum(sizes.values()), max(sizes.values()), 0, 0, 0
    for parameter in parameters:
        if parameter.numel <= s.persistence and persistent + parameter.numel <= s.model_persistence:
            persistent += parameter.numel
    for size in reversed(sizes.values()):
        if 2 * after < s.reuse:
            kept += size
        after += size
    itemsize = max(stored_itemsize(p, s) for p in parameters)
    codes = sum(size for p, size in sizes.items() if p.quantised)
    if s.prefetch:
        kept = max(kept, s.max_live) + largest
    message = min(total, s.prefetch + largest) if s.prefetch and s.ranks > 1 else 0
    if s.ranks > 1 and not s.cuda:
        message += max(message, largest)  # gloo has a copy of its own
    return (min(total, persistent + max(kept, codes) + largest) + message) * itemsize, codes * itemsize


def offloaded_weights(host, nvme, groups, frozen, shard, s):
    """Add weights that wait on the host or on NVMe (zero/stage3.py; lines are of this file).

    Trained ones lie in one pinned tensor for each group (906), pin_memory or not; frozen ones in one each
    (zero/partition_parameters.py:1836).
    """
    on_nvme = s.offload_param == "nvme"
    taken, space, left_out = 0, 0, 0
    for group in groups:
        size = sum(shard[p] for p in group)
        room = size if not on_nvme else max(0, min(size, s.max_in_cpu - taken))  # 897
        taken += size
        host[WEIGHTS] += pinned(room * s.itemsize, s.cuda)
        space += room
        if room < size:
            left_out = max(left_out, sum(aligned(p.numel * s.itemsize, s) for p in group))
    for parameter in frozen:
        size = shard[parameter] * stored_itemsize(parameter, s)
        if not on_nvme or size < s.swappable:
            host[FROZEN] += pinned(size, s.cuda and s.pin_param)
    if on_nvme:
        # Each large parameter has had a file since it was loaded, also where it lives in host memory afterwards.
        for category, several in ((WEIGHTS, [p for group in groups for p in group]), (FROZEN, frozen)):
            sizes = [shard[p] * stored_itemsize(p, s) for p in several]
            nvme[category] += sum(aligned(size, s) for size in sizes if size >= s.swappable)
        # Locked buffers to read into (swap_tensor/partitioned_param_swapper.py:131), and one to write from (1018).
        host[BUCKETS] += s.param_buffers * aligned(s.param_buffer * s.itemsize, s) + left_out


def swapped_optimizer(held, trainable, sizes, shard, s):
    """Add optimizer states on NVMe; return the elements of the sub-groups that are too small for it, which stay on the host.

    Master weights, two moments and gradients of a sub-group pass through locked buffers of the largest one's size
    (swap_tensor/utils.py:192); a sub-group's first step has its new moments on the host beside them.
    """
    device, host, nvme = held["device"], held["host"], held["nvme"]
    large = [size for size in sizes if size * s.master >= s.swappable]
    host[BUCKETS] += s.optimizer_buffers * aligned(max(sizes) * s.master, s)
    nvme[OPTIMIZER] += sum(3 * aligned(size * s.master, s) for size in large)
    if large:
        host[STEP] += 2 * FLOAT32 * max(large)
    for parameter in trainable:
        size = shard[parameter] * s.master
        rest = size % s.aligned if size >= s.swappable else size
        nvme[GRADIENTS] += size - rest
        # A gradient that is not written as a whole waits for the step where it is, as a whole (swap_tensor/optimizer_utils.py:272).
        if rest and (s.cuda or s.accumulated != s.master):
            device[GRADIENTS] += size
    return [size for size in sizes if size not in large]


def aligned(size, s):
    """Return a file's bytes for a tensor's (swap_tensor/optimizer_utils.py:181)."""
    return -(-size // s.aligned) * s.aligned
