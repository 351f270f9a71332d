"""Studies of what a decomposition finds, and the tasks they run on."""
