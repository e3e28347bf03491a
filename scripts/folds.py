"""What is folded, by a cell's tags: for the lab, the copies with holes and the downloads alike, as the book folds it."""

INPUT, BOTH = ("source_hidden",), ("source_hidden", "outputs_hidden")
FOLDED: dict[str, tuple[str, ...]] = {
    "hide-input": INPUT,
    "answer": INPUT,
    "hide-output": ("outputs_hidden",),
}
FOLDED |= dict.fromkeys(("hide-cell", "remove-cell", "solution"), BOTH)


def fold(cell, colab: bool = False) -> None:
    """Note on a code cell what Jupyter is to hide of it (`jupyter`), and on request Colab (`cellView`)."""
    tags = cell.metadata.get("tags", []) if cell.cell_type == "code" else []
    marks = {mark: True for tag in tags for mark in FOLDED.get(tag, ())}
    if marks:
        cell.metadata["jupyter"] = {**cell.metadata.get("jupyter", {}), **marks}
    if colab and "source_hidden" in marks:
        cell.metadata["cellView"] = "form"
