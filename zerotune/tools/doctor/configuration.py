"""The configuration: the checks of a launch, sizes in the JSON that hurt for a model, the network's share of a step, padding.

Bytes are lower bounds, so that a finding is true wherever it appears.
"""

from zerotune.errors import UserError
from zerotune.run.arguments import parse_arguments
from zerotune.run.checkpoint import check_request
from zerotune.run.records import check_tracker
from zerotune.tools.check import check_launch
from zerotune.tools.doctor.finding import fine, hurts, of_problem

DEFAULT_BUCKET = 500_000_000  # elements, DeepSpeed's own
DEFAULT_PERSISTENCE = 100_000
MUCH_MEMORY = 64 * 2**20  # bytes
# Elements of a bucket under which a collective's latency outweighs what it carries: half a megabyte in 16 bits.
SMALL_BUCKET = 250_000
MUCH_NETWORK, MUCH_PADDING = 0.5, 1 / 3  # shares


def check_configuration(launch, words):
    """Return (train.py's Arguments, or None where they are wrong; findings) of what train.py and launch.sh check before a model."""
    try:
        check_launch(str(launch.yaml), launch.processes, words)
        args = parse_arguments(words)
        check_request(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
        check_tracker(args.report_to)
    except UserError as error:
        return None, [of_problem("configuration", problem) for problem in error.problems]
    files = "the flags" if not launch.json else f"the flags, accelerate_configs/{launch.strategy}.yaml and its DeepSpeed JSON"
    return args, [fine("configuration", f"{files} go together")]


def check_sizes(config, hidden_size, trainable, total, mixed_precision, processes):
    """Return findings on a DeepSpeed JSON as it is written, for a model; {}: no DeepSpeed.

    hidden_size: width of the residual stream; trainable, total: parameters. "auto" is right by construction.
    """
    zero = config.get("zero_optimization")
    if not zero:
        return []
    findings, stage, width = [], zero["stage"], 4 if mixed_precision == "no" else 2
    offloads = any(zero.get(f"offload_{kind}", {}).get("device", "none") != "none" for kind in ("optimizer", "param"))
    if processes == 1 and not offloads:
        found = f"ZeRO-{stage} on one process has nobody to share with"
        findings.append(hurts("sizes", found, "STRATEGY=single, or one with offload"))
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if isinstance(bucket, (int, float)):  # else "auto"
        # Buffers of its size, two where gradients are reduced while others come (stage_1_and_2.py, setup_buckets; stage3.py).
        buffers = 2 if stage < 3 and zero.get("overlap_comm") else 1
        unused = width * buffers * (bucket - trainable)
        if zero.get("contiguous_gradients", True) and unused > MUCH_MEMORY:
            found = (
                f"reduce_bucket_size {bucket:,.0f} is more than the {trainable:,} parameters that learn: {unused / 2**20:,.0f} MiB"
            )
            findings.append(hurts("sizes", f"{found} of each device are taken and never filled", 'write "auto"'))
        if processes > 1 and bucket < SMALL_BUCKET and trainable > 10 * bucket:
            found = f"reduce_bucket_size {bucket:,.0f}: gradients travel in pieces of {width * bucket / 1024:,.0f} KiB"
            findings.append(hurts("sizes", f"{found}, where waiting outweighs carrying", 'write "auto"'))
    threshold = zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE)
    if stage == 3 and isinstance(threshold, (int, float)):
        if threshold >= hidden_size**2 and width * total > MUCH_MEMORY:
            found = f"stage3_param_persistence_threshold {threshold:,.0f} keeps each matrix of {hidden_size} x {hidden_size} whole"
            findings.append(hurts("sizes", f"{found} on every device, as zero2 does", 'write "auto"'))
        if threshold < hidden_size and processes > 1:
            found = f"stage3_param_persistence_threshold {threshold:,.0f} shards norms and biases of {hidden_size} elements"
            findings.append(hurts("sizes", f"{found}: each is gathered anew at each use", 'write "auto"'))
    return findings or [fine("sizes", "those of the DeepSpeed JSON fit the model")]


def network_bytes(stage, trainable, total, width, accumulation):
    """Return the least bytes that a step sends through each rank's link, but for the factor (N-1)/N; stage 0: DDP.

    Stage 3 gathers the weights and reduces the gradients for each micro-batch, stage 2 reduces for each (both cannot leave it out:
    deepspeed/runtime/engine.py, no_sync), stage 1 and DDP once a step. Stages 1 and 2 gather what learned; an all-reduce counts
    twice. (ZeRO, arXiv:1910.02054, section 7.) That stage 3 gathers again for the backward pass is left out: small models need not.
    """
    if stage == 3:
        return width * accumulation * (total + trainable)
    if stage == 0:
        return 4 * 2 * trainable  # its gradients are float32 in every precision
    return width * ((accumulation if stage == 2 else 1) * trainable + trainable)


def check_network(stage, trainable, total, mixed_precision, accumulation, processes, speed, step_seconds):
    """Return findings on the share of a step that the network takes at least; speed: bytes/s of check_round_trip, or None."""
    if processes == 1 or not speed:
        return []
    width = 4 if mixed_precision == "no" else 2
    carried = network_bytes(stage, trainable, total, width, accumulation) * (processes - 1) / processes
    share = carried / speed / step_seconds
    found = f"a step sends at least {carried / 1e6:,.1f} MB over each link: {min(1, share):.0%} of its {step_seconds:.3g} s"
    if share <= MUCH_NETWORK:
        return [fine("network", found)]
    if stage == 3:
        fix = "more rows in each micro-batch (--per_device_train_batch_size), or STRATEGY=zero2 if it fits"
    elif stage == 2 and accumulation > 1:
        fix = "more rows in each micro-batch and fewer of them, or STRATEGY=zero1, which reduces once a step"
    else:
        fix = "more rows a step, or a faster link"
    return [hurts("network", found, fix)]


def check_padding(fraction, rows, accumulation, grouped):
    """Return the finding on padding; fraction: of the tokens that the model computes; rows: of a micro-batch on one process."""
    found = f"{fraction:.0%} of the tokens that the model computes are padding"
    if fraction <= MUCH_PADDING:
        return fine("padding", found)
    if not grouped:
        fix = "leave out --no_group_by_length"
    elif rows > 1:
        flags = f"--per_device_train_batch_size {rows // 2} --gradient_accumulation_steps {accumulation * 2}"
        fix = f"{flags}: the same update, less padding"
    else:
        fix = "more --gradient_accumulation_steps: like lengths are put together within a step"
    return hurts("padding", found, fix)


def check_frozen(args):
    """Tell whether a launch has frozen parameters under gradient checkpointing; None without flags."""
    return None if args is None else bool(args.gradient_checkpointing and (args.freeze or args.peft))
