"""ferrotype: disk imaging."""
