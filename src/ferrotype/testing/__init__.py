"""Conformance suites: what every implementation of a seam must do, for our own tests and for those of plug-ins."""
