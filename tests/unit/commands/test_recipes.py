"""Proves that `megasd recipes` keeps its columns apart for names and papers of any length."""

from __future__ import annotations

import pytest

from megasd.algo.recipes import Recipe
from megasd.commands import recipes
from megasd.config.schema import AlgorithmConfig


def test_columns_are_as_wide_as_the_longest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    row = AlgorithmConfig()
    catalogue = {
        "thirteen_long": Recipe("2601.00001", "first", row),
        "b": Recipe("A paper of some length", "second", row),
    }
    monkeypatch.setattr(recipes, "CATALOGUE", catalogue)
    assert recipes.table() == [
        "thirteen_long  2601.00001              first",
        "b              A paper of some length  second",
    ]
