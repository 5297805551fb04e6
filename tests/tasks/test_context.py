"""The context of a task."""

from pathlib import Path


def test_the_layout_is_that_of_the_run_directory(make_config, start_run, tmp_path: Path):
    with start_run(make_config()) as run:
        assert run.layout.folder == tmp_path / "runs" / "run"
        assert run.layout.quantized == tmp_path / "runs" / "run" / "quantized"
