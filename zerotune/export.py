"""final/: what AutoModel...from_pretrained loads, written whole, read back and compared before it gets its name."""

import os
import shutil
from pathlib import Path

import torch
import transformers

from zerotune.model import AUTO_CLASSES


def export(accelerator, model, tokenizer, output_dir, task, trust_remote_code=False):
    """Write output_dir/final from any strategy (ZeRO-3's shards are gathered) and return its path.

    The weights have the training precision: float32, or bf16/fp16 under DeepSpeed. The main process loads the folder as a user
    would and compares every tensor bit by bit; RuntimeError names the ones that differ. An earlier final/ stays until then.
    """
    final = Path(output_dir) / "final"
    temporary, previous = Path(f"{final}.tmp"), Path(f"{final}.previous")
    state = accelerator.get_state_dict(model)  # a collective under ZeRO-3; whole on the main process
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        inner = accelerator.unwrap_model(model)
        # state_dict names a tied weight several times; written once, it is tied again on loading.
        inner.save_pretrained(temporary, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        check(temporary, task, state, trust_remote_code)
        shutil.rmtree(previous, ignore_errors=True)
        if final.exists():
            os.rename(final, previous)
        os.rename(temporary, final)
        shutil.rmtree(previous, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def check(folder, task, state, trust_remote_code):
    """Raise RuntimeError unless from_pretrained(folder) holds exactly the tensors of `state`, tied weights under every name."""
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # else ZeRO-3 would shard the copy over all ranks
    model = AUTO_CLASSES[task].from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    loaded = model.state_dict()
    wrong = [name for name, tensor in state.items() if name not in loaded or not torch.equal(loaded[name], tensor.cpu())]
    written = {loaded[name].data_ptr() for name in state if name in loaded}
    wrong += [name for name, tensor in loaded.items() if name not in state and tensor.data_ptr() not in written]
    if wrong:
        raise RuntimeError(f"{folder} does not load as it was trained: {', '.join(wrong[:10])} differ")
