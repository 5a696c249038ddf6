"""What a graph computes: operators, facts, views, memory, text and counts, asked of torch.fx nodes."""
