"""final/: what AutoModel...from_pretrained loads, written whole, read back and compared before it gets its name."""

import os
import shutil
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object

from zerotune.engine.processes import unwrap
from zerotune.engine.tensor_parallel import copies
from zerotune.errors import RunError, UserError
from zerotune.model.adapters import adapter_state, merge, save_adapter
from zerotune.model.frozen_dtype import widened
from zerotune.model.loading import AUTO_CLASSES
from zerotune.run.autopsy import is_out_of_memory


def export(accelerator, model, tokenizer, final, args, unread=None):
    """Write the folder `final` from any strategy (ZeRO-3's shards are gathered) and return it.

    With --peft it holds the adapter alone, and with --merge_adapter the folder merged/ beside it the whole model. unread:
    model/unread.py's, of weights that the model has in files of its own.

    The weights have the training precision: float32, or bf16/fp16 under DeepSpeed. RunError, on every rank, if it fails.
    """
    inner = unwrap(model)
    if args.peft:
        state = adapter_state(inner)
    elif copies(accelerator) > 1:  # pieces of layers are put together on the main process; accelerate asks for a key of stage 3
        state = model._consolidated_16bit_state_dict()
    else:  # under ZeRO-3 a collective, and whole on the main process
        state = accelerator.get_state_dict(model) if accelerator.state.deepspeed_plugin else inner.state_dict()
    elsewhere = unread.values if unread and not args.peft else dict
    by_main_process(accelerator, lambda: write(inner, state | elsewhere(), tokenizer, final, args))
    return final


def by_main_process(accelerator, work):
    """Call `work` on the main process while the others wait; RunError, on every rank, with what it raises."""
    errors = []
    if accelerator.is_main_process:
        try:
            work()
        except UserError as error:
            errors = error.problems
        except Exception as error:  # whatever it is, the other ranks must hear of it instead of waiting
            if is_out_of_memory(error):  # explained by this rank, which ends the others
                raise
            errors.append(in_words(error))
    if errors := gather_object(errors):
        raise RunError(*errors)


def in_words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def write(model, state, tokenizer, final, args):
    """Write `final` and, if asked for, merged/ beside it, on one process; state: the model's, or with --peft its adapter's.

    The folder is loaded as a user would and every tensor compared bit by bit before it gets its name. RunError if that fails or the
    disk is full; an earlier folder stays.
    """
    written, temporary = final, Path(f"{final}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        if args.peft:
            save_adapter(model, temporary, state)
        else:
            state = widened(model, state)
            # state_dict names a tied weight several times; written once, it is tied again on loading.
            model.save_pretrained(temporary, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        if not args.peft:
            check(temporary, args.task, state, args.trust_remote_code)
        replace(temporary, final)
        if args.merge_adapter:
            written = final.with_name("merged")
            transformers.integrations.deepspeed.unset_hf_deepspeed_config()
            merge(final, temporary, AUTO_CLASSES[args.task], model, args, tokenizer)
            replace(temporary, written)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{written}: not written: {in_words(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace(temporary, final):
    """Give a whole folder its name; the old one is lost only when the new one has it (see `repair`)."""
    repair(final)
    if final.exists():
        os.rename(final, previous_of(final))
    os.rename(temporary, final)
    shutil.rmtree(previous_of(final), ignore_errors=True)


def previous_of(final):
    return Path(f"{final}.previous")


def repair(final):
    """Undo what a kill between the two renames of `replace` leaves: no folder of this name, but the previous one."""
    if final.exists():
        shutil.rmtree(previous_of(final), ignore_errors=True)
    elif previous_of(final).exists():
        os.rename(previous_of(final), final)


def check(folder, task, state, trust_remote_code):
    """Raise RuntimeError unless from_pretrained(folder) holds exactly the tensors of `state`, tied weights under every name."""
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # else ZeRO-3 would shard the copy over all ranks
    # A quantised model would go to the GPU by itself.
    options = {"dtype": "auto", "trust_remote_code": trust_remote_code, "device_map": {"": "cpu"}}
    loaded = AUTO_CLASSES[task].from_pretrained(folder, **options).state_dict()

    def same(name, tensor):
        return name in loaded and loaded[name].dtype == tensor.dtype and torch.equal(loaded[name].cpu(), tensor.cpu())

    wrong = [name for name, tensor in state.items() if not same(name, tensor)]
    written = {loaded[name].data_ptr() for name in state if name in loaded}
    wrong += [name for name, tensor in loaded.items() if name not in state and tensor.data_ptr() not in written]
    if wrong:
        raise RuntimeError(f"{folder} does not load as it was trained: {', '.join(wrong[:10])} differ")
