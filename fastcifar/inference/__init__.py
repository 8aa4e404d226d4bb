"""From trained runs to answers."""
