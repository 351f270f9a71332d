"""The analysed model and the stages of an analysis, each a class; `hf_npeff.analyzer` puts them together."""
