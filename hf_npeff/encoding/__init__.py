"""From the columns of a data set to what a model reads: which columns, how they are encoded, and a record of it."""
