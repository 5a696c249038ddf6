"""From operators to the model that is deployed: layers, their names, the compiled model."""
