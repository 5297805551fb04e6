"""scripts/measure_tokenization.py measures a small corpus of each kind."""

import measure_tokenization


def test_a_row_for_each_kind(tmp_path, monkeypatch, capsys):
    texts = [("a.py", "\n".join(f"def f{i}(x): return x + {i}" for i in range(3000)))]
    monkeypatch.setattr(measure_tokenization, "stdlib_texts", lambda _: texts)
    words = ["script", "--tokens", "5000", "--workers", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    measure_tokenization.main()
    header, _, text, chat, last = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["kind", "tokens", "examples"]
    for name, row in (("text", text), ("chat", chat)):
        kind, tokens, *_ = row.split()
        assert kind == name
        assert 2500 < int(tokens.replace(",", "")) < 20_000
    assert last.startswith("1 workers, ")
    assert list(tmp_path.iterdir()) == [], "the corpus and its tokens are removed"
