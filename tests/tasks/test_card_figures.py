"""The figures on the card of an adapter, and how they were measured."""

from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.tasks.card_figures import card_metrics, describe_protocol
from hqqtrain.tasks.summary import RunSummary


def test_the_figures_have_their_protocol(make_config, start_run):
    with start_run(make_config(eval={"protocol": "hqq", "tokens": 4096})) as run:
        summary = RunSummary(run.config, run.runtime)
    assert (card_metrics(summary.content), describe_protocol(summary.content)) == ({}, "")
    summary.add_evaluation("text", "quantized", EvalResult(10.0, 4095))
    assert card_metrics(summary.content) == {"perplexity, quantized": 10.0}
    summary.add_evaluation("text", "final", EvalResult(8.0, 4095, 0.25, 7.0, 0.9))
    assert card_metrics(summary.content) == {
        "perplexity, full precision": 7.0, "perplexity, quantized": 10.0,
        "perplexity, trained": 8.0, "KL, trained": 0.25, "top-1 agreement, trained": 0.9,
    }  # fmt: skip
    assert describe_protocol(summary.content) == (
        "text: `eval.protocol=hqq`, context 1,024, stride 512, 4,095 predicted tokens"
    )
