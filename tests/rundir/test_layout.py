"""Every path of a run directory is below it, and checkpoints are known by their names."""

from hqqtrain.rundir.layout import RunLayout, checkpoint_name, checkpoint_steps


def test_all_paths_are_below_the_folder_and_differ(tmp_path):
    layout = RunLayout(tmp_path)
    names = [n for n, v in vars(RunLayout).items() if isinstance(v, property)]
    paths = [getattr(layout, name) for name in names if not name.startswith("has_")]
    assert len(set(paths)) == len(paths) > 10
    assert all(tmp_path in path.parents for path in paths)


def test_results_are_those_that_exist(tmp_path):
    layout = RunLayout(tmp_path)
    assert layout.existing_results() == []
    layout.adapter.mkdir()
    layout.summary_json.write_text("{}")
    assert layout.existing_results() == [layout.adapter, layout.summary_json]


def test_a_model_is_there_when_its_configuration_is(tmp_path):
    layout = RunLayout(tmp_path)
    layout.quantized.mkdir()
    assert not layout.has_quantized
    (layout.quantized / "config.json").write_text("{}")
    assert layout.has_quantized
    assert not layout.has_adapter


def test_steps_of_checkpoints_ascend_and_other_names_are_ignored(tmp_path):
    for name in (checkpoint_name(20), checkpoint_name(3), ".step-00000001", "step-x", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint_name(100) == "step-00000100"
    assert checkpoint_steps(tmp_path) == [3, 20]
    assert checkpoint_steps(tmp_path / "absent") == []
