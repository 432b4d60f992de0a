# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from its first cell to its last, and is kept without outputs."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def shown(notebook) -> str:
    """All text that the cells printed."""
    outputs = [o for c in notebook.cells for o in c.get("outputs", ())]
    return "".join(o.get("text", "") for o in outputs)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code and not any(c.outputs or c.execution_count for c in code)


@pytest.mark.timeout(600)
def test_train_and_look(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where its run folder goes
    monkeypatch.setenv("MPLBACKEND", "agg")
    path = ROOT / "notebooks" / "01_train_and_look.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    text = shown(notebook)
    assert "finished 20 steps" in text
    assert "embed_vd" in text and "35,040 weights" in text
    trained, random = text.split("mean surprise: trained ")[1].split(" random ")
    assert float(trained.split()[0]) < float(random.split()[0].rstrip(".")) < 9.5
    assert "the last token moves the belief" in text


@pytest.mark.timeout(300)
def test_chunkflow(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    path = ROOT / "notebooks" / "03_chunkflow.ipynb"
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    text = shown(notebook)
    # The paper's three figures (arXiv 2503.02356, section 4.3).
    for units, bubble in ((42, "42.86%"), (56, "57.14%"), (46, "47.83%")):
        assert f"{units} units, bubble {bubble}" in text
    grown = float(text.split("beside keys and values times ")[1].split()[0])
    assert 1 <= grown < 1.01
    before, after = (text.split(f"{name}: ")[1] for name in ("before", "after"))
    assert float(before.split("worst cell ")[1].split("%")[0]) < 50
    assert float(after.split("worst cell ")[1].split("%")[0]) >= 95
