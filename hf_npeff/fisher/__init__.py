"""Per-example Fishers: a model's predictions, the output directions that matter, and their sketched gradients."""
