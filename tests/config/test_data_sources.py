"""Lists of sources: what is allowed, and one message for every fault."""

import pytest
from refused_configs import refusal

from hqqtrain.compose.compose import compose_config
from hqqtrain.config.data_sources import describe_source, listed_sources, source_paths
from hqqtrain.config.groups import DataConfig
from hqqtrain.config.run import RunConfig


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.jsonl", "a.jsonl"), ("2024", 2024), ("[a.jsonl]", ["a.jsonl"]),
        ("[a.jsonl,{path:b.jsonl,repeats:2}]", ["a.jsonl", {"path": "b.jsonl", "repeats": 2}]),
        ("[{path: 'a/*.txt', weight: 0.7, format: text}, {path: org/name:config, weight: 1}]",
         [{"path": "a/*.txt", "weight": 0.7, "format": "text"},
          {"path": "org/name:config", "weight": 1}]),
    ],
)  # fmt: skip
def test_the_command_line_and_what_it_means(words, expected):
    config = compose_config([f"data.source={words}"])
    assert config.data.source == expected
    assert all(isinstance(path, str) for path in source_paths(expected))
    assert describe_source(expected) == " + ".join(source_paths(expected))


def test_a_recipe_may_have_a_list(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# mine\ndata:\n  source:\n    - path: a.csv\n      text_field: body\n    - b.txt\n"
    )
    config = compose_config([f"recipe={tmp_path}/mine.yaml"])
    first, second = listed_sources(config.data.source)
    assert (first.path, first.text_field, first.repeats) == ("a.csv", "body", 1)
    assert (second.path, second.text_field, second.weight) == ("b.txt", None, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "data.source=null: must be a path or name, or a list of them, such as [a.jsonl,"),
        ([], "data.source=[]: must be a path or name, or a list"), ({}, "data.source={}: must be"),
        ([None], "data.source[0]=None: must be a path or name, or have a path"),
        (["a", ""], "data.source[1]=: must be"), ([["a"]], "data.source[0]=['a']: must be"),
        (["a", {"repeats": 2}], "data.source[1]={'repeats': 2}: must be"),
        ([{"path": "a", "wieght": 2}], "data.source[0].wieght: unknown key. Did you mean"),
        ([{"path": "a", "repeats": 0}], "data.source[0].repeats=0: must be a number above 0."),
        ([{"path": "a", "weight": -1.5}], "data.source[0].weight=-1.5: must be a number above 0."),
        ([{"path": "a", "weight": float("nan")}], "data.source[0].weight=nan: must be"),
        ([{"path": "a", "repeats": "two"}], "data.source[0].repeats=two: must be"),
        ([{"path": "a", "repeats": True}], "data.source[0].repeats=True: must be"),
        ([{"path": "a", "format": "jsonl"}], "data.source[0].format=jsonl: allowed are auto,"),
        ([{"path": "a", "file_type": "tsv"}], "data.source[0].file_type=tsv: allowed are auto,"),
        ([{"path": "a", "text_field": 5}], "data.source[0].text_field=5: must be the name of"),
        ([{"path": "a", "weight": 1, "repeats": 2}], "has a weight and also repeats"),
        ([{"path": "a", "weight": 1}, "b"], "data.source[1]=b: has no weight; give weights to all"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "data.source[1]=b: has no weight"),
    ],
)  # fmt: skip
def test_faults_are_named_with_their_place(source, message):
    assert message in refusal(data={"source": source})


def test_the_mix_defines_the_result():
    configs = [
        RunConfig(data=DataConfig(source=source))
        for source in ("a", ["a", "b"], ["a", {"path": "b", "repeats": 2}])
    ]
    assert len({config.identity() for config in configs}) == 3
    for config in configs:
        config.check()
