"""What rules of one's own are made of; ``docs/extending.md`` has the contract, with examples."""

from reparam.graph import facts
from reparam.graph.graph import Graph
from reparam.rewrite.rule import Add, Apply, Missed, Rewrite, Rule, Slice

__all__ = ["Add", "Apply", "Graph", "Missed", "Rewrite", "Rule", "Slice", "facts"]
