"""Several runs: reproduced, packed onto one device, voting together."""
