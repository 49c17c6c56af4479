from ferrotype.block.linux import punch_hole  # noqa: F401
