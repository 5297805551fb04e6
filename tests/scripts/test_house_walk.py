"""The files that house_walk.py finds in a made-up tree."""

import textwrap
from pathlib import Path

import house_walk


def walk(tree: Path, sources: dict[str, str]) -> dict[str, list[str]]:
    """Write a tree, and walk through its command with the word `a=b`."""
    for name, source in {**sources, "hqqtrain/__init__.py": ""}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(textwrap.dedent(source))
    return house_walk.walk(tree, ["a=b"], tree)


def test_what_imports_call_is_left_out(tmp_path: Path) -> None:
    files = walk(
        tmp_path,
        {
            "hqqtrain/__main__.py": "import os, hqqtrain.cli as c\nc.main()\nos._exit(0)\n",
            "hqqtrain/cli.py": """
                from hqqtrain.keys import key
                import sys
                NAME = key()

                def main():
                    from hqqtrain.run import run
                    run(sys.argv[1:])
                """,
            "hqqtrain/keys.py": "def key():\n    return 1\n",
            "hqqtrain/run.py": "def run(words):\n    assert words == ['a=b']\n",
        },
    )
    assert files == {"called": ["hqqtrain/cli.py", "hqqtrain/run.py"], "chain": []}


TORCH = """
    enabled = False

    def is_grad_enabled():
        return enabled

    def call(layer):
        return layer.forward()
    """
"""Importing the real one takes seconds under a profile hook."""


def test_the_chain_is_the_stack_of_the_first_call_in_a_training_step(tmp_path: Path) -> None:
    """A call outside of the trainer, or one without gradients, is no training step."""
    files = walk(
        tmp_path,
        {
            "torch.py": TORCH,
            "hqqtrain/__main__.py": "from hqqtrain.cli import main\nmain()\n",
            "hqqtrain/cli.py": """
                import torch
                from hqqtrain.evaluate import evaluate
                from hqqtrain.training.loop import step

                def main():
                    step()
                    torch.enabled = True
                    evaluate()
                    step()
                """,
            "hqqtrain/evaluate.py": """
                from hqqtrain_kernels.ops import linear

                def evaluate():
                    linear()
                """,
            "hqqtrain/training/loop.py": """
                import torch
                from hqqtrain.layer import FrozenLayer, Layer

                def step():
                    torch.call(Layer() if torch.enabled else FrozenLayer())
                """,
            "hqqtrain/layer.py": """
                from hqqtrain_kernels.checks import check
                from hqqtrain_kernels.ops import linear

                class FrozenLayer:
                    def forward(self):
                        check()

                class Layer:
                    def forward(self):
                        return linear()
                """,
            "kernels/hqqtrain_kernels/__init__.py": "",
            "kernels/hqqtrain_kernels/checks.py": "def check():\n    pass\n",
            "kernels/hqqtrain_kernels/ops.py": "def linear():\n    pass\n",
        },
    )
    assert files["chain"] == [
        "hqqtrain/cli.py",
        "hqqtrain/training/loop.py",
        "hqqtrain/layer.py",
        "kernels/hqqtrain_kernels/ops.py",
    ]
    called = {"hqqtrain/evaluate.py", "kernels/hqqtrain_kernels/checks.py"}
    assert set(files["called"]) == {*files["chain"], *called}
