"""--torch_compile: the repeated blocks of a model as compiled kernels, a few graphs for all of them and for all lengths."""

import torch

from zerotune.model.freezing import block_lists

MOST_GRAPHS = 64  # of the blocks of one class; what comes after them runs as it was written
graphs = 0  # compiled so far by this process


def compile_blocks(model):
    """Compile each block of a model, before it is wrapped for training, with symbolic sizes.

    Blocks of one class that differ in nothing but weights share a graph. Another one is compiled for what differs (T5's first
    blocks, cross-attention, what is frozen), and for a batch or a length of 1, which a compiler takes for a constant. Evaluations
    and generation run the blocks as they are written: caches that grow would be compiled ever anew.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it would cut each block again, for gradients to leave early: blocks are the cuts
    for path in block_lists(model):
        for block in model.get_submodule(path):
            compile_block(block)


def counted_inductor(graph, inputs):
    """Compile a graph with torch's inductor, and count it."""
    global graphs
    graphs += 1
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def compile_block(block):
    """Give a block a forward that is compiled where gradients are wanted. The engine's hooks, around it, are not."""
    block_forward = block.forward
    compiled = torch.compile(block_forward, dynamic=True, backend=counted_inductor)

    def forward(*args, **kwargs):
        return (compiled if torch.is_grad_enabled() else block_forward)(*args, **kwargs)

    block.forward = forward
