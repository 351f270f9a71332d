"""The model under analysis and the stages that run it, each a class; `hf_npeff.analyzer` puts them together."""
