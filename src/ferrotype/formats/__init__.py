"""Virtual-disk containers."""
