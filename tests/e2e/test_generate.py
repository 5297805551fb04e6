"""task=generate as a user calls it: a chat on a terminal, prompts from everywhere, no directory."""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from select import select

import pytest
from forkserver import fork_context
from runs import SMALL, run, run_in_this_process

from hqqtrain.cli import main

GREEDY = ("generate.temperature=0", "generate.max_new_tokens=6")
SECONDS = 30.0
"""Time until a terminal that should show something has failed."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line of a finished training on chats."""
    root = tmp_path_factory.mktemp("generate")
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    (root / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    words = [
        *(word for word in SMALL if not word.startswith(("data.", "eval.source"))),
        f"data.source={root / 'chat.jsonl'}", "data.chat_template=chatml", "eval.source=null",
        "train.max_steps=2", "train.precision=fp32", "optim.lr=0.01",
    ]  # fmt: skip
    done = run(*words, root=root / "runs")
    assert done.code == 0, done.output
    return [*words, f"run.root={root / 'runs'}"]


@pytest.fixture
def generate(words, capfd, tmp_path, monkeypatch):
    """Return a function that generates with standard input, and returns code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def generate(*more: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = run_in_this_process([*words, "task=generate", *GREEDY, *more])
        out, errors = capfd.readouterr()
        return code, out, errors

    return generate


def test_the_command_that_has_trained_answers_with_its_result(generate, words):
    root = Path(words[-1].partition("=")[2])
    before = sorted(root.rglob("*"))
    code, reply, log = generate("generate.prompt=Hello", "generate.output=out.jsonl")
    assert code == 0
    assert f"uses {root}/tiny_2bit-" in log
    assert "loading the adapter in" in log
    assert log.splitlines()[-1].startswith("prefill: ")
    assert "tokens/s; decode: 5 tokens in" in log
    kept = json.loads(Path("out.jsonl").read_text())["messages"]
    assert [turn["role"] for turn in kept] == ["user", "assistant"]
    assert f"{kept[1]['content']}\n" == reply
    assert sorted(root.rglob("*")) == before
    assert os.listdir() == ["out.jsonl"]


def test_all_ways_to_give_a_prompt_get_the_same_reply(generate):
    Path("lines.txt").write_text("Hello\n\n")
    Path("rows.jsonl").write_text(
        '{"prompt": "Hello"}\n{"messages": [{"role": "user", "content": "Hello"}, '
        '{"role": "assistant", "content": "an answer, which is left out"}]}\n'
    )
    _, reply, _ = generate("generate.prompt=Hello")
    assert generate(stdin="Hello\n")[:2] == (0, reply)
    assert generate("generate.prompts_file=rows.jsonl")[:2] == (0, f"{reply}\n{reply}")
    assert generate("generate.prompt=[Hello]", "generate.prompts_file=lines.txt")[:2] == (
        0,
        f"{reply}\n{reply}",
    )


def test_the_models_of_a_run_differ(generate):
    sampled = ("generate.prompt=Hello", "generate.temperature=1", "generate.seed=0")
    replies = {
        use: generate(*sampled, f"generate.use={use}")[1]
        for use in ("auto", "quantized", "full_precision")
    }
    assert len({*replies.values()}) == 3
    assert generate(*sampled)[1] == replies["auto"]  # a seed repeats


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "there are no prompts. Set generate.prompt or generate.prompts_file"),
        (["generate.prompts_file=absent.txt"], "generate.prompts_file=absent.txt: cannot read"),
        (["generate.prompts_file=broken.jsonl"], "broken.jsonl, line 2: not valid JSON"),
        (["generate.prompts_file=odd.jsonl"], "odd.jsonl, line 1: has neither prompt nor messages"),
        (["generate.prompts_file=empty.txt"], "the file has no prompts"),
        (["generate.prompts_file=long.txt"], "long.txt, line 1: the prompt has "),
        (["generate.prompt=x", "generate.output=broken.jsonl"], "broken.jsonl: exists already"),
        (["generate.prompt=x", "generate.output=no/x"], "no is not a folder to write to"),
        (["generate.prompt=x", "model.name_or_path=tiny", "generate.chat=true",
          "data.chat_template=auto"], "has no chat template, as most base models"),
        (["generate.prompt=x", "model.name_or_path=tiny", "adapter.init_from=absent"], "absent"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_message(generate, more, message):
    Path("broken.jsonl").write_text('{"prompt": "x"}\n{"prompt":\n')
    Path("odd.jsonl").write_text('{"text": "x"}\n')
    Path("empty.txt").write_text("\n\n")
    Path("long.txt").write_text("word " * 600)
    code, reply, log = generate(*more)
    assert (code, reply) == (2, "")
    assert message in log
    assert "Traceback" not in log


def test_several_ranks_are_refused(words, tmp_path):
    done = run(*words[:-1], "task=generate", root=tmp_path / "runs", processes=2)
    assert done.codes == (2, 2)
    assert "task=generate" in done.output


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self._fd, follower = os.openpty()
        name = os.ttyname(follower)
        self.process = fork_context().Process(target=_on_terminal, args=(name, words, folder))
        self.process.start()
        self._follower, self.shown = follower, ""

    def wait_for(self, text: str) -> str:
        """Return what is shown up to `text`, since the last call."""
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            if select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 4096).decode().replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_for_any_text(self) -> None:
        """Wait until something is shown after what the last call has returned."""
        assert self.shown or select([self._fd], [], [], SECONDS)[0]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self) -> int | None:
        self.process.join(SECONDS)
        return self.process.exitcode

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        for fd in (self._fd, self._follower):
            os.close(fd)


@pytest.fixture
def start(words, tmp_path):
    """Return a function that starts task=generate on a terminal."""
    terminals: list[Terminal] = []

    def start(*more: str) -> Terminal:
        terminals.append(Terminal([*words, "task=generate", *more], tmp_path))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def _on_terminal(name: str, words: list[str], folder: Path) -> None:
    os.setsid()
    fd = os.open(name, os.O_RDWR)  # which becomes the controlling terminal: Ctrl-C is a signal
    for number in (0, 1, 2):
        os.dup2(fd, number)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.__stdout__ = sys.stdout
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TERM"] = "dumb"
    os.chdir(folder)
    sys.exit(main(words))


def test_a_chat_on_a_terminal(start, tmp_path):
    terminal = start(*GREEDY, "generate.output=out.jsonl")
    assert "/reset begins a new chat" in terminal.wait_for("> ")
    replies = []
    for line in ("Hello", "Hello", "/reset", "Hello", "/what", "/exit"):
        terminal.type(f"{line}\n")
        terminal.wait_for(f"{line}\n")
        replies.append(terminal.wait_for("prefill: " if line == "/exit" else "> "))
    assert terminal.exit_code() == 0
    first, _, reset, again, unknown, _ = replies
    assert first == again
    assert "the reply was cut off" in first
    assert reset == ""
    assert "Ctrl-D ends" in unknown
    chats = [json.loads(line)["messages"] for line in (tmp_path / "out.jsonl").open()]
    assert [len(chat) for chat in chats] == [4, 2]
    assert chats[0][:2] == chats[1]


def test_ctrl_c_stops_a_reply_and_ctrl_d_ends_the_chat(start):
    terminal = start("generate.temperature=0", "generate.max_new_tokens=null")
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello\n")
    terminal.wait_for_any_text()
    terminal.type("\x03")
    assert "(the reply was cut off)" in terminal.wait_for("> ")
    time.sleep(0.3)  # until `input` waits for a key
    terminal.type("\x03")
    terminal.wait_for("/exit or Ctrl-D ends the chat")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
