"""The run folder: its configuration, records, and the state to resume from."""
