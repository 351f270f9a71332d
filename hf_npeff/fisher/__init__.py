"""Per-example Fishers: what a model predicts, which output directions matter, and their sketched gradients."""
