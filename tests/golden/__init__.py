"""Images of every version of the format that was ever written, read for ever."""
