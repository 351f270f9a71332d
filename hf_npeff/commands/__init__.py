"""The commands of `hf-npeff`, grouped by what they do; `hf_npeff.cli` puts them together."""
