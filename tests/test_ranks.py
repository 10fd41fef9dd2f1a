"""What train.py asks of the other ranks and of the file system does not grow with them, nor with the micro-batches of a step."""

import json

import pytest
from conftest import ROOT
from ranks import counts_of

from zerotune.tools.scale import page
from zerotune.tools.synthetic import build_model, build_rows


@pytest.mark.launch
def test_a_step_asks_no_more_of_more_ranks(forks, tmp_path):
    settings = {"model_type": "llama", "vocab_size": 1004, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    build_model(tmp_path / "model", "causal", settings | {"num_attention_heads": 4})
    build_rows(tmp_path / "rows.jsonl", 128, [4, 20], [4, 20])
    files = tmp_path / "model", tmp_path / "rows.jsonl"
    few, many = (counts_of(forks, tmp_path, *files, "zero2", ranks, accumulation) for ranks, accumulation in ((2, 1), (4, 4)))
    for part in (few, many):
        assert part["step"].get("objects", 0) == part["step"]["listings"] == 0 and part["step"]["allreduce"] > 0
        del part["step"]["seconds"], part["step"]["listings on any rank"]
    assert many["step"] == few["step"]
    # With more than one micro-batch it is planned once how gradients are reduced, and rank 0 tells the others.
    assert many["start"]["objects"] <= few["start"]["objects"] + 1 and many["start"]["broadcast"] <= few["start"]["broadcast"] + 2
    assert many["start"]["listings on any rank"] <= few["start"]["listings on any rank"] + 2
    # A save lists what there is to be removed as well, which differs between two saves of one run.
    assert many["save"]["listings on any rank"] <= few["save"]["listings on any rank"] + 2
    assert many["checkpoint"]["files"] - few["checkpoint"]["files"] == 2  # one a rank


def test_the_page_is_made_of_the_committed_counts():
    counts = json.loads((ROOT / "docs/scale.json").read_text())
    steps = [cell["parts"]["step"] for cell in counts["cells"]]
    assert max(cell["ranks"] for cell in counts["cells"]) == 16 and not any(step.get("objects") for step in steps)
    assert page(counts) == (ROOT / "docs/scale.md").read_text()
