"""The run folder: what a run was told, what it recorded, and the state it can go on from."""
