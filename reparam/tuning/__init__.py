"""What the clock decides: choices, variants and prepared layers, timed on the machine that runs them."""
