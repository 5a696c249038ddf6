"""``reparam models``: the networks that checkpoints are recognised as."""

from __future__ import annotations

from typing import Any

from reparam.cli.shell import Debug, Json, new_table, print_json, shape_text, stdout


def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the networks that checkpoints are recognised as."""
    import torch

    from reparam.models import registry

    rows: list[dict[str, Any]] = []
    for name in registry.names():
        entry = registry.entry(name)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in entry.build().parameters())
        about = {"input_shape": entry.input_shape, "description": entry.description, "paper": entry.paper}
        rows.append({"name": name, "parameters": parameters, **about})
    if as_json:
        print_json(rows)
        return
    table = new_table("model", "parameters", "input", "paper", right=(1,))
    for row in rows:
        table.add_row(row["name"], f"{row['parameters']:,}", shape_text(row["input_shape"]), row["paper"])
    stdout().print(table)
