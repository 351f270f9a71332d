"""From the columns of a data set to a model's inputs: which columns are read and how they are encoded."""
