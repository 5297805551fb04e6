"""The protocols of an evaluation: the lengths of their windows, and of a batch of them."""

import pytest

from hqqtrain.config.eval_protocols import JOINED_PROTOCOLS
from hqqtrain.config.groups import EvalConfig
from hqqtrain.config.run import RunConfig


def test_a_window_has_at_least_the_tokens_that_it_predicts():
    for protocol in JOINED_PROTOCOLS.values():
        assert 0 < protocol.stride <= protocol.context


@pytest.mark.parametrize(
    ("protocol", "shape", "batch_size"),
    [("windows", (512, 512), 8), ("wikitext2_2048", (2048, 2048), 2), ("hqq", (1024, 512), 4)],
)
def test_a_batch_has_the_tokens_of_a_micro_batch(protocol, shape, batch_size):
    evaluation = EvalConfig(protocol=protocol)
    assert evaluation.window_shape(512) == shape
    assert evaluation.batch_size(8, 512) == batch_size
    assert evaluation.batch_size(1, 512) == 1
    config = RunConfig(eval=evaluation)
    config.train.max_seq_len = 512
    assert config.eval_protocol() == {
        "protocol": protocol, "context": shape[0], "stride": shape[1],
    }  # fmt: skip


def test_fewer_tokens_than_a_window_are_refused():
    message = "eval.tokens=1000: eval.protocol=hqq measures windows of 1024 tokens"
    assert [
        error[: len(message)] for error in EvalConfig(protocol="hqq", tokens=1000).errors()
    ] == [message]
    assert not list(EvalConfig(protocol="hqq", tokens=1024).errors())
    assert not list(EvalConfig(tokens=2).errors())
