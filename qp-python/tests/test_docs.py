"""The examples of docs/python.md run."""

import os
import re
from pathlib import Path

import pytest

import qpalette as qp

ROOT = Path(__file__).parents[2]


def blocks():
    text = (ROOT / "docs" / "python.md").read_text()
    return re.findall(r"^## (.*?)$.*?```python\n(.*?)```", text, re.M | re.S)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    found = blocks()
    assert [title for title, _ in found] == ["Quantizers and matrices", "Models", "PyTorch", "transformers"]
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "models" / "kjv-llama", "MODEL_DIR")
    Path("mine.qspec").write_text(qp.Quantizer.named("nuq_3").text)
    Path("text.txt").write_text((ROOT / "models" / "kjv-llama" / "valid.txt").read_text())
    scope = {}
    for title, code in found:
        if title in ("PyTorch", "transformers"):
            pytest.importorskip("torch")
        if title == "transformers":
            pytest.importorskip("transformers")
        exec(compile(code, f"docs/python.md, {title}", "exec"), scope)
    assert 2 < scope["plan"].bits <= 3.25
    said = scope["tokenizer"].decode(scope["tokens"][0])
    assert said.startswith("In the beginning") and qp.generate("SAVED", "In", tokens=2, device="cpu")
