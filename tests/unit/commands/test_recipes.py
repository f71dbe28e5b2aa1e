"""Proves that `megasd recipes` keeps its columns apart for names and papers of any length."""

from __future__ import annotations

import pytest

from megasd.commands import recipes


def test_columns_are_as_wide_as_the_longest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"thirteen_long": ("2601.00001", "first"), "b": ("A paper of some length", "second")}
    monkeypatch.setattr(recipes, "ABOUT", about)
    assert recipes.table() == [
        "thirteen_long  2601.00001              first",
        "b              A paper of some length  second",
    ]
