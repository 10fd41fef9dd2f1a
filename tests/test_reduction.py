"""When gradients are exchanged under ZeRO-2 and 3: once a step or at each micro-batch, the same training."""

import shutil

import pytest
import torch

STEPS, ACCUMULATION = 4, 4


@pytest.mark.launch
@pytest.mark.parametrize("strategy, kind", [("zero2", "allreduce"), ("zero2_offload", "allreduce"), ("zero3", "reduce_scatter")])
def test_once_is_each_time(train, tiny, rows16, tmp_path, strategy, kind):
    """In float32 losses within 1e-5, and the bytes of the gradients' collectives divided by the accumulation."""
    options = {
        "model_name_or_path": tiny("llama"), "task": "causal", "train_file": rows16, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3,
        "save_steps": STEPS // 2, "profile_steps": 2, "freeze": "embeddings",
    }  # fmt: skip
    each = train(strategy, name="each", reduce="each", **options)
    once = train(strategy, name="once", reduce="auto", probe_longest_batch=True, **options)
    assert [run.run["engine"]["gradients_reduced"] for run in (each, once)] == ["at each micro-batch", "once a step"]
    assert "longest micro-batch:" in once.output and "fits" in once.output
    for name, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected, found = ([record[name] for record in run.records("loss")] for run in (each, once))
        assert len(found) == STEPS and found == pytest.approx(expected, rel=bound)
    sent = [run.records("collective_bytes")[0]["collective_bytes"] for run in (each, once)]
    learns = once.run["parameters"]["trainable"] * 4
    assert sent[1][kind] == pytest.approx(learns, rel=0.02, abs=200)  # padding of flat groups; counts and norms
    assert sent[0][kind] == pytest.approx(ACCUMULATION * learns, rel=0.02, abs=200)
    assert sent[0]["allgather"] == sent[1]["allgather"] > 0

    cut = tmp_path / "cut"
    shutil.copytree(once.folder, cut)
    for name in (f"checkpoint-{STEPS}", "final"):
        shutil.rmtree(cut / name)
    again = train(strategy, name="again", reduce="once", **options | {"output_dir": cut, "probe_longest_batch": None})
    assert again.run["resumed_from"].endswith(f"checkpoint-{STEPS // 2}")
    assert all(torch.equal(weight, again.weights()[name]) for name, weight in once.weights().items())
