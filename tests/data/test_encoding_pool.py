"""Several processes give the tokens, the order and the error of a single one."""

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
from chat_examples import CHAT, COMPLETION, PAIR, TOKENS
from forkserver import fork_context
from transformers import AutoTokenizer

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.data import encoding_pool as module
from hqqtrain.data.encoding import encode_examples
from hqqtrain.data.examples import Conversation
from hqqtrain.models.source import TINY_FOLDER

CHATS = [
    Conversation(
        ({"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "ab " * (i % 7)}),
        place=f"line {i}",
    )
    for i in range(1, 40)
]
BAD = Conversation(({"role": "user", "content": "?"}, {"role": "nobody", "content": None}))


@pytest.fixture
def encode(monkeypatch):
    """Return a function that encodes examples, in batches of three."""
    monkeypatch.setattr(module, "SERIAL_CHARACTERS", 0)
    monkeypatch.setattr(module, "BATCH_EXAMPLES", 3)
    monkeypatch.setattr(module, "start_method", fork_context)
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)

    def encode(examples, workers: int, on_batch=lambda: None) -> list:
        data = DataConfig(chat_template="chatml", workers=workers)
        found = encode_examples(examples, tokenizer, data, on_batch=on_batch)
        return [(ids.tolist(), targets.tolist()) for ids, targets in found]

    return encode


def test_the_tokens_and_their_order(encode):
    examples = [*CHATS, "a text", COMPLETION, TOKENS, CHAT, *CHATS]
    assert encode(examples, 2) == encode(examples, 1)


def test_kinds_that_alternate_share_the_processes(encode, monkeypatch):
    """As the chats and completions of sources that are mixed by weights."""
    started = []
    monkeypatch.setattr(module, "start_method", lambda: started.append(0) or fork_context())
    examples = [CHAT, COMPLETION, PAIR] * 6
    assert encode(examples, 2) == encode(examples, 1)
    assert len(started) == 1


def _then(examples: list, error: Exception) -> Iterator:
    yield from examples
    raise error


def test_the_first_error(encode):
    """Whether it is one of an example or of the reader; later ones do not count."""
    early, late = ([*CHATS[:n], BAD, *CHATS[n:], BAD] for n in (1, 17))
    unreadable = UserError("line 40 cannot be read")
    for examples in (early, late, [*CHATS, BAD]):
        messages = []
        for workers in (1, 2):
            with pytest.raises(UserError) as error:
                encode(_then(examples, unreadable), workers)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert "cannot be read" not in messages[0]
    with pytest.raises(UserError, match="line 40 cannot be read"):
        encode(_then(CHATS, unreadable), 2)


def test_a_worker_that_is_killed_is_an_error(encode, monkeypatch):
    monkeypatch.setattr(module, "_encode_batch", _kill_this_process)
    with pytest.raises(UserError, match=r"data\.workers=2: a process .* was killed"):
        encode(CHATS, 2)


def _kill_this_process(_: list) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_signal_stops_the_wait_for_workers(encode):
    calls = []

    def on_batch() -> None:
        calls.append(0)
        if len(calls) > 2:
            raise PreemptedError("SIGTERM was received")

    with pytest.raises(PreemptedError):
        encode(CHATS, 2, on_batch)


def test_a_small_input_starts_no_process(encode, monkeypatch):
    monkeypatch.setattr(module, "SERIAL_CHARACTERS", 1 << 24)
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    assert len(encode(CHATS, 2)) == len(CHATS)


def test_a_line_of_every_process_is_logged_once(encode, caplog, capfd):
    encode(CHATS, 3)
    assert caplog.text.count("trained as ordinary text") <= 1
    assert "ordinary text" not in capfd.readouterr().err


def test_an_idle_worker_that_is_killed_is_an_error(encode, monkeypatch):
    """It had the lock of the queue, for which the other one waits, and that ignores SIGTERM."""
    monkeypatch.setattr(module, "_encode_batch", _kill_the_other_process)
    with pytest.raises(UserError, match=r"data\.workers=2: a process .* was killed"):
        encode(CHATS, 2)


def _kill_the_other_process(batch: list) -> list:
    if batch[0][0] == 2:  # the first one; the other process encodes the next ones meanwhile
        time.sleep(0.3)  # and then it waits for a batch
        for other in psutil.Process(os.getppid()).children():
            if other.pid != os.getpid():
                other.kill()
    return [], []
