"""The engine: rules, the driver that applies them, the editor that changes the graph, certificates."""
