"""Files: checkpoints of all kinds in, deploy files out."""
