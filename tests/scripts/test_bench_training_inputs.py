"""The texts of the training benchmark fill their sequences, or are packed documents."""

import json

from bench_training_inputs import Workload, write_inputs


def test_the_texts(tmp_path):
    write_inputs(tmp_path, "small", Workload(tmp_path, batch=2, tokens=512, checkpointing="full"))
    lengths = {}
    for name in ("data", "documents"):
        with (tmp_path / f"{name}.jsonl").open() as file:
            lengths[name] = sorted(len(json.loads(line)["input_ids"]) for line in file)
        assert sum(lengths[name]) >= 64 * 2 * 512
        assert max(lengths[name]) == 512
    assert set(lengths["data"]) == {512}
    documents = lengths["documents"]
    assert 200 < documents[len(documents) // 2] < 400
